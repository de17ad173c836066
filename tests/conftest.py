"""Configures JAX for all tests: 8 CPU devices, no implicit promotion of dtypes or ranks."""

import os
import shutil
import signal

import jax
import processes

from mistral_jax.cli import command

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests spend more time compiling than running. Commands, documents and parity checks are compiled
# with all optimizations, as for users.
jax.config.update("jax_disable_most_optimizations", True)
os.environ["XLA_FLAGS"] = processes.ALIKE["XLA_FLAGS"]

# Shells ignore SIGINT in background jobs, and programs that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Commands say that they compile after some seconds, which would depend on the machine.
command._PATIENCE = 600
_MOST_BYTES = 1 << 30


def pytest_configure(config):
    """Keeps compiled programs in pytest's cache, for the other workers and the next session.

    `--cache-clear` removes them. So does a session that finds more than `_MOST_BYTES`.
    """
    if not hasattr(config, "cache"):  # -p no:cacheprovider
        return
    folder = config.cache.mkdir("programs")
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > _MOST_BYTES and not hasattr(config, "workerinput"):
        shutil.rmtree(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def pytest_sessionstart():
    """Initialises XLA, which reads its flags, before a test starts a program that inherits them."""
    jax.devices()
    os.environ["XLA_FLAGS"] = processes.UNDIVIDED
