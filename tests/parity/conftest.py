"""The seed of a live comparison: fresh at every run, printed, and repeatable."""

import os
import secrets

import pytest

SEED = int(os.environ.get("PARITY_SEED") or secrets.randbelow(2**31))


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"PARITY_SEED={SEED} makes the same models again")


@pytest.fixture(scope="session")
def seed():
    return SEED
