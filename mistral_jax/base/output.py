"""Messages of one line and progress for the user, on standard error.

Slow imports are inside functions, so that commands can import this module first.
"""

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Maximum characters of a message, of a path in it, and of any other word.
_MESSAGE, _PATH, _WORD = 400, 255, 80

Advance = Callable[[int], None]


def one_line(text: str) -> str:
    """Returns a text that is safe to print on one line of a terminal.

    Characters that are not printable are escaped, because they could move the cursor. Long words
    and long texts, such as names from a file, are shortened in the middle.
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
    """Prints a message for the user on standard error."""
    print(one_line(sentence), file=sys.stderr, flush=True)


class Progress:
    """Receives the messages and the progress of long work, and ignores both.

    It is the default of library functions; commands pass a `Screen`.
    """

    def say(self, sentence: str) -> None:
        """Receives a message for the user."""

    @contextmanager
    def task(self, size: int) -> Iterator[Advance]:
        """Yields a function to call with the number of bytes done since the last call.

        Args:
          size: bytes in all.
        """
        yield lambda count: None


class Screen(Progress):
    """Shows messages and progress on standard error.

    Progress is a bar on a terminal, and one line for each tenth of the work elsewhere.
    """

    def say(self, sentence: str) -> None:
        """Prints a message."""
        tell(sentence)

    @contextmanager
    def task(self, size: int) -> Iterator[Advance]:
        """Shows the bytes done, out of `size`, and the rate."""
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
