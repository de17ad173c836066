"""Admission: a `Queue` of waiting rows decides which prompts are read together, in which shapes."""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from mistral_jax.engine import prefill
from mistral_jax.engine.grammar import Matcher
from mistral_jax.engine.prefill import Params, Reading, pad_rows, padded, row_count
from mistral_jax.engine.prefixes import Prefixes
from mistral_jax.engine.sampling import Sampling
from mistral_jax.model.transformer import Transformer

# Maximum number of prompts that are read together in a cache that does not become the state's, and
# the number of cache slots that they may always have in all.
_TOGETHER, _SMALL = 8, 2048
# With a closed set of shapes: maximum number of tokens of a prompt that is read with others.
_SHORT = 256


@dataclasses.dataclass(eq=False)
class Row:
    """A row to be generated.

    Attributes:
      prompt: token ids.
      new_tokens: maximum number of tokens to add.
      sampling: how to choose the tokens.
      draw: index of the row among the rows that share its seed.
      stop_ids: tokens that end the row.
      top: number of likeliest tokens to report at each position.
      owner: whose row it is; owners take turns.
      matcher: the grammar of the answer; None = any tokens.
      tokens: ids of the tokens that were passed to the row's reader.
      chosen: number of tokens chosen on the device, including a stop token and tokens that came
        after the row was ended.
      cached: number of tokens of the prompt that were restored instead of read.
      finish_reason: see `Completion`; None while the row is not finished.
      problem: why the row failed by itself; None = it did not.
    """

    prompt: tuple[int, ...]
    new_tokens: int
    sampling: Sampling
    draw: int
    stop_ids: Sequence[int]
    top: int
    owner: str = ""
    matcher: Matcher | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    chosen: int = 0
    cached: int = 0
    problem: str | None = None
    finish_reason: str | None = None


class Group:
    """Rows whose prompts are read together.

    Attributes:
      reading: the reading of their prompts.
      adopted: whether the cache of the reading becomes the state's cache.
      ready: rows that are not in a slot yet, each with the index of its prompt.
    """

    def __init__(self, prompts: list[list[Row]], reading: Reading, adopted: bool):
        self.reading, self.adopted = reading, adopted
        self.ready = collections.deque((i, row) for i, rows in enumerate(prompts) for row in rows)


class Queue:
    """A queue of rows whose prompts have not been read yet.

    Owners take turns, and the rows of one are served in the order in which they came. A long prompt
    is read alone; short prompts of similar length are read together, so that one pass over the
    weights serves many tokens. At most about half of a group's positions are padding.
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
        """Makes an empty queue.

        Args:
          model: the model.
          params: its parameters.
          slots: number of slots of the state (B).
          length: cache slots of a row of the state (S).
          is_closed: whether every group has one of the few `shapes`.
          prefixes: store of keys and values of earlier texts; None = every prompt is read whole.
        """
        self._model, self._params, self._prefixes = model, params, prefixes
        self._slots, self._length, self._is_closed = slots, length, is_closed
        # The rows of each owner; the owner whose turn it is comes first.
        self._rows: dict[str, collections.deque[Row]] = {}

    def __len__(self) -> int:
        """Returns the number of waiting rows."""
        return sum(map(len, self._rows.values()))

    def add(self, row: Row) -> None:
        """Appends a row to the queue."""
        self._rows.setdefault(row.owner, collections.deque()).append(row)

    def shapes(self) -> Iterator[tuple[int, int]]:
        """Yields rows and cache slots of all caches in which prompts are read, for a closed set."""
        rooms = {self._room(tokens) for tokens in range(1, self._length + 1)}
        alone, together = self._filled(1), self._filled(_TOGETHER)
        for room in sorted(rooms):
            yield alone, room
        if self._together() > 1:
            yield together, self._room(_SHORT)

    def next(self, can_adopt: bool) -> Group | None:
        """Begins to read the prompt that has waited longest, with others of similar length.

        Args:
          can_adopt: whether the state has no cache yet, so that the cache of a group that fills all
            slots can become the state's.

        Returns:
          The group, of which no chunk has been read; None if no row waits.
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
        self._remove({row for rows in prompts for row in rows})
        texts = [rows[0].prompt for rows in prompts]
        length = self._length if adopted else self._room(max(map(len, texts)))
        texts += [()] * (self._filled(len(texts)) - len(texts))
        reading = Reading(self._model, self._params, texts, length, self._prefixes)
        return Group(prompts, reading, adopted)

    def _alike(self, most: int, places: int) -> list[list[Row]]:
        """Returns the rows of the first waiting prompt, and those of prompts of similar length.

        Rows with equal prompts are together, because their prompt is read once.

        Args:
          most: maximum number of prompts.
          places: maximum number of cache slots of all prompts, if there are several.
        """
        found: dict[Sequence[int], list[Row]] = {}
        least = largest = 0
        for row in itertools.islice(self._waiting(), 4 * most):
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
            return list(found.values())[:1]  # Most rows of the padded batch would be empty.
        return list(found.values())

    def _waiting(self) -> Iterator[Row]:
        """Yields the rows that wait, one of each owner in turns."""
        for turn in itertools.zip_longest(*self._rows.values()):
            yield from (row for row in turn if row is not None and row.finish_reason is None)

    def _remove(self, taken: set[Row]) -> None:
        """Removes rows that are read now or have ended; their owners have had their turn."""
        served, rows = {row.owner for row in taken}, self._rows
        left = {
            owner: [row for row in own if row not in taken and row.finish_reason is None]
            for owner, own in rows.items()
        }
        order = sorted(left, key=served.__contains__)
        self._rows = {owner: collections.deque(left[owner]) for owner in order if left[owner]}

    def _together(self) -> int:
        return min(_TOGETHER, self._slots)

    def _room(self, tokens: int) -> int:
        """Returns the cache slots of a row for prompts of `tokens` tokens."""
        if not self._is_closed:
            return prefill.slots(self._model, tokens)
        return min(prefill.slots(self._model, 1 << (tokens - 1).bit_length()), self._length)

    def _filled(self, rows: int) -> int:
        """Rounds a number of rows up to a bucket that divides evenly over the devices."""
        count = row_count(rows)
        if self._is_closed and rows > 1:
            count = row_count(self._together())
        return len(pad_rows(self._model, self._params, [None] * count, None))
