"""What a program tells its user: sentences, each in one line, and how far long work has come.

It imports nothing slow before it is needed.
"""

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Characters of a message, of a path in it, and of any other word.
_MESSAGE, _PATH, _WORD = 400, 255, 80

Advance = Callable[[int], None]


def one_line(text: str) -> str:
    """Returns a text for one line of a terminal: escaped, and shortened where it is long.

    What is no printable character could move the cursor, and a name from a file be of any length.
    """
    text = text[: 1 << 16] + text[1 << 16 :][-(1 << 10) :]
    text = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )
    text = re.sub(rf"\S{{{_WORD + 1},}}", lambda word: _shorten_word(word[0]), text)
    return _shorten(text, _MESSAGE)


def _shorten_word(word: str) -> str:
    return _shorten(word, _PATH if "/" in word else _WORD)


def _shorten(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    kept = limit - 3
    return f"{text[: kept - kept // 3]}...{text[-(kept // 3) :]}"


def tell(sentence: str) -> None:
    """Prints a sentence for the user on standard error, beside the output."""
    print(one_line(sentence), file=sys.stderr, flush=True)


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
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        if not console.is_terminal:
            yield self._lines(size)
            return
        columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        with Bar(*columns, console=console) as bar:
            task = bar.add_task("", total=size)
            yield lambda count: bar.advance(task, count)

    def _lines(self, size: int) -> Advance:
        from rich.filesize import decimal

        start, done, told = time.monotonic(), 0, 0

        def advance(count: int) -> None:
            nonlocal done, told
            done += count
            if 10 * done // size > told:
                told = 10 * done // size
                rate = done / (time.monotonic() - start)
                self.say(f"{decimal(done)} of {decimal(size)}, {decimal(int(rate))}/s")

        return advance
