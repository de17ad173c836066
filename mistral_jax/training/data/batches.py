"""Batches: windows of one long text, or packed rows, and their placement on devices.

A batch is a pure function of the data, the seed and the step. A resumed run therefore reads the
batches that it would have read, and all processes read the same ones.
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np

from mistral_jax.parallel.sharding import Layout
from mistral_jax.training.data.packing import PackedRows, import_grain, padding, row_type
from mistral_jax.training.loss import IGNORED
from mistral_jax.training.step import Batch

_THREADS, _BATCHES_AHEAD = 2, 4


def window_batch(step: int, tokens: np.ndarray, *, context: int, rows: int, seed: int) -> Batch:
    """Reads the batch of a step from windows of one text.

    An epoch reads every window once, in a random order. The windows of different epochs begin at
    different offsets.

    Args:
      step: number of the batch, from 0.
      tokens: token ids of the text, 1-dimensional.
      context: tokens per row (T).
      rows: rows (B).
      seed: seed of the order.

    Raises:
      ValueError: the text is too short for a window at every offset.
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


def windows_in_order(tokens: np.ndarray, *, context: int, rows: int) -> Iterator[Batch]:
    """Yields every complete window of a text once, in order; the last batch may be smaller."""
    count = (len(tokens) - 1) // context
    for first in range(0, count, rows):
        starts = [context * window for window in range(first, min(first + rows, count))]
        yield _windows(tokens, starts, context)


def feed(
    rows: PackedRows, *, batch_rows: int, seed: int, steps: range, own: Iterable[int] | None = None
) -> Iterator[Batch]:
    """Yields the batch of each of `steps`; threads prefetch them.

    Every epoch reads each row once, in a new order. A batch may span two epochs.

    Args:
      rows: the packed rows to read.
      batch_rows: rows per batch (B).
      seed: seed of the order, from 0.
      steps: numbers of the batches, from 0.
      own: rows of every batch to read, for a process that holds only these; the others are padding.
        None = all.

    Raises:
      ValueError: grain is not installed.
    """
    grain = import_grain()
    # Grain adds the epoch to the seed, so seed 1 would begin with the second epoch of seed 0.
    spread_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    order = grain.MapDataset.range(len(rows)).shuffle(seed=spread_seed).repeat()
    own = list(range(batch_rows) if own is None else own)

    def batch_at(step: int) -> Batch:
        return _batch(rows, {row: order[step * batch_rows + row] for row in own}, batch_rows)

    ahead = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_BATCHES_AHEAD)
    batches = iter(grain.MapDataset.source(steps).map(batch_at).to_iter_dataset(ahead))
    with contextlib.closing(batches):
        yield from batches


def in_order(
    rows: PackedRows, batch_rows: int, own: Iterable[int] | None = None
) -> Iterator[Batch]:
    """Yields every row once, in order; the last batch is padded.

    Args:
      rows: the packed rows to read.
      batch_rows: rows per batch (B).
      own: see `feed`.
    """
    own = list(range(batch_rows) if own is None else own)
    for first in range(0, len(rows), batch_rows):
        places = {row: first + row for row in own if first + row < len(rows)}
        yield _batch(rows, places, batch_rows)


def spread(batch: Batch, layout: Layout, microbatches: int = 1) -> Batch:
    """Partitions a batch over devices, after padding it to a size that divides evenly."""

    def place(x, value):
        axes = ("batch", *[None] * (x.ndim - 2), "length")
        parts = [layout.parts(axis) if axis else 1 for axis in axes]
        parts[0] *= microbatches
        extra = [(0, -size % part) for size, part in zip(x.shape, parts, strict=True)]
        filled = np.pad(x, extra, constant_values=value)
        sharding = layout.sharding(*axes)
        return jax.make_array_from_callback(filled.shape, sharding, lambda index: filled[index])

    return Batch(
        place(batch.tokens, 0),
        place(batch.positions, -1),
        place(batch.targets, IGNORED),
        None if batch.weights is None else place(batch.weights, 0),
    )


def own_rows(layout: Layout, rows: int, microbatches: int = 1) -> list[int]:
    """Returns the rows of a batch that `spread` reads in this process."""
    filled = rows + -rows % (layout.parts("batch") * microbatches)
    parts = layout.sharding("batch").addressable_devices_indices_map((filled,)).values()
    return sorted({row for (part,) in parts for row in range(filled)[part] if row < rows})


@functools.lru_cache(maxsize=2)  # A batch may span two epochs.
def _epoch(epoch: int, count: int, context: int, seed: int) -> tuple[int, np.ndarray]:
    """Draws the offset of an epoch's first window, and the order of its windows."""
    generator = np.random.default_rng((seed, epoch))
    return int(generator.integers(context)), generator.permutation(count)


def _windows(tokens: np.ndarray, starts: Sequence[int], context: int) -> Batch:
    windows = np.stack([tokens[start : start + context + 1] for start in starts]).astype(np.int32)
    positions = np.broadcast_to(np.arange(context, dtype=np.int32), (len(starts), context))
    return Batch(tokens=windows[:, :-1], positions=positions, targets=windows[:, 1:])


def _batch(rows: PackedRows, places: Mapping[int, int], batch_rows: int) -> Batch:
    """Reads a batch; `places` maps its rows to packed rows, and its other rows are padding."""
    batch = padding(row_type(rows.summary.context, rows.summary.pairs), batch_rows)
    for row, place in places.items():
        batch[row] = rows[place]
    return Batch(**{name: np.ascontiguousarray(batch[name]) for name in batch.dtype.names})
