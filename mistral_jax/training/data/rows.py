"""A row: texts side by side in a file, and the batch of every step. It makes no rows of its own.

Batches are a pure function of the rows, the seed and the step: a run that goes on sees what it
would have seen, and any number of processes sees the same.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from mistral_jax.base.fields import boolean, build, check_table, integer
from mistral_jax.base.files import check_regular, read_json
from mistral_jax.training.step import Batch

_THREADS, _BATCHES_AHEAD = 2, 4
_COUNT = integer(0, 1 << 40)
SUMMARY_RULES = {
    "context": integer(1, 1 << 20),
    "pairs": boolean(),
    "examples": _COUNT,
    "too_long": _COUNT,
    "left_out": _COUNT,
    "rows": integer(1, 1 << 40),
    "tokens": _COUNT,
    "learnt": _COUNT,
}


@dataclasses.dataclass
class Summary:
    """What became of examples.

    Attributes:
      context: places a row (T).
      pairs: whether a row is a pair: two times T places, the chosen example's first.
      examples: number of examples, or of pairs.
      too_long: how many of them did not fit into a row.
      left_out: how many had nothing to be learnt in what fits.
      rows: number of rows.
      tokens: number of places that hold a token.
      learnt: number of places whose target is learnt, with whatever weight.
    """

    context: int
    pairs: bool
    examples: int = 0
    too_long: int = 0
    left_out: int = 0
    rows: int = 0
    tokens: int = 0
    learnt: int = 0

    @property
    def fill(self) -> float:
        """The share of all places that hold a token, from 0 to 1."""
        return self.tokens / (self.rows * self.context * (1 + self.pairs))


class Rows(Sequence[np.ndarray]):
    """Rows in a folder, read when they are asked for.

    A row is a record of "tokens", "positions", "targets" and "weights", each [T], or [2, T] for
    pairs; see `Batch` for what they mean.

    Attributes:
      summary: what they were made of.
    """

    def __init__(self, folder: Path | str):
        """Opens the folder that `write_rows` made; a ValueError names the file that is damaged."""
        notes, file = Path(folder) / "rows.json", Path(folder) / "rows.bin"
        table = dict.fromkeys(SUMMARY_RULES) | read_json(notes)
        check_table(table, SUMMARY_RULES, str(notes))
        self.summary = build(Summary, table, str(notes))
        dtype = row_type(self.summary.context, self.summary.pairs)
        size = self.summary.rows * dtype.itemsize
        check_regular(file, size)
        if file.stat().st_size != size:
            raise ValueError(f"{file} has {file.stat().st_size} bytes; expected {size}")
        self._rows = np.memmap(file, dtype, mode="r")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._rows[index]


def feed(
    rows: Rows, *, batch_rows: int, seed: int, steps: range, own: Iterable[int] | None = None
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


def in_order(rows: Rows, batch_rows: int, own: Iterable[int] | None = None) -> Iterator[Batch]:
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


def _batch(rows: Rows, places: Mapping[int, int], batch_rows: int) -> Batch:
    """Reads a batch; `places` says which of its rows are which of the file's."""
    batch = padding(row_type(rows.summary.context, rows.summary.pairs), batch_rows)
    for row, place in places.items():
        batch[row] = rows[place]
    return Batch(**{name: np.ascontiguousarray(batch[name]) for name in batch.dtype.names})


def row_type(context: int, pairs: bool) -> np.dtype:
    """Returns the type of a row in the file; the names are those of `Batch`."""
    shape = (2, context) if pairs else (context,)
    kinds = {"tokens": "<i4", "positions": "<i4", "targets": "<i4", "weights": "<f4"}
    return np.dtype([(name, kind, shape) for name, kind in kinds.items()])


def padding(dtype: np.dtype, count: int) -> np.ndarray:
    """Returns rows in which no place holds a token."""
    rows = np.zeros(count, dtype)
    rows["positions"] = rows["targets"] = -1
    return rows


def import_grain() -> ModuleType:
    """Returns grain, which is an extra; a ValueError says how to install it."""
    try:
        import grain
    except ImportError:
        raise ValueError(
            "the data are packed and shuffled by grain: pip install 'mistral-jax-flax[train]'"
        ) from None
    return grain
