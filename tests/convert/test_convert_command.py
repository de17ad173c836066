"""The commands as a user runs them: what they print where, and how they end."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import sources
from mistral_jax.convert.__main__ import main

import mistral_jax
from mistral_jax.checkpoint import manifest
from mistral_jax.config import CHECKOUT

COMMAND = [sys.executable, "-m", "mistral_jax.convert"]
SIGNALLED = """
import os, sys
from mistral_jax.base import output
from mistral_jax.convert import __main__

number, *arguments = sys.argv[1:]
said = []

def say(self, sentence):
    said.append(sentence)
    print(sentence, file=sys.stderr, flush=True)
    if len(said) == 3:
        os.kill(os.getpid(), int(number))

output.Screen.say = say
sys.exit(__main__.main(arguments))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A source of many layers, so that its conversion takes some time."""
    fields = {"n_layers": 12}
    path = tmp_path_factory.mktemp("source") / "official"
    return sources.write(path, "official-safetensors", sources.tensors(**fields), **fields)


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def run(*arguments, **options):
    options = {"capture_output": True, "text": True, "timeout": 120} | options
    return subprocess.run([*COMMAND, *map(str, arguments)], **options, check=False)


def test_there_and_back_again(source, tmp_path, capsys):
    done = run("to-orbax", source, tmp_path / "x")
    assert (done.returncode, done.stdout) == (0, "")
    lines = done.stderr.splitlines()
    assert 5 < len(lines) <= 10, "a line for each tenth part"
    assert all(" of " in line and line.endswith("/s") for line in lines)
    assert main(["to-torch", *map(str, (tmp_path / "x", tmp_path / "y")), "--format=official"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    finished, size = re.match(r"(.+) of (.+), ", err.splitlines()[-1]).groups()
    assert finished == size
    assert main(["to-orbax", *map(str, (tmp_path / "y", tmp_path / "x")), "--overwrite"]) == 0
    assert manifest.read(tmp_path / "x")[0].num_layers == 12


def test_a_bar_on_a_terminal(source, tmp_path):
    leader, follower = os.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    arguments = ("to-orbax", source, tmp_path / "x")
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stderr=follower, env=environment, text=True
    )
    os.close(follower)
    shown = b""
    try:
        while piece := os.read(leader, 65536):
            shown += piece
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(leader)
    assert process.wait() == 0
    assert "━" in shown.decode()
    assert "MB/s" in shown.decode() or "kB/s" in shown.decode()


def test_an_interrupt_leaves_nothing(source, tmp_path):
    done = signalled(signal.SIGINT, source, tmp_path)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "interrupted: nothing was written"
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    assert names(tmp_path) == []


@pytest.mark.slow
def test_a_kill_leaves_what_was_there_and_its_own_leftovers_go_with_the_next_run(source, tmp_path):
    assert run("to-orbax", source, tmp_path / "x").returncode == 0
    done = signalled(signal.SIGKILL, source, tmp_path, "--overwrite", "--rope-theta", "77")
    assert done.returncode == -signal.SIGKILL
    left, lock, x = names(tmp_path)
    assert lock == f"{left}.lock"
    assert left.startswith(".x.partial-")
    assert manifest.read(tmp_path / x)[0].rope_theta == 1e4
    arguments = ("--overwrite", "--rope-theta", "77")
    assert run("to-orbax", source, tmp_path / "x", *arguments).returncode == 0
    assert manifest.read(tmp_path / x)[0].rope_theta == 77
    assert names(tmp_path) == ["x"]


def signalled(number, source, tmp_path, *options):
    """Runs a conversion that gets a signal at its third tenth, however fast it is."""
    arguments = [str(int(number)), "to-orbax", source, tmp_path / "x", *options]
    command = [sys.executable, "-c", SIGNALLED, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(source, tmp_path):
    """A limit on the size of files stands for it: what it raises comes the same way."""
    command = " ".join(map(str, [*COMMAND, "to-orbax", source, tmp_path / "x"]))
    done = subprocess.run(
        ["sh", "-c", f"ulimit -f 4; exec {command}"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line == f"error: {tmp_path / 'x'} could not be made: File too large"
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["to-orbax", "nowhere", "x"], "nowhere does not exist"),
        (["inspect", "."], "holds no checkpoint to convert"),
        (["to-torch", ".", "x"], "no whole checkpoint: it has no config.json and no params"),
    ],
)
def test_errors_are_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_closed_pipe_ends_it_silently(source):
    reader, writer = os.pipe()
    os.close(reader)
    done = run("inspect", source, capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [[], ["to-orbax"], ["to-orbax", "a", "b", "--dtype", "int8"]])
def test_wrong_arguments(capsys, arguments):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2


def test_help_tells_of_every_option(capsys):
    for command in ("to-orbax", "to-torch", "inspect"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--format", "--dtype", "--rope-theta", "--overwrite", "--lengths"):
        assert option in shown


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"mistral_jax {mistral_jax.__version__}"


def test_the_command_s_short_name_in_a_checkout(tmp_path):
    sources.write(tmp_path / "s", "hf-safetensors")
    done = subprocess.run(
        [sys.executable, "-m", "convert", "inspect", str(tmp_path / "s")],
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        check=True,
    )
    assert "hf-safetensors" in done.stdout


MEMORY = """
import json, sys, threading
from pathlib import Path
from mistral_jax.convert.to_orbax import to_orbax
from mistral_jax.convert.to_torch import to_torch

def private():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

convert = {"to_orbax": to_orbax, "to_torch": to_torch}[sys.argv[1]]
small, large, target = map(Path, sys.argv[2:5])
options = json.loads(sys.argv[5])
convert(small, target / "small", **options)
idle, peaks, done = private(), [0], threading.Event()

def watch():
    while not done.wait(0.001):
        peaks.append(private())

threading.Thread(target=watch).start()
try:
    convert(large, target / "large", **options)
finally:
    done.set()
print(max(peaks) - idle)
"""


@pytest.fixture(scope="module")
def large():
    """Weights of 10 layers of 9 MB, and the fields that describe them."""
    fields = {"n_layers": 10, "dim": 384, "hidden_dim": 1536, "n_heads": 64, "n_kv_heads": 32}
    return sources.tensors(**fields), fields


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "options"), [("hf-safetensors", {"dtype": "bfloat16"}), ("official-torch", {})]
)
def test_memory_is_that_of_a_few_layers(tmp_path, large, format, options):
    """The measure of benchmarks/convert.py, at a size for tests: no more than 4 layers."""
    tensors, fields = large
    sources.write(tmp_path / "large-source", format, tensors, **fields)
    sources.write(tmp_path / "small-source", format)
    layer = sum(t.nbytes for name, t in tensors.items() if name.startswith("layers.0."))
    there = {"small": tmp_path / "small-source", "large": tmp_path / "large-source"}
    back = {name: tmp_path / "to_orbax" / name for name in there}
    for function, folders in (("to_orbax", there), ("to_torch", back)):
        arguments = [function, *folders.values(), tmp_path / function, json.dumps(options)]
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=True,
        )
        print(function, int(done.stdout) / layer)
        assert int(done.stdout) < 4 * layer, function
