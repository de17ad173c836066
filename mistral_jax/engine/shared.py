"""Segments of token ids that rows have in common, so that each is read once.

The choices of a question share its text, and the questions of a task share its examples. `plan`
finds such prefixes and returns a tree: a segment is read after its parent, from the parent's cache.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from mistral_jax.engine.prefixes import common

# Minimum number of tokens of a shared segment: the width of the narrowest chunk. Reading fewer
# again costs less than one more call.
LEAST = 16
# Minimum number of tokens that sharing a segment spares. A segment that few rows share makes calls
# of few rows, which are padded.
LEAST_SPARED = 48
# Maximum depth of the tree. The caches of all ancestors of a segment are in memory.
MOST_DEPTH = 4

_ID_BYTES = 4


@dataclasses.dataclass(eq=False)
class Segment:
    """Tokens `start` to `stop` of one row, or of several rows that are equal up to `stop`.

    Attributes:
      row: index of one of the rows.
      start: position of the first token.
      stop: position after the last token.
      reach: number of tokens of the longest input that contains the segment.
      children: the segments that follow this one.
      asked: for each row whose scores depend on this segment: its index, and the first of the
        positions up to `stop` whose next token is to be scored.
    """

    row: int
    start: int
    stop: int
    reach: int
    children: list["Segment"] = dataclasses.field(default_factory=list)
    asked: list[tuple[int, int]] = dataclasses.field(default_factory=list)


def plan(rows: Sequence[Sequence[int]], given: Sequence[int]) -> list[Segment]:
    """Divides rows into segments, of which those that rows have in common appear once.

    The last token of a row is not read, because no score depends on it.

    Args:
      rows: token ids.
      given: for each row, the number of tokens at its beginning that are not scored; at least 1.

    Returns:
      The segments that begin at position 0.
    """
    inputs = [np.asarray(row[:-1], ">i4").tobytes() for row in rows]
    alike: dict[bytes, list[int]] = {}
    for index, text in enumerate(inputs):
        if text:
            alike.setdefault(text, []).append(index)
    # Rows with a common prefix are neighbors in the order of their bytes.
    texts = sorted(alike)
    lengths = [len(text) // _ID_BYTES for text in texts]
    shared = np.array([common(*pair) for pair in itertools.pairwise(texts)], np.int64)
    roots: list[Segment] = []
    # Ranges of texts that are alike up to a position, and the segments up to there.
    waiting = [(0, len(texts), 0, ())] if texts else []

    def divide(first, last, cuts, start, path):
        bounds = [first, *cuts, last]
        waiting.extend((*part, start, path) for part in itertools.pairwise(bounds))

    while waiting:
        first, last, start, path = waiting.pop()
        inner = shared[first : last - 1]
        stop = int(inner.min(initial=lengths[first]))
        cuts = first + 1 + np.flatnonzero(inner == stop)
        if last - first > 1 and len(path) == MOST_DEPTH - 1:
            divide(first, last, range(first + 1, last), start, path)
            continue
        spared = (last - first - 1) * (stop - start)
        if last - first > 1 and (stop - start < LEAST or spared < LEAST_SPARED):
            divide(first, last, cuts.tolist(), start, path)
            continue
        owners = alike[texts[first]]
        segment = Segment(owners[0], start, stop, max(lengths[first:last]))
        (path[-1].children if path else roots).append(segment)
        path = *path, segment
        if lengths[first] == stop:
            _ask(path, owners, given)
            first, cuts = first + 1, cuts[1:]
        if first < last:
            divide(first, last, cuts.tolist(), stop, path)
    return roots


def _ask(path: Sequence[Segment], owners: Sequence[int], given: Sequence[int]) -> None:
    """Adds rows to the segments of their path that have positions to be scored."""
    for row in owners:
        for segment in reversed(path):
            if segment.stop < given[row]:
                break
            segment.asked.append((row, max(given[row] - 1, segment.start)))
