"""What a command asks of the machine, and what a run cost."""

import math
import os
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from mistral_jax.base import machine
from mistral_jax.cli import stats
from mistral_jax.engine.generate import Completion


@pytest.mark.parametrize(
    ("device", "says"), [("nvidia0", 'GPU.*"jax.cuda13."'), ("accel3", 'TPU.*"jax.tpu."')]
)
def test_an_accelerator_that_jax_does_not_see_is_told_in_a_line(
    tmp_path, monkeypatch, device, says
):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    (tmp_path / "nvidiactl").touch()
    assert machine.unseen_accelerator(tmp_path) is None
    (tmp_path / device).touch()
    assert re.fullmatch(f"note: .*{says}", machine.unseen_accelerator(tmp_path))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # chosen, not missed
    assert machine.unseen_accelerator(tmp_path) is None


@pytest.mark.parametrize("writable", [True, False])
def test_the_compilation_cache_lies_in_the_users_folder(tmp_path, monkeypatch, writable):
    updates = {}
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    machine.use_compilation_cache()
    assert updates == {}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    if not writable:
        (tmp_path / "cache").touch()
    machine.use_compilation_cache()
    folder = str(tmp_path / "cache" / "mistral_jax" / "xla")
    assert updates.get("jax_compilation_cache_dir") == (folder if writable else None)


def test_the_clock_counts_compilation_once():
    clock = stats.CompileClock()
    began = time.perf_counter()

    @jax.jit
    def inner(x):
        for _ in range(200):
            x = jnp.sin(x)
        return x

    jax.jit(lambda x: inner(x) + inner(x + 1))(1.0)
    compiled = time.perf_counter()
    seconds = clock.seconds(began, compiled)
    assert 0.2 * (compiled - began) < seconds < compiled - began
    assert clock.seconds(compiled, math.inf) == 0


def test_rates_leave_compilation_out(monkeypatch):
    class Clock:
        def seconds(self, begin, end):
            return {(100, 104): 3.0, (104, 112): 2.0}[begin, end]

    def row(tokens, seconds):
        return Completion([0] * tokens, [0] * tokens, "length", [], None, 4.0, seconds)

    monkeypatch.setattr(stats, "read_bandwidth", lambda: 2000.0)
    params = {"embed": {"embedding": jnp.zeros((100, 1))}, "lm_head": {"kernel": jnp.zeros(300)}}
    told = stats.report(params, [[1] * 6, [1] * 4], [row(3, 8.0), row(11, 12.0)], 100, Clock())
    assert told.splitlines() == [
        "compile      5.00 s",
        "first token  4.00 s after the request, with 3.00 s of compilation",
        "prefill      10 tokens, 10.0 tokens/s",
        "decode       12 tokens, 2.0 tokens/s",
        # 10 steps in 6 seconds read 300 floats each; the embedding is not read whole.
        "memory       weights are read at 0.0 GB/s, 100% of the bandwidth of 0.0 GB/s",
    ]


def test_rates_of_rows_that_took_turns_are_those_of_all():
    class Clock:
        def seconds(self, begin, end):
            return 2.0

    rows = [
        Completion([0] * 5, [0] * 5, "length", [], None, 1.0 + 2.1 * turn, 3.0 + 2 * turn)
        for turn in (0, 1)
        for _ in range(8)
    ]
    assert stats.report({}, [[1] * 4] * 16, rows, 100, Clock()).splitlines() == [
        "compile      2.00 s",
        "first token  1.00 s after the request",
        "read         64 tokens",
        "made         80 tokens, 26.7 tokens/s, including the time to read the prompts",
    ]


CACHED = """
import warnings, jax, jax.numpy as jnp
from mistral_jax.base import machine
warnings.showwarning = lambda message, *rest: print("warning:", message)
machine.use_compilation_cache()
x = jnp.ones(())
for name in "abcd":
    def scale(x):
        return x * (ord(name) - 96)
    scale.__name__ = name
    x = jax.jit(scale)(x)
print(x / 3)
"""


def cached(folder, before="pass"):
    """Runs programs that JAX keeps when it has compiled them; returns all that is printed."""
    done = subprocess.run(
        [sys.executable, "-c", f"{before}\n{CACHED}"],
        env=os.environ | {"XDG_CACHE_HOME": str(folder), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_damaged_programs_are_compiled_and_kept_anew(tmp_path):
    """Whatever the damage; what is whole stays."""
    folder = tmp_path / "mistral_jax" / "xla"
    assert cached(tmp_path) == "8.0\n"
    paths = {name: next(folder.glob(f"jit_{name}-*-cache")) for name in "abcd"}
    whole = {name: path.read_bytes() for name, path in paths.items()}
    middle = len(whole["c"]) // 2
    flipped = whole["c"][:middle] + bytes([whole["c"][middle] ^ 1]) + whole["c"][middle + 1 :]
    for name, damage in (("a", whole["a"][:100]), ("b", b""), ("c", flipped)):
        paths[name].write_bytes(damage)
    written = paths["d"].stat().st_mtime_ns
    assert cached(tmp_path) == "8.0\n"
    assert paths["d"].stat().st_mtime_ns == written
    times = {name: path.stat().st_mtime_ns for name, path in paths.items()}
    assert cached(tmp_path) == "8.0\n"
    assert times == {name: path.stat().st_mtime_ns for name, path in paths.items()}
    assert all(len(path.read_bytes()) > 100 for path in paths.values())


def test_a_cache_that_cannot_be_written_is_told_once(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))"
    told, result = cached(tmp_path, limit).splitlines()
    assert told.startswith("warning: Error writing persistent compilation cache entry")
    assert result == "8.0"
    assert not list((tmp_path / "mistral_jax" / "xla").glob("*-cache"))


def test_the_oldest_programs_make_room(tmp_path):
    (tmp_path / "folder").mkdir()
    for name, age in (("old", 3), ("new", 1), ("older", 4), ("middle", 2)):
        path = tmp_path / f"jit_{name}-cache"
        path.write_bytes(bytes(1000))
        os.utime(path, (1e9 - age, 1e9 - age))
    os.utime(tmp_path / "jit_older-cache", (1e9, 0))  # It was read of late.
    machine._remove_oldest(tmp_path, most=4000)
    assert len(list(tmp_path.iterdir())) == 5
    machine._remove_oldest(tmp_path, most=2500)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"folder", "jit_older-cache", "jit_new-cache"}


@pytest.mark.parametrize("platform", ["cuda", "tpu", "nonsense"])
def test_a_platform_that_is_not_there_is_told_in_a_sentence(platform):
    code = "from mistral_jax.base import machine\ntry:\n    machine.open_devices()\n"
    code += "except ValueError as error:\n    print(error)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"JAX_PLATFORMS": platform},
        capture_output=True,
        text=True,
    )
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"JAX finds no device for JAX_PLATFORMS='{platform}'")
    assert "unset it" in line


def test_libtpu_is_quiet_where_no_tpu_is(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        jax, "devices", lambda: seen.append({name for name in os.environ if name[:4] == "TPU_"})
    )
    for name in list(os.environ):
        if name.startswith("TPU_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # JAX sets it where there is no TPU.
    machine.open_devices(tmp_path)
    assert seen.pop() == {*machine._NO_TPU, "TPU_SKIP_MDS_QUERY"}
    assert not set(machine._NO_TPU) & set(os.environ)
    for device in ("accel0", "vfio/3"):
        (tmp_path / device).parent.mkdir(exist_ok=True)
        (tmp_path / device).touch()
        machine.open_devices(tmp_path)
        assert seen.pop() == {"TPU_SKIP_MDS_QUERY"}
        (tmp_path / device).unlink()
    monkeypatch.setenv("TPU_WORKER_ID", "1")  # A pod's launcher has said something.
    machine.open_devices(tmp_path)
    assert seen.pop() == {"TPU_SKIP_MDS_QUERY", "TPU_WORKER_ID"}
