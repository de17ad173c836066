"""Sentences for the user of a program, each in one line of a terminal. It imports nothing slow."""

import re
import sys

# Characters of a message, of a path in it, and of any other word.
_MESSAGE, _PATH, _WORD = 400, 255, 80


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
