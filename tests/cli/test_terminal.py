"""A conversation at a terminal: commands, history, and what Ctrl-C does."""

import os
import pty
import subprocess
import sys

import pytest

from mistral_jax.cli.terminal import converse

ANSWER_UNTIL_INTERRUPTED = """
import os, time
from mistral_jax.cli.terminal import converse

os.close(os.open(os.ttyname(0), os.O_RDWR))  # A session's leader gets its own terminal so.

def answer(messages, show):
    if messages[-1]["content"] == "show":
        show(repr(messages[0]["content"]))
    show(f"[{len(messages)}")
    while messages[-1]["content"] == "wait":
        time.sleep(0.01)
    show("]")

converse(answer)
"""


@pytest.fixture
def talk(monkeypatch, capsys):
    """Types lines; returns the messages of each turn, standard output and standard error."""

    def run(*lines, system=None, answer=None):
        turns = []

        def count(messages, show):
            turns.append([message["content"] for message in messages])
            show("answer ")
            show(str(len(turns)))

        remaining = iter(lines)

        def read(prompt):
            assert prompt == ""  # not a terminal here
            line = next(remaining, EOFError)
            if not isinstance(line, str):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        converse(answer or count, system)
        return turns, *capsys.readouterr()

    return run


def test_a_turn_sees_all_before_it(talk):
    turns, out, err = talk("one", "", "two", system="be kind")
    assert turns == [["be kind", "one"], ["be kind", "one", "answer 1", "two"]]
    assert (out, err) == ("answer 1\nanswer 2\n", "")


def test_reset_forgets_all_but_the_system_text(talk):
    turns, _, _ = talk("one", "/reset", "two", system="be kind")
    assert turns == [["be kind", "one"], ["be kind", "two"]]


def test_exit_leaves(talk):
    assert talk("one", " /exit ", "two")[0] == [["one"]]


def test_help_and_unknown_commands_are_not_messages(talk):
    turns, out, err = talk("/help", "/hlep", "/etc/hosts is what?")
    assert turns == [["/etc/hosts is what?"]]
    assert out == "answer 1\n"
    assert err.count("/reset") == 2
    assert "there is no command /hlep" in err


def test_ctrl_c_at_the_prompt_says_how_to_leave(talk):
    turns, _, err = talk(KeyboardInterrupt, "one")
    assert turns == [["one"]]
    assert err == "\n/exit or Ctrl-D leaves\n"


def test_a_refused_message_is_forgotten(talk):
    seen = []

    def refuse_first(messages, show):
        seen.append([message["content"] for message in messages])
        if len(seen) == 1:
            raise ValueError("too long")
        show("yes")

    _, out, err = talk("one", "two", answer=refuse_first)
    assert seen == [["one"], ["two"]]
    assert (out, err) == ("yes\n", "error: too long; /reset begins a new conversation\n")


@pytest.fixture
def terminal():
    """A conversation at a terminal: what types there, and what waits for something to be shown."""
    here, there = pty.openpty()
    program = subprocess.Popen(
        [sys.executable, "-c", ANSWER_UNTIL_INTERRUPTED],
        stdin=there,
        stdout=there,
        stderr=there,
        start_new_session=True,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(there)
    shown = b""

    def wait_for(text):
        nonlocal shown
        while text not in shown:
            shown += os.read(here, 1000)
        shown = shown.split(text, 1)[1]

    try:
        wait_for(b"Type a message")
        wait_for(b"> ")
        yield lambda text: os.write(here, text), wait_for
        wait_for(b"> ")
        os.write(here, b"\x04")
        assert program.wait(timeout=60) == 0
    finally:
        program.kill()
        program.wait()
        os.close(here)


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal):
    write, wait_for = terminal
    write(b"wait\n")
    wait_for(b"[1")
    write(b"\x03")
    wait_for(b"> ")
    write(b"\x1b[A\x7f\x7f\x7f\x7fgo\n")  # up: the last line is back; rewrite it
    wait_for(b"[3]")  # what was said before the interruption stays said


@pytest.mark.parametrize("paste", [b"\x1b[200~one\ntwo\x1b[201~\r", b"one\ntwo\n"])
def test_a_paste_of_several_lines_is_one_message(terminal, paste):
    write, wait_for = terminal
    write(paste)
    wait_for(b"[1]")
    wait_for(b"> ")
    write(b"show\n")
    wait_for(b"'one\\ntwo'[3]")
