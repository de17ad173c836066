"""The loss by position in a text: its mean in buckets of positions, and a plot.

The loss falls as long as more context helps, and stays level where the model sees no more tokens.
"""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mistral_jax.config import ModelConfig
from mistral_jax.evaluation.perplexity import check_finite


class Bucket(NamedTuple):
    """The mean loss of the tokens in a range of positions, over all texts.

    Attributes:
      first_position: first position. Token p of a text has p tokens before it, BOS included.
      last_position: last position.
      tokens: number of tokens.
      loss: their mean loss in nats.
      stderr: its standard error, as if tokens were independent; None for a single token.
    """

    first_position: int
    last_position: int
    tokens: int
    loss: float
    stderr: float | None


def by_position(losses: Sequence[np.ndarray], count: int | None = None) -> list[Bucket]:
    """Averages losses in buckets of positions, from 1 to the end of the longest text.

    Args:
      losses: the loss of each token in nats, one [T] array per text.
      count: number of buckets of equal width; None = each is twice as wide as the one before.

    Returns:
      The buckets in order, without empty ones.

    Raises:
      ValueError: `count` is not above 0, or a loss is not finite.
    """
    check_finite(losses)
    if count is not None and count < 1:
        raise ValueError(f"count is {count} buckets of positions; expected at least 1")
    longest = max(map(len, losses))
    if count is None:
        starts = [1 << power for power in range(longest.bit_length())]
    else:
        starts = range(1, longest + 1, -(-longest // count))
    buckets = []
    for first, end in zip(starts, [*starts[1:], longest + 1], strict=True):
        found = np.concatenate([row[first - 1 : end - 1] for row in losses]).astype(np.float64)
        error = found.std(ddof=1) / math.sqrt(len(found)) if len(found) > 1 else None
        error = None if error is None else float(error)
        buckets.append(Bucket(first, end - 1, len(found), float(found.mean()), error))
    return buckets


def turns(ids: Sequence[int], length: int, count: int) -> list[list[int]]:
    """Cuts a text into segments, and returns rotations of each segment as rows.

    Every bucket of `length / count` positions then holds every token once, so buckets differ in
    the context of their tokens and not in their difficulty.

    Args:
      ids: token ids of the text.
      length: tokens per segment and per row (T); the rest of the text is left out.
      count: rows per segment; divides `length`.

    Returns:
      The rows; none if the text is shorter than `length`.
    """
    circles = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    starts = range(0, length, length // count)
    return [[*circle[i:], *circle[:i]] for circle in circles for i in starts]


def check_plot() -> None:
    """Raises a ValueError if matplotlib is missing, before the evaluation instead of after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("no plot without matplotlib: pip install 'mistral-jax-flax[train]'")


def plot(buckets: Sequence[Bucket], config: ModelConfig, target: Path) -> None:
    """Plots the loss by position into an image file, and marks the spans of the model's windows.

    Args:
      buckets: buckets from `by_position`.
      config: the model's architecture.
      target: image file; its extension names the format.

    Raises:
      ValueError: matplotlib does not know the format.
      OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    middles = [(bucket.first_position + bucket.last_position) / 2 for bucket in buckets]
    errors = [bucket.stderr or 0 for bucket in buckets]
    axes.errorbar(middles, [bucket.loss for bucket in buckets], errors, fmt="o-", capsize=3)
    for span in sorted({*config.spans} - {None}):
        axes.axvline(span, color="gray", linestyle="--", label=f"window of {span}")
        axes.legend()
    widths = [bucket.last_position - bucket.first_position for bucket in buckets]
    if max(widths) > widths[0]:
        axes.set_xscale("log", base=2)
    axes.set(xlabel="position in the text (tokens)", ylabel="nats a token")
    axes.grid(alpha=0.3)
    figure.savefig(target)
