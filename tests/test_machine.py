"""What a command asks of the machine, and what a run cost."""

import math
import re
import time

import jax
import jax.numpy as jnp
import pytest

from mistral_jax import machine, stats
from mistral_jax.generation.generate import Completion


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
        "memory       weights are read at 0.0 GB/s, 100% of the 0.0 GB/s that it gives",
    ]
