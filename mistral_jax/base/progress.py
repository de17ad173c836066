"""What long work tells its user while it runs. It knows nothing of models."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from mistral_jax.base.output import tell

Advance = Callable[[int], None]


class Progress:
    """A listener that says nothing, for work that a program asks for."""

    def say(self, sentence: str) -> None:
        """Takes a sentence that the user should know."""

    @contextmanager
    def task(self, size: int) -> Iterator[Advance]:
        """Yields a function to call with the bytes of each part of `size` that is done."""
        yield lambda count: None


class Screen(Progress):
    """A listener on standard error: a bar on a terminal, else a line for every tenth part."""

    def say(self, sentence: str) -> None:
        """Prints the sentence."""
        tell(sentence)

    @contextmanager
    def task(self, size: int) -> Iterator[Advance]:
        """Shows the bytes done, of `size`, and their rate."""
        console = Console(stderr=True)
        if not console.is_terminal:
            yield self._lines(size)
            return
        columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        with Bar(*columns, console=console) as bar:
            task = bar.add_task("", total=size)
            yield lambda count: bar.advance(task, count)

    def _lines(self, size: int) -> Advance:
        start, done, told = time.monotonic(), 0, 0

        def advance(count: int) -> None:
            nonlocal done, told
            done += count
            if 10 * done // size > told:
                told = 10 * done // size
                rate = done / (time.monotonic() - start)
                self.say(f"{decimal(done)} of {decimal(size)}, {decimal(int(rate))}/s")

        return advance
