"""Continuous batching without threads: `Scheduler` admits rows to the slots of one running state.

Prompts that wait are read in groups of similar length, in a cache of their own, and inserted where
a slot is free. So a long prompt costs short ones nothing, and memory does not grow with the number
of rows that wait. Several processes must make the same calls.
"""

import collections
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from mistral_jax.engine import prefill
from mistral_jax.engine.admission import Group, Queue, Row
from mistral_jax.engine.completion import Token
from mistral_jax.engine.decode import (
    MOST_STEPS,
    Made,
    State,
    by_heads,
    decode,
    first_step,
    hold,
    shrinks,
    start,
)
from mistral_jax.engine.prefill import Params, Reading, pad_rows, row_count
from mistral_jax.engine.prefixes import Prefixes
from mistral_jax.engine.sampling import DEFAULT, RowSampling
from mistral_jax.engine.slots import empty_state, erase, insert
from mistral_jax.model.cache import Cache
from mistral_jax.model.transformer import Transformer
from mistral_jax.parallel.distributed import from_first
from mistral_jax.parallel.sharding import on_mesh

# Calls that are sent before the tokens of the one before them are read: the device has work while
# the host reads.
_AHEAD = 1


class _Call(NamedTuple):
    """What the device made, or will have: steps at most, and which row has which entry."""

    made: Made
    rows: list[tuple[int, Row]]
    steps: int
    is_loop: bool
    began: float


class Scheduler:
    """Rows that wait, that are read, and that run in a bounded number of slots."""

    def __init__(
        self,
        model: Transformer,
        params: Params,
        slots: int,
        length: int,
        patience: float,
        stall: float | None = None,
        prefixes: Prefixes | None = None,
    ):
        """Makes one without rows; it allocates nothing.

        Args:
          model: the model.
          params: its parameters; the work is spread over the devices that they are spread over.
          slots: most rows that run at a time; filled up to what devices share evenly.
          length: most tokens of a row, prompt and answer together.
          patience: seconds for which readers do not mind to wait for the next tokens.
          stall: seconds for which rows that run may wait while prompts are read: then each turn
            reads one chunk, and all programs are of a closed set, which `warm_up` compiles. None =
            each turn reads as many prompts as there are slots, in the shapes that suit them best.
          prefixes: where to look for what prompts begin with, and to keep what rows hold.
        """
        self._model, self._params = model, params
        count = len(pad_rows(model, params, [None] * row_count(slots), None))
        self._slots: list[Row | None] = [None] * count
        self._length = prefill.slots(model, length)
        self._patience, self._stall = patience, stall
        self._prefixes = prefixes
        self._queue = Queue(model, params, count, self._length, stall is not None, prefixes)
        self._state: State | None = None
        self._group: Group | None = None
        self._calls: collections.deque[_Call] = collections.deque()
        self._ended = np.zeros(count, bool)
        self._limit, self._chunk = 1, 1
        self._clock = 0.0

    def add(self, row: Row) -> None:
        """Has a row wait for its turn."""
        self._queue.add(row)

    def end(self, row: Row, reason: str) -> None:
        """Ends a row before its time, wherever it is."""
        row.finish_reason = reason
        if row in self._slots:
            self._ended[self._leave(row)] = True

    @property
    def busy(self) -> bool:
        """Whether a row waits, is read or runs, or a call has not been looked at."""
        return bool(len(self._queue) or self._group or any(self._slots) or self._calls)

    @property
    def running(self) -> int:
        """The number of rows in slots."""
        return sum(row is not None for row in self._slots)

    def step(self) -> Iterator[tuple[Row, Token | None]]:
        """Takes a turn; yields rows and their tokens as they are made, call by call, by slots.

        A row that ends, but by `end`, is yielded once more with None. The caller may `end` rows
        between two tokens. It asks for all of them.
        """
        if self._stall is not None and (self._group or len(self._queue)):
            yield from self._take()  # A chunk shall not wait for it, nor its tokens for a chunk.
        while self.read():
            yield from self._take()
            if self._stall is not None:
                break
        sent = self._go_on()
        yield from self._take(_AHEAD if sent else 0)

    def read(self) -> bool:
        """Reads prompts that wait, or one chunk; has their rows run where slots are free.

        Returns:
          Whether any row began to run.
        """
        if self._group is None:
            self._group = self._queue.next(self._state is None)
        if self._group is None:
            return False
        if all(row.finish_reason is not None for _, row in self._group.ready):
            self._group = None
            return False
        reading = self._group.reading
        if self._stall is None:
            while reading.rest > 0:
                reading.read()
        elif reading.rest > 0:
            self._read_chunk(reading)
        return reading.rest <= 0 and self._place(self._group)

    def warm_up(self) -> None:
        """Compiles all programs that a closed set has; no row may be in a slot."""
        for count, room in self._queue.shapes():
            for width in prefill.widths(count, self._model.backend):
                prompt = (0,) * width
                reading = Reading(self._model, self._params, [prompt] * count, room)
                reading.read()
            if self._prefixes is not None:
                reading.cache = self._prefixes.warm(reading.cache)
                with on_mesh(self._params):
                    prefill.sound(reading.cache)
            row = Row(prompt, 1, DEFAULT, 0, (), 0)
            self._place(Group([[row]], reading, adopted=False))
            self.end(row, "stop")
        with on_mesh(self._params):
            self._state = erase(self._model, self._state, self._ended)
        self._ended = np.zeros_like(self._ended)
        for slot in range(len(self._slots)):
            self._decode([(slot, row)])
        if self._prefixes is not None:
            cache = self._prefixes.warm(self._state.cache, by_heads=by_heads(self._model))
            self._state = self._state.replace(cache=cache)
        jax.block_until_ready(self._state)
        self._calls.clear()

    def _read_chunk(self, reading: Reading) -> None:
        """Reads a chunk, while nothing runs the widest, else one that takes little time."""
        if not self.running:
            reading.read()
            return
        began = time.perf_counter()
        width = reading.read(self._chunk)
        jax.block_until_ready(reading.logits)
        self._chunk = int(self._stall * width / (time.perf_counter() - began))

    def _place(self, group: Group) -> bool:
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

    def _adopt(self, group: Group) -> None:
        rows = [row for _, row in group.ready]
        group.ready.clear()
        self._slots[: len(rows)] = rows
        cache = hold(self._model, group.reading.cache)
        state = self._fields(rows, len(self._slots), cache)
        self._state, made = first_step(self._model, state, group.reading.logits)
        self._calls.append(_Call(made, list(enumerate(rows)), 1, False, 0.0))

    def _insert(self, row: Row, reading: Reading, number: int) -> None:
        slot = self._slots.index(None)
        self._slots[slot], self._ended[slot] = row, False
        new = self._fields([row], 1, ())
        self._state, made = insert(
            *(self._model, self._state, np.int32(slot), new),
            *(reading.cache, reading.logits, np.int32(number)),
        )
        self._calls.append(_Call(made, [(0, row)], 1, False, 0.0))

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

    def _go_on(self) -> bool:
        """Has the rows that run go on, without waiting for their tokens; says whether any do."""
        rows = [(slot, row) for slot, row in enumerate(self._slots) if row is not None]
        goes_on = any(self._left(row) > 0 for _, row in rows)
        if goes_on:
            self._decode(rows)
        return goes_on

    def _decode(self, rows: list[tuple[int, Row]]) -> None:
        # Where another waits for a slot, it comes in as soon as one is free.
        watched = np.zeros(len(self._slots), bool)
        if len(self._queue) or self._group:
            watched[[slot for slot, _ in rows]] = True
        with on_mesh(self._params):
            if self._ended.any():
                self._state = erase(self._model, self._state, self._ended)
                self._ended = np.zeros_like(self._ended)
            self._state, made = decode(
                *(self._model, self._params, self._state),
                *(np.int32(self._limit), watched, self._count(rows)),
            )
        self._calls.append(_Call(made, rows, self._limit, True, time.perf_counter()))

    def _count(self, rows: list[tuple[int, Row]]) -> int | None:
        """Returns how many of the first slots a call shall run; None = all."""
        if self._stall is None or not shrinks(self._model):
            return None  # A program more would take longer than it saves.
        used = 1 + max((slot for slot, _ in rows), default=0)
        count = 1 << (used - 1).bit_length()
        return count if count < len(self._slots) else None

    def _left(self, row: Row) -> int:
        """Returns how many tokens a row will lack after all calls that are on their way."""
        calls = (call for call in self._calls if any(own is row for _, own in call.rows))
        return row.new_tokens - len(row.tokens) - sum(call.steps for call in calls)

    def _take(self, ahead: int = 0) -> Iterator[tuple[Row, Token | None]]:
        """Yields what the calls made, but for those that are `ahead`."""
        while len(self._calls) > ahead:
            call = self._calls.popleft()
            made = jax.device_get(call.made)
            began, self._clock = max(call.began, self._clock), time.perf_counter()
            self._pace(call, made, self._clock - began)
            for entry, row in call.rows:
                columns = np.flatnonzero(made.tokens[entry] >= 0)
                row.chosen += len(columns)
                for column in columns:
                    if row.finish_reason is None:
                        row.tokens.append(int(made.tokens[entry, column]))
                        yield row, Token.of(made, entry, column, row.top)
                if row.finish_reason is not None:
                    continue
                left = int(made.left[entry])
                if left > 0:
                    continue
                whole = len(row.tokens) == row.new_tokens
                row.chosen += not whole
                row.finish_reason = "error" if left < 0 else "length" if whole else "stop"
                self._leave(row)
                yield row, None

    def _leave(self, row: Row) -> int:
        """Frees the slot of a row, and returns its number."""
        self._keep(row)
        slot = self._slots.index(row)
        self._slots[slot] = None
        return slot

    def _keep(self, row: Row) -> None:
        """Keeps what a row holds for prompts that begin with the same tokens."""
        if self._prefixes is None or not row.chosen or row.finish_reason == "error":
            return
        coming = row.new_tokens - len(row.tokens) - self._left(row)
        self._prefixes.save(
            (),
            # The token that was chosen last has no keys yet.
            [*row.prompt, *row.tokens[: row.chosen - 1]],
            *(self._state.cache, self._slots.index(row)),
            written=len(row.prompt) + row.chosen + coming,
            by_heads=by_heads(self._model),
        )

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
