"""The loss by position: how it falls with what a model has read, and stays where no more is seen.

It takes losses that are known; it runs no model.
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
    """Tokens at neighbouring positions, of all texts together.

    Attributes:
      first_position: of these tokens; token p of a text has p tokens before it, BOS included.
      last_position: of these tokens.
      tokens: how many there are.
      loss: their mean loss, in nats.
      stderr: its standard error, as if they were independent; None of a single token.
    """

    first_position: int
    last_position: int
    tokens: int
    loss: float
    stderr: float | None


def by_position(losses: Sequence[np.ndarray], count: int | None = None) -> list[Bucket]:
    """Gathers losses in buckets of positions, from 1 to the longest text's.

    Args:
      losses: the loss of each token of each text, in nats, [T] a text.
      count: number of buckets of one width; None = each reaches twice as far as the one before.

    Returns:
      The buckets, in order, without empty ones.

    Raises:
      ValueError: `count` is not above 0, or a loss is not finite.
    """
    check_finite(losses)
    if count is not None and count < 1:
        raise ValueError(f"there are to be {count} buckets of positions; expected at least 1")
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
    """Cuts a text into circles, and each into rows that begin at other places of it.

    So that buckets of `length / count` positions have the same tokens, each of them once: they
    differ in what was read before, not in how hard their text is.

    Args:
      ids: the text's token ids.
      length: tokens of a circle, and of a row (T); what remains of the text is left out.
      count: rows of each circle; divides `length`.

    Returns:
      The rows, none if the text is shorter than `length`.
    """
    circles = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    starts = range(0, length, length // count)
    return [[*circle[i:], *circle[:i]] for circle in circles for i in starts]


def check_plot() -> None:
    """Raises a ValueError if `plot` would, before the work rather than after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("no plot without matplotlib: pip install 'mistral-jax-flax[train]'")


def plot(buckets: Sequence[Bucket], config: ModelConfig, target: Path) -> None:
    """Draws the loss against the position into an image file, with the model's windows marked.

    Args:
      buckets: of `by_position`.
      config: the model's architecture.
      target: the file; its ending says the format.

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
