"""Conversations at a terminal: reads messages and commands, and prints answers."""

import contextlib
import select
import sys
from collections.abc import Callable

with contextlib.suppress(ImportError):  # Not on Windows. It gives input() editing and a history.
    import readline

    # The terminal then marks the end of a paste, so that a paste of several lines is one message.
    # Python turns this off.
    readline.parse_and_bind("set enable-bracketed-paste on")

Messages = list[dict[str, str]]

_TYPED = 0.02  # Seconds; a line that comes sooner after another was pasted, not typed.

_HELP = """\
/reset  forget the conversation
/help   show this
/exit   leave (so does Ctrl-D)
Ctrl-C  stop an answer"""


class Declined(Exception):
    """A message or an answer is declined; the text says why."""


def converse(
    answer: Callable[[Messages, Callable[[str], None]], None],
    system: str | None = None,
    *,
    call: Callable[[Callable[[], str | None]], str | None] = lambda read: read(),
    resumes: bool = True,
) -> None:
    """Reads and answers messages until /exit or the end of the input.

    A message is a line, or all lines of a paste. An answer that fails with a ValueError, or is
    `Declined`, does not end the conversation, which forgets the message.

    Args:
      answer: function that answers; its arguments are the messages so far, and a function that it
        calls with each piece of the answer.
      system: text of the system message with which every conversation starts, if any.
      call: calls the function that reads a message and returns the result; with several processes,
        the first one reads for all.
      resumes: whether the conversation goes on after Ctrl-C has interrupted an answer.
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
    """Reads a line, or all lines of a paste; returns None at the end of the input."""
    while True:
        try:
            text = input("> " if sys.stdin.isatty() and sys.stdout.isatty() else "")
            # Some terminals do not mark the end of a paste. Lines that follow at once belong to it.
            while sys.stdin.isatty() and select.select([sys.stdin], [], [], _TYPED)[0]:
                text += "\n" + input()
            return text
        except EOFError:
            return None
        except KeyboardInterrupt:
            print("\n/exit or Ctrl-D leaves", file=sys.stderr)


def _turn(answer, messages: Messages, line: str, resumes: bool) -> Messages:
    """Prints the answer to a message; returns the messages to add to the conversation."""
    question = {"role": "user", "content": line}
    pieces = []

    def show(piece):
        pieces.append(piece)
        print(piece, end="", flush=True)

    try:
        answer([*messages, question], show)
    except KeyboardInterrupt:  # The part that was printed stays in the conversation.
        if not resumes:
            raise
    except Declined as declined:
        print(f"declined: {declined}", file=sys.stderr)
        return []
    except ValueError as error:
        print(f"error: {error}; /reset begins a new conversation", file=sys.stderr)
        return []
    print(flush=True)
    return [question, {"role": "assistant", "content": "".join(pieces)}]
