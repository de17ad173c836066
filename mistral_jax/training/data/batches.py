"""Batches: of the windows of one long text, or of packed rows; and their places on devices.

A batch is a pure function of the data, the seed and the step: a run that goes on sees what it would
have seen, and any number of processes sees the same.
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


def windows_in_order(tokens: np.ndarray, *, context: int, rows: int) -> Iterator[Batch]:
    """Yields every whole window of a text once, in order; the last batch may have fewer rows."""
    count = (len(tokens) - 1) // context
    for first in range(0, count, rows):
        starts = [context * window for window in range(first, min(first + rows, count))]
        yield _windows(tokens, starts, context)


def feed(
    rows: PackedRows, *, batch_rows: int, seed: int, steps: range, own: Iterable[int] | None = None
) -> Iterator[Batch]:
    """Yields the batch of each of `steps`, read ahead by threads.

    Every epoch has each row once, in another order; a batch may lie in two epochs.

    Args:
      rows: what to read.
      batch_rows: rows a batch (B).
      seed: of the order, from 0 on.
      steps: which batches, from 0 on.
      own: which rows of every batch to read, for a process that holds no others; these are
        padding then. None = all.

    Raises:
      ValueError: grain is not installed.
    """
    grain = import_grain()
    # Grain adds the epoch to a seed: without this, seed 1 would begin with seed 0's second epoch.
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
    """Yields every row once, in order; the last batch is filled up with rows of padding.

    Args:
      rows: what to read.
      batch_rows: rows a batch (B).
      own: see `feed`.
    """
    own = list(range(batch_rows) if own is None else own)
    for first in range(0, len(rows), batch_rows):
        places = {row: first + row for row in own if first + row < len(rows)}
        yield _batch(rows, places, batch_rows)


def spread(batch: Batch, layout: Layout, microbatches: int = 1) -> Batch:
    """Lays a batch over devices, filled up with padding to what they share evenly."""

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
    """Returns which rows of a batch lie on devices of this process: `spread` looks at no others."""
    filled = rows + -rows % (layout.parts("batch") * microbatches)
    parts = layout.sharding("batch").addressable_devices_indices_map((filled,)).values()
    return sorted({row for (part,) in parts for row in range(filled)[part] if row < rows})


@functools.lru_cache(maxsize=2)  # The rows of one step may lie in two epochs.
def _epoch(epoch: int, count: int, context: int, seed: int) -> tuple[int, np.ndarray]:
    """Draws where an epoch's first window begins, and the order of its windows."""
    generator = np.random.default_rng((seed, epoch))
    return int(generator.integers(context)), generator.permutation(count)


def _windows(tokens: np.ndarray, starts: Sequence[int], context: int) -> Batch:
    windows = np.stack([tokens[start : start + context + 1] for start in starts]).astype(np.int32)
    positions = np.broadcast_to(np.arange(context, dtype=np.int32), (len(starts), context))
    return Batch(tokens=windows[:, :-1], positions=positions, targets=windows[:, 1:])


def _batch(rows: PackedRows, places: Mapping[int, int], batch_rows: int) -> Batch:
    """Reads a batch; `places` says which of its rows are which of the file's."""
    batch = padding(row_type(rows.summary.context, rows.summary.pairs), batch_rows)
    for row, place in places.items():
        batch[row] = rows[place]
    return Batch(**{name: np.ascontiguousarray(batch[name]) for name in batch.dtype.names})
