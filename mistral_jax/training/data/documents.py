"""The data of a new model: documents as one array of token ids, and batches of them.

It trains nothing. A batch is a pure function of the array, the seed and the step, so a run that
goes on sees what it would have seen.
"""

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from mistral_jax.tokens.tokenizer import Tokenizer
from mistral_jax.training.step import Batch

_VALIDATION_SHARE = 200  # one document in so many is kept for validation


def split(source: str, files: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Divides a source's files into texts to train on and to validate on, by their names alone."""
    parts = [], []
    for name, text in files.items():
        digest = hashlib.sha256(f"{source}/{name}".encode()).digest()
        parts[int.from_bytes(digest[:8], "big") % _VALIDATION_SHARE == 0].append(text)
    return parts


def tokenize(texts: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """Encodes documents, each between BOS and EOS, as one array of uint16 (or uint32) ids."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    rows = [np.array(tokenizer.encode(text, bos=True, eos=True), dtype) for text in texts]
    return np.concatenate([np.empty(0, dtype), *rows])


def batch_at(step: int, tokens: np.ndarray, *, context: int, rows: int, seed: int) -> Batch:
    """Reads the batch of a step.

    An epoch reads every window of the text once, in a random order; where the windows begin changes
    from one to the next.

    Args:
      step: which batch, from 0 on.
      tokens: the text, a 1-dimensional array of ids.
      context: tokens a row (T).
      rows: rows (B).
      seed: of the order.

    Raises:
      ValueError: the text is shorter than one window.
    """
    count = (len(tokens) - 1) // context - 1
    if count < 1:
        raise ValueError(
            f"the text has {len(tokens)} tokens; expected at least {2 * context + 1} for a context "
            f"of {context}: add text, or make the context shorter"
        )
    starts = []
    for row in range(step * rows, (step + 1) * rows):
        epoch, place = divmod(row, count)
        offset, order = _epoch(epoch, count, context, seed)
        starts.append(offset + order[place] * context)
    return _windows(tokens, starts, context)


def batches_in_order(tokens: np.ndarray, *, context: int, rows: int) -> Iterator[Batch]:
    """Yields every whole window of a text once, in order; the last batch may have fewer rows."""
    count = (len(tokens) - 1) // context
    for first in range(0, count, rows):
        starts = [context * window for window in range(first, min(first + rows, count))]
        yield _windows(tokens, starts, context)


@functools.lru_cache(maxsize=2)  # The rows of one step may lie in two epochs.
def _epoch(epoch: int, count: int, context: int, seed: int) -> tuple[int, np.ndarray]:
    """Draws where an epoch's first window begins, and the order of its windows."""
    generator = np.random.default_rng((seed, epoch))
    return int(generator.integers(context)), generator.permutation(count)


def _windows(tokens: np.ndarray, starts: Sequence[int], context: int) -> Batch:
    windows = np.stack([tokens[start : start + context + 1] for start in starts]).astype(np.int32)
    positions = np.broadcast_to(np.arange(context, dtype=np.int32), (len(starts), context))
    return Batch(tokens=windows[:, :-1], positions=positions, targets=windows[:, 1:])
