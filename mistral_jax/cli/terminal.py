"""A conversation at a terminal: lines in, answers out, a few commands. It knows no model."""

import contextlib
import select
import sys
from collections.abc import Callable

with contextlib.suppress(ImportError):  # Windows has none; else it gives input() a history.
    import readline

    # Python turns it off. A terminal then says where a paste ends, so that its lines are one text.
    readline.parse_and_bind("set enable-bracketed-paste on")

Messages = list[dict[str, str]]

_TYPED = 0.02  # seconds within which nobody types another line

_HELP = """\
/reset  forget the conversation
/help   show this
/exit   leave (so does Ctrl-D)
Ctrl-C  stop an answer"""


def converse(
    answer: Callable[[Messages, Callable[[str], None]], None],
    system: str | None = None,
    *,
    call: Callable[[Callable[[], str | None]], str | None] = lambda read: read(),
    resumes: bool = True,
) -> None:
    """Answers line after line, until /exit or the end of the input; a paste is one message.

    An answer that fails does not end the conversation.

    Args:
      answer: called with the messages so far and a function to which it gives pieces of its answer.
      system: text of the system message that every conversation starts with, if any.
      call: calls what reads a line; of several processes, one reads for all.
      resumes: whether the conversation goes on after an answer that is interrupted.
    """
    beginning = [] if system is None else [{"role": "system", "content": system}]
    messages = list(beginning)
    if sys.stdin.isatty():
        print("Type a message, or /help.", file=sys.stderr)
    while (line := call(_read)) is not None:
        match line.split():
            case []:
                pass
            case ["/exit"]:
                return
            case ["/reset"]:
                messages = list(beginning)
            case ["/help"]:
                print(_HELP, file=sys.stderr)
            case [word] if word.startswith("/"):
                print(f"there is no command {word}\n{_HELP}", file=sys.stderr)
            case _:
                messages += _turn(answer, messages, line, resumes)


def _read() -> str | None:
    """Reads a line, or all lines of a paste; None at the end of the input."""
    while True:
        try:
            text = input("> " if sys.stdin.isatty() and sys.stdout.isatty() else "")
            # What is there already was not typed: a terminal that does not mark a paste sent it.
            while sys.stdin.isatty() and select.select([sys.stdin], [], [], _TYPED)[0]:
                text += "\n" + input()
            return text
        except EOFError:
            return None
        except KeyboardInterrupt:
            print("\n/exit or Ctrl-D leaves", file=sys.stderr)


def _turn(answer, messages: Messages, line: str, resumes: bool) -> Messages:
    """Prints the answer to a line; returns the messages that this adds."""
    question = {"role": "user", "content": line}
    pieces = []

    def show(piece):
        pieces.append(piece)
        print(piece, end="", flush=True)

    try:
        answer([*messages, question], show)
    except KeyboardInterrupt:  # What was said stays said.
        if not resumes:
            raise
    except ValueError as error:
        print(f"error: {error}; /reset begins a new conversation", file=sys.stderr)
        return []
    print(flush=True)
    return [question, {"role": "assistant", "content": "".join(pieces)}]
