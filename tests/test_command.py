"""Laws of all commands: an error is one line on standard error, and every end has its status."""

import os
import subprocess
import sys

import pytest
from mistral_jax.convert import __main__ as convert

from mistral_jax import command, sample, train


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
    code = f"from mistral_jax import command; raise SystemExit({task})"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as unread:
        done = subprocess.run([sys.executable, "-c", code], stdout=unread, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (status, b"")


def test_a_mistake_of_the_program_is_no_error_of_the_user():
    with pytest.raises(TypeError, match="ours"):
        command.run(lambda: fail(TypeError("ours")))
