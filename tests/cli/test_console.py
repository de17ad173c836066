"""Laws of the console script: it runs each command as `python -m` does, and starts as quickly."""

import subprocess
import sys
import tomllib

import pytest
from mistral_jax.convert import __main__ as convert

from mistral_jax import __version__
from mistral_jax.cli import command, console, evaluate, options, plan, serve, train
from mistral_jax.config import CHECKOUT

# What an installer writes as the script, for the entry point that pyproject.toml names.
(NAME,) = SCRIPTS = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["scripts"]
MODULE, _, FUNCTION = SCRIPTS[NAME].partition(":")
SCRIPT = f"import sys\nfrom {MODULE} import {FUNCTION}\nsys.exit({FUNCTION}())\n"
PARSERS = {
    "sample": options.parser,
    "train": train._parser,
    "serve": serve.parser,
    "evaluate": evaluate._parser,
    "plan": plan._parser,
    "convert": convert._parser,
}


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the script in this process; returns its status, standard output and standard error."""
    monkeypatch.setattr(command, "begin", lambda: None)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["/usr/bin/mistral-jax", *arguments])
        try:
            status = console.main()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def test_help_lists_every_command_in_one_line(run):
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    assert out.startswith("usage: mistral-jax COMMAND [options]\n")
    for name in PARSERS:
        assert sum(line.startswith(f"  {name} ") for line in out.splitlines()) == 1
    assert console.COMMANDS.keys() == PARSERS.keys()


def test_the_version_is_the_package_s(run):
    assert run("--version") == (0, f"mistral_jax {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no command is given; expected one of sample, train, serve, evaluate, plan, convert"),
        (["smaple", "x"], "there is no command 'smaple'; the nearest is 'sample'"),
        (["Convert"], "there is no command 'Convert'; the nearest is 'convert'"),
        ([""], "there is no command ''; the nearest is "),
        (["--verison", "sample"], "unrecognized arguments: --verison"),
        (["--traceback", "sample"], "unrecognized arguments: --traceback"),
        (["plan"], "the following arguments are required: model"),
    ],
)
def test_a_wrong_command_is_one_line(run, arguments, message):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", PARSERS)
def test_help_names_a_command_as_the_user_called_it(run, monkeypatch, name):
    status, out, err = run(name, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: mistral-jax {name} ")
    monkeypatch.setattr(sys, "argv", [str(CHECKOUT / "mistral_jax" / f"{name}.py")])
    by_module = PARSERS[name]().format_help()
    assert by_module.startswith(f"usage: python -m mistral_jax.{name} ")
    # Only examples name a command again, and they name it the same way.
    assert ("mistral-jax" in by_module, "python -m" in out) == (False, False)


def test_a_command_gets_its_arguments_and_returns_its_status(run, monkeypatch):
    given = []
    monkeypatch.setattr(train, "main", lambda argv: given.append(argv) or 7)
    assert run("train", "lora", "--", "--help", "-x") == (7, "", "")
    assert given == [["lora", "--", "--help", "-x"]]


def start(tmp_path, *arguments, before=""):
    """Runs the script as a process of its own."""
    script = tmp_path / NAME
    script.write_text(before + SCRIPT)
    return subprocess.run(
        [sys.executable, script, *arguments], cwd=tmp_path, capture_output=True, text=True
    )


def test_help_imports_nothing_slow(tmp_path):
    slow = "{'jax', 'numpy', 'rich'} & {*sys.modules}"
    check = f"import atexit, sys\natexit.register(lambda: print({slow}))\n"
    done = start(tmp_path, "--help", before=check)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\nset()\n")


def test_ctrl_c_is_quiet_while_a_command_is_imported(tmp_path):
    """The signal arrives in the first import of JAX, which takes a second."""
    before = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'jax': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    done = start(tmp_path, "sample", "def main", before=before)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
