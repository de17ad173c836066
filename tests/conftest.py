"""Configures JAX for all tests: 8 CPU devices, no implicit promotion of dtypes or ranks."""

import os
import signal

import jax
import processes

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests spend more time compiling than running. Commands, documents, notebooks and parity checks are
# compiled with all optimizations, as for users.
jax.config.update("jax_disable_most_optimizations", True)
os.environ["XLA_FLAGS"] = processes.ALIKE["XLA_FLAGS"]

# Shells ignore SIGINT in background jobs, and programs that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionstart():
    """Initialises XLA, which reads its flags, before a test starts a program that inherits them."""
    jax.devices()
    os.environ.pop("XLA_FLAGS", None)
