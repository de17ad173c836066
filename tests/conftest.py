"""A strict session: 8 CPU devices, no implicit promotion of dtypes or ranks."""

import os
import signal

import jax
import processes

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests compile much and run little. Commands, documents, notebooks and live parity are compiled as
# they are for users.
jax.config.update("jax_disable_most_optimizations", True)
os.environ["XLA_FLAGS"] = processes.ALIKE["XLA_FLAGS"]

# A shell makes what it runs in the background deaf to Ctrl-C; tests' programs would inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionstart():
    """Has XLA read its flags before any program that a test starts could inherit them."""
    jax.devices()
    os.environ.pop("XLA_FLAGS", None)
