"""Continuous batching without threads: `Scheduler` runs rows in the slots of one state.

Waiting prompts are read in groups of similar length, in a cache of their own, and inserted into
free slots. So short prompts are not padded to the length of a long one, and memory does not grow
with the number of waiting rows. In a run of several processes, all must make the same calls.
"""

import collections
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mistral_jax.engine import prefill
from mistral_jax.engine.admission import Group, Queue, Row
from mistral_jax.engine.completion import Token
from mistral_jax.engine.decode import (
    MOST_STEPS,
    Made,
    State,
    choose_masked,
    decode,
    first_step,
    forward,
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

# Number of calls that are dispatched before the host reads the tokens of an earlier call, so that
# the device has work meanwhile.
_AHEAD = 1


class _Call(NamedTuple):
    """A call that was dispatched to the device, whose tokens the host has not read yet.

    Attributes:
      made: its output, perhaps still being computed.
      rows: the rows that it runs, each with its index in `made`.
      steps: maximum number of steps.
      is_loop: whether it is a call of `decode`, not the choice of a first token.
      began: time of dispatch, by `time.perf_counter`; 0 if it is not a loop.
    """

    made: Made
    rows: list[tuple[int, Row]]
    steps: int
    is_loop: bool
    began: float


class Scheduler:
    """Reads the prompts of waiting rows, and runs the rows in a bounded number of slots."""

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
        """Makes a scheduler without rows; it allocates no device memory.

        Args:
          model: the model.
          params: its parameters; the work runs on the devices that hold them.
          slots: number of rows that run at a time, rounded up to a bucket that divides evenly over
            the devices.
          length: maximum number of tokens of a row, prompt and answer together.
          patience: target for the seconds between two reads of tokens by the host.
          stall: target for the seconds that running rows wait while a chunk of a prompt is read;
            each turn then reads one chunk, and all programs belong to a closed set, which `warm_up`
            compiles. None = each turn reads prompts until no slot is free, in the shapes that suit
            them best.
          prefixes: store of keys and values of earlier texts, to restore from and to save to; None
            = every prompt is read whole.
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
        """Appends a row to the waiting rows."""
        self._queue.add(row)

    def end(self, row: Row, reason: str) -> None:
        """Ends a row early, whether it waits or runs."""
        row.finish_reason = reason
        if row in self._slots:
            self._ended[self._leave(row)] = True

    @property
    def busy(self) -> bool:
        """Whether any row waits, is being read or runs, or the tokens of a call are unread."""
        return bool(len(self._queue) or self._group or any(self._slots) or self._calls)

    @property
    def running(self) -> int:
        """Number of rows in slots."""
        return sum(row is not None for row in self._slots)

    def step(self) -> Iterator[tuple[Row, Token | None]]:
        """Takes a turn; yields pairs of a row and its next token, call by call and slot by slot.

        A row that ends by itself is yielded once more, with None; a row that `end` ended is not.
        The caller may `end` rows between two tokens, and must exhaust the iterator.
        """
        if self._stall is not None and (self._group or len(self._queue)):
            # Otherwise these tokens would wait for the chunk, whose time is measured.
            yield from self._take()
        while self.read():
            yield from self._take()
            if self._stall is not None:
                break
        sent = yield from self._go_on()
        yield from self._take(_AHEAD if sent else 0)

    def read(self) -> bool:
        """Reads the prompts of one group, or one chunk of them; fills free slots with their rows.

        Returns:
          Whether any row was put into a slot.
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
        """Compiles all programs of the closed set; all slots must be empty."""
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
            self._erase()
        for slot in range(len(self._slots)):
            self._decode([(slot, row)])
        collections.deque(self._step(), 0)
        if self._prefixes is not None:
            self._state = self._state.replace(cache=self._prefixes.warm(self._state.cache))
        jax.block_until_ready(self._state)
        self._calls.clear()

    def _read_chunk(self, reading: Reading) -> None:
        """Reads one chunk; while rows run, one narrow enough to keep to `stall` seconds."""
        if not self.running:
            reading.read()
            return
        began = time.perf_counter()
        width = reading.read(self._chunk)
        jax.block_until_ready(reading.logits)
        self._chunk = int(self._stall * width / (time.perf_counter() - began))

    def _place(self, group: Group) -> bool:
        """Puts rows of a group that has been read into free slots; returns whether it put any."""
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
                row.cached = group.reading.cached[number]
                if row.finish_reason is None:
                    self._insert(row, group.reading, number)
                    placed = True
        if not group.ready:
            self._group = None
        return placed

    def _adopt(self, group: Group) -> None:
        """Starts a state with the rows of a group and the cache in which they were read."""
        rows = [row for _, row in group.ready]
        group.ready.clear()
        self._slots[: len(rows)] = rows
        state = self._fields(rows, len(self._slots), group.reading.cache)
        self._state, made = first_step(self._model, state, group.reading.logits)
        self._calls.append(_Call(made, list(enumerate(rows)), 1, False, 0.0))

    def _insert(self, row: Row, reading: Reading, number: int) -> None:
        """Inserts a row, whose prompt has index `number` in a reading, into a free slot."""
        slot = self._slots.index(None)
        self._slots[slot], self._ended[slot] = row, False
        new = self._fields([row], 1, ())
        self._state, made = insert(
            *(self._model, self._state, np.int32(slot), new),
            *(reading.cache, reading.logits, np.int32(number), self._masks([(0, row)], 1)),
        )
        self._calls.append(_Call(made, [(0, row)], 1, False, 0.0))

    def _fields(self, rows: Sequence[Row], count: int, cache: Cache) -> State:
        """Returns the state of `rows` before their first tokens, padded to `count` rows."""
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

    def _go_on(self) -> Generator[tuple[Row, Token | None], None, bool]:
        """Dispatches the next call if any row has tokens left to add; returns whether it did.

        Yields tokens of earlier calls that it needs first.
        """
        rows = [(slot, row) for slot, row in enumerate(self._slots) if row is not None]
        goes_on = any(self._left(row) > 0 for _, row in rows)
        if goes_on and any(row.matcher is not None for _, row in rows):
            yield from self._step()
        elif goes_on:
            self._decode(rows)
        return goes_on

    def _step(self) -> Iterator[tuple[Row, Token | None]]:
        """Takes one step with grammars, whose masks are computed while the device runs the model.

        Yields the tokens of earlier calls: a mask depends on the tokens before it.
        """
        with on_mesh(self._params):
            self._erase()
            self._state, logits = forward(self._model, self._params, self._state)
            yield from self._take()
            rows = [(slot, row) for slot, row in enumerate(self._slots) if row is not None]
            masks = self._masks(rows, len(self._slots))
            self._state, made = choose_masked(self._model, self._state, logits, masks)
        self._calls.append(_Call(made, rows, 1, False, 0.0))

    def _masks(self, rows: list[tuple[int, Row]], count: int) -> np.ndarray:
        """Returns the tokens that rows may choose, one bit each, [`count`, ceil(V / 32)] int32."""
        masks = np.full((count, -(-self._model.config.vocab_size // 32)), -1, np.int32)
        for entry, row in rows:
            if row.matcher is not None:
                self._guard(row, row.matcher.fill, masks[entry])
        return masks

    @staticmethod
    def _guard(row: Row, function: Callable[[Any], Any], argument: Any) -> Any:
        """Calls a function of a row's matcher; an error ends this row alone, after the step."""
        try:
            return function(argument)
        except ValueError as error:
            row.problem = str(error)
            return True

    def _decode(self, rows: list[tuple[int, Row]]) -> None:
        """Dispatches one call of the loop of steps for `rows`, pairs of a slot and its row."""
        # If other rows wait, the loop ends as soon as a slot is free, or after one step if one is.
        watched, steps = np.zeros(len(self._slots), bool), self._limit
        if len(self._queue) or self._group:
            watched[[slot for slot, _ in rows]] = True
            steps = 1 if self._stall is not None and None in self._slots else steps
        with on_mesh(self._params):
            self._erase()
            self._state, made = decode(
                *(self._model, self._params, self._state),
                *(np.int32(steps), watched, self._count(rows)),
            )
        self._calls.append(_Call(made, rows, steps, True, time.perf_counter()))

    def _erase(self) -> None:
        """Ends the rows on the device that the host has ended."""
        if self._ended.any():
            self._state = erase(self._model, self._state, self._ended)
            self._ended = np.zeros_like(self._ended)

    def _count(self, rows: list[tuple[int, Row]]) -> int | None:
        """Returns the number of slots that a call runs, from the first on; None = all."""
        if self._stall is None or not shrinks(self._model):
            return None  # Compiling one more program would take longer than it saves.
        used = 1 + max((slot for slot, _ in rows), default=0)
        count = 1 << (used - 1).bit_length()
        return count if count < len(self._slots) else None

    def _left(self, row: Row) -> int:
        """Returns how many tokens a row may still add after all dispatched calls."""
        calls = (call for call in self._calls if any(own is row for _, own in call.rows))
        return row.new_tokens - len(row.tokens) - sum(call.steps for call in calls)

    def _take(self, ahead: int = 0) -> Iterator[tuple[Row, Token | None]]:
        """Reads and yields the tokens of all dispatched calls except the last `ahead`."""
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
                        yield from self._accept(row, made, entry, column)
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

    def _accept(self, row: Row, made: Made, entry: int, column: int) -> Iterator:
        """Appends a token to a row, and yields it; ends the row if that completes its grammar."""
        token = int(made.tokens[entry, column])
        ended = row.matcher is not None and self._guard(row, row.matcher.push, token)
        if row.problem is None:
            row.tokens.append(token)
            yield row, Token.of(made, entry, column, row.top)
        if row.finish_reason is None and (ended or row.problem is not None):
            self.end(row, "stop" if row.problem is None else "error")
            yield row, None

    def _leave(self, row: Row) -> int:
        """Saves a row's keys and values, and frees its slot; returns the slot."""
        self._keep(row)
        slot = self._slots.index(row)
        self._slots[slot] = None
        return slot

    def _keep(self, row: Row) -> None:
        """Saves a row's keys and values for prompts that begin with the same tokens."""
        if self._prefixes is None or not row.chosen or row.finish_reason == "error":
            return
        coming = row.new_tokens - len(row.tokens) - self._left(row)
        self._prefixes.save(
            (),
            # The last token has not been fed to the model, so it has no keys yet.
            [*row.prompt, *row.tokens[: row.chosen - 1]],
            *(self._state.cache, self._slots.index(row)),
            written=len(row.prompt) + row.chosen + coming,
        )

    def _pace(self, call: _Call, made: Made, seconds: float) -> None:
        """Doubles the steps of later calls, if this call took less than `patience` seconds."""
        if (
            not call.is_loop
            or call.steps < self._limit
            or (made.tokens[:, call.steps - 1] < 0).all()
        ):
            return

        def paced():
            return min(2 * self._limit, MOST_STEPS) if seconds < self._patience else self._limit

        # All processes use the first one's clock: if their numbers of steps differed, they would
        # wait for each other forever.
        self._limit = from_first(paced)
