"""Continuous batching without threads: `Scheduler` admits rows to the slots of one running state.

Prompts that wait are read in groups of similar length, in a cache of their own, and inserted where
a slot is free. So a long prompt costs short ones nothing, and memory does not grow with the number
of rows that wait. Several processes must make the same calls.
"""

import collections
import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from mistral_jax.engine import prefill
from mistral_jax.engine.completion import Token
from mistral_jax.engine.decode import MOST_STEPS, Made, State, decode, first_step, start
from mistral_jax.engine.prefill import Params, Reading, pad_rows, padded, row_count
from mistral_jax.engine.sampling import DEFAULT, RowSampling, Sampling
from mistral_jax.engine.slots import empty_state, erase, insert
from mistral_jax.model.cache import Cache
from mistral_jax.model.transformer import Transformer
from mistral_jax.parallel.distributed import from_first
from mistral_jax.parallel.sharding import on_mesh

# Prompts that are read together where their cache cannot become the state's, and cache slots that
# all of them may have in any case.
_TOGETHER, _SMALL = 8, 2048


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
      made: tokens that its reader has got.
      finish_reason: as of a `Completion`; None while it goes on.
    """

    prompt: tuple[int, ...]
    new_tokens: int
    sampling: Sampling
    draw: int
    stop_ids: Sequence[int]
    top: int
    made: int = 0
    finish_reason: str | None = None


class _Call(NamedTuple):
    """What the device made, or will have: steps at most, and which row has which entry."""

    made: Made
    rows: list[tuple[int, Row]]
    steps: int
    is_loop: bool


class _Group:
    """Rows whose prompts are read together.

    Attributes:
      reading: where their prompts are being read.
      adopted: whether the cache in which they are read is to be the state's.
      ready: the rows that do not run yet, each with the number of its prompt.
    """

    def __init__(self, prompts: list[list[Row]], reading: Reading, adopted: bool):
        self.reading, self.adopted = reading, adopted
        self.ready = collections.deque((i, row) for i, rows in enumerate(prompts) for row in rows)


class Scheduler:
    """Rows that wait, that are read, and that run in a bounded number of slots."""

    def __init__(
        self, model: Transformer, params: Params, slots: int, length: int, patience: float
    ):
        """Makes one without rows; it allocates nothing.

        Args:
          model: the model.
          params: its parameters; the work is spread over the devices that they are spread over.
          slots: most rows that run at a time; filled up to what devices share evenly.
          length: most tokens of a row, prompt and answer together.
          patience: seconds for which readers do not mind to wait for the next tokens.
        """
        self._model, self._params = model, params
        self._slots: list[Row | None] = [None] * self._filled(slots)
        self._length = prefill.slots(model, length)
        self._patience = patience
        self._state: State | None = None
        self._waiting: collections.deque[Row] = collections.deque()
        self._group: _Group | None = None
        self._calls: collections.deque[_Call] = collections.deque()
        self._ended = np.zeros(len(self._slots), bool)
        self._limit = 1
        self._clock = 0.0

    def add(self, row: Row) -> None:
        """Has a row wait for its turn."""
        self._waiting.append(row)

    def end(self, row: Row, reason: str) -> None:
        """Ends a row before its time, wherever it is."""
        row.finish_reason = reason
        if row in self._slots:
            slot = self._slots.index(row)
            self._slots[slot] = None
            self._ended[slot] = True

    @property
    def busy(self) -> bool:
        """Whether a row waits, is read or runs, or a call has not been looked at."""
        return bool(self._waiting or self._group or any(self._slots) or self._calls)

    def step(self) -> Iterator[tuple[Row, Token]]:
        """Takes a turn; yields rows and their tokens as they are made, call by call, by slots.

        The caller may `end` rows between two tokens. It asks for all of them.
        """
        while self.read():
            yield from self._take()
        self._decode()
        yield from self._take()

    def read(self) -> bool:
        """Reads prompts that wait, and has their rows run where slots are free.

        Returns:
          Whether any row began to run.
        """
        if self._group is None:
            self._group = self._next_group()
        if self._group is None:
            return False
        while not self._group.reading.done:
            self._group.reading.read()
        return self._place(self._group)

    def _next_group(self) -> _Group | None:
        """Begins to read the prompt that has waited the longest, and others nearly as long."""
        count, length = len(self._slots), self._length
        prompts = self._alike(count, count * length)
        if not prompts:
            self._waiting.clear()
            return None
        alone = all(len(rows) == 1 for rows in prompts)
        # The cache of a whole batch becomes the state's as it is.
        adopted = self._state is None and alone and self._filled(len(prompts)) == count
        if not adopted:
            prompts = self._alike(min(_TOGETHER, count), max(_SMALL, count * length // 2))
            length = prefill.slots(self._model, max(len(rows[0].prompt) for rows in prompts))
        chosen = {row for rows in prompts for row in rows}
        self._waiting = collections.deque(row for row in self._waiting if row not in chosen)
        texts = [rows[0].prompt for rows in prompts]
        texts += [()] * (self._filled(len(texts)) - len(texts))
        return _Group(prompts, Reading(self._model, self._params, texts, length), adopted)

    def _alike(self, most: int, places: int) -> list[list[Row]]:
        """Returns the rows of the first prompt that waits, and of others nearly as long.

        Args:
          most: prompts, at most.
          places: cache slots that they may have in all, if they are more than one.
        """
        found: dict[Sequence[int], list[Row]] = {}
        least = largest = 0
        waiting = (row for row in self._waiting if row.finish_reason is None)
        for row in itertools.islice(waiting, 4 * most):
            if row.prompt in found:
                found[row.prompt].append(row)
                continue
            size = padded(len(row.prompt))
            low, high = (min(least, size), max(largest, size)) if found else (size, size)
            room = self._filled(len(found) + 1) * prefill.slots(self._model, high)
            if not found or (len(found) < most and room <= places and high <= 2 * low):
                found[row.prompt] = [row]
                least, largest = low, high
        return list(found.values())

    def _place(self, group: _Group) -> bool:
        """Has rows whose prompts have been read run, where slots are free."""
        placed = False
        with on_mesh(self._params):
            if group.adopted:
                self._adopt(group)
                placed = True
            elif self._state is None:
                size = len(self._slots), self._length
                self._state = empty_state(self._model, self._params, *size)
            while group.ready and None in self._slots:
                number, row = group.ready.popleft()
                if row.finish_reason is None:
                    self._insert(row, group.reading, number)
                    placed = True
        if not group.ready:
            self._group = None
        return placed

    def _adopt(self, group: _Group) -> None:
        rows = [row for _, row in group.ready]
        group.ready.clear()
        self._slots[: len(rows)] = rows
        state = self._fields(rows, len(self._slots), group.reading.cache)
        self._state, made = first_step(self._model, state, group.reading.logits)
        self._calls.append(_Call(made, list(enumerate(rows)), 1, False))

    def _insert(self, row: Row, reading: Reading, number: int) -> None:
        slot = self._slots.index(None)
        self._slots[slot], self._ended[slot] = row, False
        new = self._fields([row], 1, ())
        self._state, made = insert(
            *(self._model, self._state, np.int32(slot), new),
            *(reading.cache, reading.logits, np.int32(number)),
        )
        self._calls.append(_Call(made, [(0, row)], 1, False))

    def _fields(self, rows: Sequence[Row], count: int, cache: Cache) -> State:
        """Returns the state of rows none of whose tokens is chosen, filled up with empty ones."""
        rows = [*rows, *[Row((), 0, DEFAULT, 0, (), 0)] * (count - len(rows))]
        prompts, size = [row.prompt for row in rows], self._model.config.vocab_size
        samplings, draws = [row.sampling for row in rows], [row.draw for row in rows]
        return start(
            cache,
            [len(prompt) for prompt in prompts],
            [row.new_tokens for row in rows],
            RowSampling.stack(samplings, draws, prompts, size),
            [row.stop_ids for row in rows],
            [row.top > 0 for row in rows],
            size,
        )

    def _decode(self) -> None:
        """Has the rows that run go on, without waiting for their tokens."""
        rows = [(slot, row) for slot, row in enumerate(self._slots) if row is not None]
        if not any(row.made + self._coming(row) < row.new_tokens for _, row in rows):
            return
        # Where another waits for a slot, it comes in as soon as one is free.
        least = len(rows) if self._waiting or self._group else 1
        with on_mesh(self._params):
            if self._ended.any():
                self._state = erase(self._model, self._state, self._ended)
                self._ended = np.zeros_like(self._ended)
            bounds = np.int32(self._limit), np.int32(least)
            self._state, made = decode(self._model, self._params, self._state, *bounds)
        self._calls.append(_Call(made, rows, self._limit, True))

    def _coming(self, row: Row) -> int:
        """Returns how many tokens calls that have not been looked at may bring a row."""
        return sum(call.steps for call in self._calls if any(own is row for _, own in call.rows))

    def _take(self) -> Iterator[tuple[Row, Token]]:
        """Yields what the calls made."""
        while self._calls:
            began = time.perf_counter()
            call = self._calls.popleft()
            made = jax.device_get(call.made)
            self._pace(call, made, time.perf_counter() - began)
            for entry, row in call.rows:
                for column in np.flatnonzero(made.tokens[entry] >= 0):
                    if row.finish_reason is None:
                        row.made += 1
                        yield row, Token.of(made, entry, column, row.top)
                if row.finish_reason is None and made.left[entry] <= 0:
                    whole = row.made == row.new_tokens
                    failed = made.left[entry] < 0
                    row.finish_reason = "error" if failed else "length" if whole else "stop"
                    self._slots[self._slots.index(row)] = None

    def _pace(self, call: _Call, made: Made, seconds: float) -> None:
        """Has later calls take more steps, if readers do not mind to wait for so many."""
        if (
            not call.is_loop
            or call.steps < self._limit
            or (made.tokens[:, call.steps - 1] < 0).all()
        ):
            return

        def paced():
            return min(2 * self._limit, MOST_STEPS) if seconds < self._patience else self._limit

        # By one clock: of two processes that take different numbers of steps, one waits forever.
        self._limit = from_first(paced)

    def _filled(self, rows: int) -> int:
        """Rounds a number of rows up to one of few, which devices share evenly."""
        return len(pad_rows(self._model, self._params, [None] * row_count(rows), None))
