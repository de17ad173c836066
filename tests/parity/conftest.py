"""The seed of a live comparison: fresh at every run, printed, and repeatable."""

import os
import secrets

import jax
import processes
import pytest

# What is compared is what users run.
jax.config.update("jax_disable_most_optimizations", False)
os.environ["XLA_FLAGS"] = processes.UNDIVIDED

SEED = int(os.environ.get("PARITY_SEED") or secrets.randbelow(2**31))
os.environ["PARITY_SEED"] = str(SEED)  # for the workers of pytest-xdist


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"PARITY_SEED={SEED} makes the same models again")


@pytest.fixture(scope="session")
def seed():
    return SEED
