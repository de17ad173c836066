"""Packed rows: as many examples in each row as fit, written to a file and read from it."""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from mistral_jax.base.fields import boolean, build, check_table, integer
from mistral_jax.base.files import check_regular, read_json
from mistral_jax.checkpoint.folder import whole
from mistral_jax.training.data.records import Example, Pair

_PLACE = np.dtype([("tokens", "<i4"), ("targets", "<i4"), ("weights", "<f4")])
_PACKED_AT_A_TIME = 1 << 21  # tokens, about 40 MB
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
    """Statistics of packing examples into rows.

    Attributes:
      context: tokens per row (T).
      pairs: whether a row is a pair of 2 T tokens, the chosen example first.
      examples: number of examples, or of pairs.
      too_long: number of examples that did not fit into a row.
      left_out: number of examples whose part that fits has nothing to learn.
      rows: number of rows.
      tokens: number of tokens in all rows, without padding.
      learnt: number of targets that are learnt, with any weight.
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
        """The share of the rows that is not padding, from 0 to 1."""
        return self.tokens / (self.rows * self.context * (1 + self.pairs))


class PackedRows(Sequence[np.ndarray]):
    """The packed rows in a folder, read from disk on access.

    A row is a record of "tokens", "positions", "targets" and "weights", each [T], or [2, T] for
    pairs; `Batch` describes them.

    Attributes:
      summary: statistics of the rows.
    """

    def __init__(self, folder: Path | str):
        """Opens a folder that `write_rows` made; a ValueError names a damaged file."""
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


def write_rows(
    target: Path | str,
    examples: Iterable[Example | Pair],
    context: int,
    *,
    pairs: bool = False,
    pack: bool = True,
    seed: int = 0,
) -> Summary:
    """Packs examples into rows and writes them to a folder; memory does not grow with their number.

    An example of n + 1 tokens takes n places of a row, each with the next token as its target. A
    text that is longer than a row is cut into pieces that each begin at position 0, so that all
    of it is learnt; any other long example loses its end.

    Args:
      target: folder to create.
      examples: examples or pairs from `records.read`.
      context: tokens per row (T).
      pairs: whether the examples are pairs, each of which fills a row of its own.
      pack: whether a row holds as many examples as fit, instead of one.
      seed: seed of the order in which examples are packed.

    Returns:
      The statistics, which are kept in the folder too.

    Raises:
      ValueError: nothing is to be learnt, the folder exists, or grain is not installed.
    """
    summary = Summary(context, pairs)
    fitted = _fitted(examples, summary)
    with whole(target) as part:
        with (part / "rows.bin").open("wb") as file, contextlib.ExitStack() as stack:
            if pack and not pairs:
                spool = stack.enter_context(tempfile.TemporaryDirectory(dir=part))
                rows = _pack(_Spool(Path(spool), (text for (text,) in fitted)), context, seed)
            else:
                rows = (_lay(texts, context, pairs) for texts in fitted)
            for row in rows:
                file.write(row.tobytes())
                summary.rows += 1
                summary.tokens += int((row["positions"] >= 0).sum())
                summary.learnt += int((row["targets"] >= 0).sum())
        if not summary.examples:
            raise ValueError("there are no examples; expected at least one record in the files")
        if not summary.rows:
            raise ValueError(
                f"{summary.examples} examples have nothing to be learnt in their first {context} "
                "tokens: add others, or make the context longer"
            )
        notes = json.dumps(dataclasses.asdict(summary), indent=2)
        (part / "rows.json").write_text(notes + "\n", encoding="utf-8")
    return summary


def _fitted(
    examples: Iterable[Example | Pair], summary: Summary
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields texts that fit into a row: an example, a piece of one, or the two of a pair."""
    for example in examples:
        sides = [example] if isinstance(example, Example) else [example.chosen, example.rejected]
        texts = [_places(side) for side in sides]
        summary.examples += 1
        summary.too_long += any(len(text) > summary.context for text in texts)
        if not summary.pairs and texts[0]["weights"].all():
            starts = range(0, len(texts[0]), summary.context)
            found = [(texts[0][start : start + summary.context],) for start in starts]
        else:
            found = [tuple(text[: summary.context] for text in texts)]
            if not all(text["weights"].any() for text in found[0]):
                found = []
        summary.left_out += not found
        yield from found


def _places(example: Example) -> np.ndarray:
    places = np.empty(len(example.tokens) - 1, _PLACE)
    places["tokens"], places["weights"] = example.tokens[:-1], example.weights[1:]
    places["targets"] = np.where(places["weights"] > 0, example.tokens[1:], -1)
    return places


def _lay(texts: Sequence[np.ndarray], context: int, pairs: bool) -> np.ndarray:
    """Writes one text into a row, or two texts into the row of a pair."""
    (row,) = padding(row_type(context, pairs), 1)
    for side, text in enumerate(texts):
        for name in _PLACE.names:
            np.atleast_2d(row[name])[side, : len(text)] = text[name]
        np.atleast_2d(row["positions"])[side, : len(text)] = np.arange(len(text))
    return row


class _Spool(Sequence[dict[str, np.ndarray]]):
    """Texts in a file, written in the order in which they arrive, and read in any order."""

    def __init__(self, folder: Path, texts: Iterable[np.ndarray]):
        ends = 0
        with (folder / "places").open("wb") as places, (folder / "ends").open("wb") as bounds:
            bounds.write(np.int64(0).tobytes())
            for text in texts:
                ends += len(text)
                places.write(text.tobytes())
                bounds.write(np.int64(ends).tobytes())
        self._ends = np.memmap(folder / "ends", np.int64, mode="r")
        self._places = np.memmap(folder / "places", _PLACE, mode="r") if ends else None

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"text": self._places[self._ends[index] : self._ends[index + 1]]}


def _pack(spool: _Spool, context: int, seed: int) -> Iterator[np.ndarray]:
    """Packs texts into rows by first fit, in a random order."""
    if not spool:
        return
    grain = import_grain()
    packed = grain.experimental.FirstFitPackIterDataset(
        grain.MapDataset.source(spool).shuffle(seed=seed).to_iter_dataset(),
        length_struct={"text": context},
        num_packing_bins=min(max(_PACKED_AT_A_TIME // context, 16), 512),
        shuffle_bins=False,
    )
    for found in packed:
        (row,) = padding(row_type(context, pairs=False), 1)
        used = found["text_segment_ids"] > 0
        row["positions"][used] = found["text_positions"][used]
        for name in _PLACE.names:
            row[name][used] = found["text"][name][used]
        yield row


def row_type(context: int, pairs: bool) -> np.dtype:
    """Returns the dtype of a row in the file; its fields are named as those of `Batch`."""
    shape = (2, context) if pairs else (context,)
    kinds = {"tokens": "<i4", "positions": "<i4", "targets": "<i4", "weights": "<f4"}
    return np.dtype([(name, kind, shape) for name, kind in kinds.items()])


def padding(dtype: np.dtype, count: int) -> np.ndarray:
    """Returns rows that hold padding only."""
    rows = np.zeros(count, dtype)
    rows["positions"] = rows["targets"] = -1
    return rows


def import_grain() -> ModuleType:
    """Returns the optional module grain; a ValueError says how to install it."""
    try:
        import grain
    except ImportError:
        raise ValueError(
            "grain is needed to pack and shuffle the data: pip install 'mistral-jax-flax[train]'"
        ) from None
    return grain
