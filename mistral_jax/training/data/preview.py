"""A preview: examples as text, with what is learnt set apart. It reads and encodes nothing."""

import itertools
from collections.abc import Iterable

import numpy as np
from rich.console import Console
from rich.text import Text

from mistral_jax.tokens.tokenizer import Tokenizer
from mistral_jax.training.data.records import Example, Pair

MARKS = "⟦", "⟧"  # around what is learnt, where there are no colours
_LEARNT, _GIVEN, _CONTROL = "bold green", "dim", "reverse"
# What would move a terminal's cursor, or more, is shown as its picture; tabs too, as they are told
# from spaces then.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) != "\n"}
_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def show(examples: Iterable[Example | Pair], tokenizer: Tokenizer, console: Console) -> None:
    """Prints examples decoded: what is learnt in green, or between ⟦ and ⟧ where nothing is.

    Control tokens are shown as the vocabulary spells them, in colours inverted, so that they
    differ from the same characters in a text.

    Args:
      examples: what `records.read` yields.
      tokenizer: what encoded them.
      console: where to print.
    """
    colours = console.color_system is not None and not console.no_color
    for number, example in enumerate(examples, start=1):
        sides = {f"Example {number}": example}
        if isinstance(example, Pair):
            sides = {
                f"Pair {number}, chosen": example.chosen,
                f"Pair {number}, rejected": example.rejected,
            }
        for title, side in sides.items():
            console.print(Text(f"{title}: {_count(side)}", "bold"), soft_wrap=True)
            console.print(_decode(side, tokenizer, colours), soft_wrap=True, end="\n\n")


def _count(example: Example) -> str:
    learnt = example.weights[example.weights > 0]
    weights = np.unique(learnt)
    note = (
        ""
        if np.array_equal(weights, [1])
        else f" with weight {', '.join(f'{w:g}' for w in weights)}"
    )
    return f"{len(example.tokens)} tokens, {len(learnt)} learnt{note}"


def _decode(example: Example, tokenizer: Tokenizer, colours: bool) -> Text:
    text, decoder = Text(), tokenizer.stream()
    tokens = zip(example.tokens.tolist(), (example.weights > 0).tolist(), strict=True)
    for learnt, run in itertools.groupby(tokens, key=lambda token: token[1]):
        style = _LEARNT if learnt else _GIVEN
        before, after = MARKS if learnt and not colours else ("", "")
        text.append(before)
        ids = (token for token, _ in run)
        for is_control, part in itertools.groupby(ids, tokenizer.is_control):
            if is_control:
                text.append("".join(map(tokenizer.piece, part)), f"{style} {_CONTROL}")
            else:
                decoded = "".join(map(decoder.push, part)) + decoder.flush()
                text.append(decoded.translate(_PICTURES), style)
        text.append(after)
    return text
