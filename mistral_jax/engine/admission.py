"""Rows that wait: `Queue` says which prompts are read next, together, and in which shapes."""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from mistral_jax.engine import prefill
from mistral_jax.engine.prefill import Params, Reading, pad_rows, padded, row_count
from mistral_jax.engine.prefixes import Prefixes
from mistral_jax.engine.sampling import Sampling
from mistral_jax.model.transformer import Transformer

# Prompts that are read together where their cache cannot become the state's, and cache slots that
# all of them may have in any case.
_TOGETHER, _SMALL = 8, 2048
# Of a closed set of shapes: tokens of prompts that are read together, at most.
_SHORT = 256


@dataclasses.dataclass(eq=False)
class Row:
    """A row to be generated.

    Attributes:
      prompt: token ids.
      new_tokens: most tokens to add.
      sampling: how to choose them.
      draw: number of the row among those that share its seed.
      stop_ids: tokens that end it.
      top: number of likeliest tokens whose log-probabilities are wanted.
      tokens: ids that its reader has got.
      chosen: tokens that were chosen, those too that end it or that no reader wants.
      finish_reason: as of a `Completion`; None while it goes on.
    """

    prompt: tuple[int, ...]
    new_tokens: int
    sampling: Sampling
    draw: int
    stop_ids: Sequence[int]
    top: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    chosen: int = 0
    finish_reason: str | None = None


class Group:
    """Rows whose prompts are read together.

    Attributes:
      reading: where their prompts are being read.
      adopted: whether the cache in which they are read is to be the state's.
      ready: the rows that do not run yet, each with the number of its prompt.
    """

    def __init__(self, prompts: list[list[Row]], reading: Reading, adopted: bool):
        self.reading, self.adopted = reading, adopted
        self.ready = collections.deque((i, row) for i, rows in enumerate(prompts) for row in rows)


class Queue:
    """Rows that wait to be read, first come, first served.

    A long prompt is read alone, and short ones of similar length together: each pass over the
    weights then serves many tokens, and at most as many places are padding.
    """

    def __init__(
        self,
        model: Transformer,
        params: Params,
        slots: int,
        length: int,
        is_closed: bool,
        prefixes: Prefixes | None,
    ):
        """Makes an empty one.

        Args:
          model: the model.
          params: its parameters.
          slots: rows that may run at a time (B).
          length: tokens that the state's cache has room for.
          is_closed: whether all that is read has one of the few `shapes`.
          prefixes: texts whose keys and values need not be computed again.
        """
        self._model, self._params, self._prefixes = model, params, prefixes
        self._slots, self._length, self._is_closed = slots, length, is_closed
        self._rows: collections.deque[Row] = collections.deque()

    def __len__(self) -> int:
        """Returns how many rows wait."""
        return len(self._rows)

    def add(self, row: Row) -> None:
        """Has a row wait."""
        self._rows.append(row)

    def shapes(self) -> Iterator[tuple[int, int]]:
        """Yields rows and length of all caches that prompts are read in, if these are few."""
        rooms = {self._room(tokens) for tokens in range(1, self._length + 1)}
        alone, together = self._filled(1), self._filled(_TOGETHER)
        for room in sorted(rooms):
            yield alone, room
        if self._together() > 1:
            yield together, self._room(_SHORT)

    def next(self, can_adopt: bool) -> Group | None:
        """Begins to read the prompt that has waited the longest, and others nearly as long.

        Args:
          can_adopt: whether the state has no cache yet: that of a whole batch becomes it.
        """
        everything = self._slots, self._slots * self._length
        prompts = self._alike(*everything) if can_adopt and not self._is_closed else []
        alone = all(len(rows) == 1 for rows in prompts)
        adopted = bool(prompts) and alone and self._filled(len(prompts)) == self._slots
        if not adopted:
            prompts = self._alike(self._together(), max(_SMALL, self._slots * self._length // 2))
        if not prompts:
            self._rows.clear()
            return None
        taken = {row for rows in prompts for row in rows}
        taken |= {row for row in self._rows if row.finish_reason is not None}
        self._rows = collections.deque(row for row in self._rows if row not in taken)
        texts = [rows[0].prompt for rows in prompts]
        length = self._length if adopted else self._room(max(map(len, texts)))
        texts += [()] * (self._filled(len(texts)) - len(texts))
        reading = Reading(self._model, self._params, texts, length, self._prefixes)
        return Group(prompts, reading, adopted)

    def _alike(self, most: int, places: int) -> list[list[Row]]:
        """Returns the rows of the first prompt that waits, and of others nearly as long.

        Args:
          most: prompts, at most.
          places: cache slots that they may have in all, if they are more than one.
        """
        found: dict[Sequence[int], list[Row]] = {}
        least = largest = 0
        waiting = (row for row in self._rows if row.finish_reason is None)
        for row in itertools.islice(waiting, 4 * most):
            if row.prompt in found:
                found[row.prompt].append(row)
                continue
            size = padded(len(row.prompt), self._model.backend)
            low, high = (min(least, size), max(largest, size)) if found else (size, size)
            room = self._filled(len(found) + 1) * self._room(high)
            fits = room <= places and high <= 2 * low
            if self._is_closed:
                fits = high <= _SHORT
            if not found or (len(found) < most and fits):
                found[row.prompt] = [row]
                least, largest = low, high
        if self._is_closed and len(found) < _TOGETHER // 2:
            return list(found.values())[:1]  # Most of the rows would be empty.
        return list(found.values())

    def _together(self) -> int:
        return min(_TOGETHER, self._slots)

    def _room(self, tokens: int) -> int:
        """Returns the room of a cache for prompts of so many tokens."""
        if not self._is_closed:
            return prefill.slots(self._model, tokens)
        return min(prefill.slots(self._model, 1 << (tokens - 1).bit_length()), self._length)

    def _filled(self, rows: int) -> int:
        """Rounds a number of rows up to one of few, which devices share evenly."""
        count = row_count(rows)
        if self._is_closed and rows > 1:
            count = row_count(self._together())
        return len(pad_rows(self._model, self._params, [None] * count, None))
