"""Laws of all commands: an error is one line on standard error, and every end has its status."""

import os
import subprocess
import sys
import threading
import time

import jax
import pytest
from jax import monitoring
from mistral_jax.convert import __main__ as convert

from mistral_jax.cli import command, sample, train
from mistral_jax.config import ModelConfig


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (sample.main, ["--temprature", "1", "x"]),
        (sample.main, ["--top-k", "many", "x"]),
        (train.main, []),
        (train.main, ["recipe.toml", "--steps", "3"]),
        (train.main, ["recipe.toml", "--preview", "-1"]),
        (train.main, ["recipe.toml", "--preview", "0"]),
        (convert.main, []),
        (convert.main, ["to-orbax", "only-one"]),
        (convert.main, ["to-torch", "a", "b", "--format", "onnx"]),
    ],
)
def test_a_wrong_argument_is_one_line(capsys, main, arguments):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert err.startswith("error: ")
    assert "--help" in err
    assert err.count("\n") == 1


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("task", "status", "message"),
    [
        (lambda: None, 0, ""),
        (lambda: 7, 7, ""),
        (lambda: fail(ValueError("no")), 2, "error: no\n"),
        (lambda: fail(FileNotFoundError(2, "No such file", "x")), 2, "No such file: 'x'\n"),
        (lambda: fail(KeyboardInterrupt), 130, "nothing was done\n"),
    ],
)
def test_every_end_has_its_status(capsys, task, status, message):
    assert command.run(task, "nothing was done") == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(message)
    assert err.count("\n") == message.count("\n")


@pytest.mark.parametrize("status", [0, 2])
def test_who_stops_reading_ends_it_silently(status):
    """With a status of the command's choice: what is undone then must not pass for done."""
    task = f"command.run(lambda: print('x'), unread={status})"
    code = f"from mistral_jax.cli import command; raise SystemExit({task})"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as unread:
        done = subprocess.run([sys.executable, "-c", code], stdout=unread, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (status, b"")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (TypeError("ours\nand more"), "error: TypeError: ours; in "),
        (MemoryError(), "error: there is not enough memory (the system refused it); in "),
        (RecursionError("deep"), "error: something is nested too deeply; in "),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 GB"), "error: there is not enough memory (RESOURCE"),
        (ValueError(), "error: ValueError; in "),
        (KeyError("k"), "error: KeyError: 'k'; in "),
    ],
)
def test_a_mistake_of_the_program_is_one_line_that_says_where(capsys, error, message):
    assert command.run(lambda: fail(error)) == 1
    short = capsys.readouterr().err
    assert short.startswith(message)
    assert short.endswith("(--traceback shows the rest)\n")
    assert short.count("\n") == 1
    assert command.run(lambda: fail(error), show_traceback=True) == 1
    long = capsys.readouterr().err
    assert long.startswith("Traceback (most recent call last)")
    assert long.endswith(short)


def test_the_place_that_is_told_is_the_last_in_this_program(capsys):
    assert command.run(lambda: ModelConfig.from_dict(3)) == 1
    assert "TypeError: 'int' object is not iterable; in config.py, line " in capsys.readouterr().err


NASTY = {
    "control": "a\x1b[31m\x07\r\nb\x00\u202ec\x85d\u2028e\x9b1m\ud800",
    "long": "x" * 2_000_000,
    "path": "/" + "y" * 2_000_000,
    "many": "word " * 400_000,
}


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_whatever_a_message_quotes_it_is_one_short_printable_line(capsys, text):
    assert command.run(lambda: fail(ValueError(f"tensor {text} is missing; put it there"))) == 2
    error = capsys.readouterr().err.removesuffix("\n")
    assert error.isprintable()
    assert error.startswith("error: tensor ")
    assert error.endswith(" is missing; put it there")
    assert len(error) <= 420
    with pytest.raises(SystemExit):
        sample.main([f"--dtype={text}"])
    assert capsys.readouterr().err.removesuffix("\n").isprintable()


def test_names_keep_their_two_ends():
    assert command.one_line(f"tensor {'a' * 99}b is") == f"tensor {'a' * 52}...{'a' * 24}b is"
    path = "/home/somebody/" + "models/" * 20 + "config.json"
    assert command.one_line(f"{path} é 你好 🙂") == f"{path} é 你好 🙂"


def run_shell(script, **variables):
    """Runs a line of a shell; returns its status, standard output and standard error."""
    done = subprocess.run(
        ["sh", "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHON": sys.executable, **variables},
    )
    return done.returncode, done.stdout, done.stderr


def test_closed_streams_are_not_other_files(tmp_path):
    """A file that is opened later would be standard output, and get what is printed."""
    code = tmp_path / "code.py"
    code.write_text(
        "import sys; from mistral_jax.cli import command; command.begin()\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w')\n"
        "print('out'); print('err', file=sys.stderr); read = sys.stdin.read()\n"
        "file.write(f'{read!r} {sorted(command.closed)}')\n"
    )
    for closed, said in (
        ("<&-", ("out\n", "err\n", "['stdin']")),
        (">&-", ("", "err\n", "['stdout']")),
        ("2>&-", ("out\n", "", "['stderr']")),
        ("<&- >&- 2>&-", ("", "", "['stderr', 'stdin', 'stdout']")),
    ):
        status, *streams = run_shell(f'"$PYTHON" {code} {closed}')
        assert (status, *streams) == (0, *said[:2]), closed
        assert (tmp_path / "file").read_text() == f"'' {said[2]}"


def test_a_prompt_from_closed_standard_input_is_refused():
    status, out, err = run_shell('"$PYTHON" -m mistral_jax.sample - <&-')
    assert (status, out) == (2, "")
    assert err.startswith("error: standard input is closed; give the prompt")


def test_a_terminal_of_no_columns_is_no_terminal_s():
    for columns in ("0", "-3", "x", "99999999999"):
        assert run_shell('"$PYTHON" -m mistral_jax.plan --help', COLUMNS=columns)[0] == 0


QUIET = """
import os, signal, sys, threading, time
from mistral_jax.cli import command

command.begin()
start = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start
try:
    {work}
except BaseException as error:
    print("caught", type(error).__name__)
    time.sleep(0.1)
    sys.exit(3)
"""


@pytest.mark.parametrize(
    ("work", "status", "output"),
    [
        ("start(); time.sleep(20)", 130, ""),
        ("start(); import jax, flax, orbax.checkpoint.v1; time.sleep(20)", 130, ""),
        ("print('text', end=''); start(); time.sleep(20)", 130, "text"),
        ("with command.interruptible(): start(); time.sleep(20)", 3, "caught KeyboardInterrupt\n"),
    ],
)
def test_ctrl_c_ends_a_command_at_once_unless_it_has_something_to_clean(work, status, output):
    code = QUIET.format(work=work)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, output, "")


@pytest.mark.parametrize("kept", [True, False])
def test_who_waits_for_programs_is_told_once_they_are_kept(capsys, monkeypatch, tmp_path, kept):
    monkeypatch.setattr(command, "_PATIENCE", 0.2)
    monkeypatch.setattr(command, "_told", threading.Event())
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path) if kept else None)
    try:
        with command.announced():
            monitoring.record_event("/jax/compilation_cache/compile_requests_use_cache")
            said, until = "", time.monotonic() + (60 if kept else 0.5)
            while not said and time.monotonic() < until:
                time.sleep(0.05)
                said = capsys.readouterr().err
        assert said.startswith("compiling programs ") is kept
        with command.announced():  # Another part of the command waits, too.
            monitoring.record_event("/jax/compilation_cache/compile_requests_use_cache")
            time.sleep(0.5)
        assert capsys.readouterr().err == ""
        command._told.clear()
        with command.announced() as seen:
            seen()
            monitoring.record_event("/jax/compilation_cache/compile_requests_use_cache")
            time.sleep(0.5)
        with command.announced():  # All are found.
            monitoring.record_event("/jax/compilation_cache/compile_requests_use_cache")
            monitoring.record_event("/jax/compilation_cache/cache_hits")
            time.sleep(0.5)
        assert capsys.readouterr().err == ""
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_command_begins_before_anything_slow_is_imported():
    code = (
        "import sys; sys.argv = ['-m']; import mistral_jax, signal\n"
        "from mistral_jax.cli import command\n"
        "assert signal.getsignal(signal.SIGINT) is command._leave\n"
        "assert not {'jax', 'numpy', 'rich', 'dataclasses'} & {*sys.modules}, sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
