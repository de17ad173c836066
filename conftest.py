"""Runs the commands and snippets of all documents as tests; tests/snippets says how."""

import os
from pathlib import Path

import pytest
from snippets import blocks
from sybil import Sybil

pytest_collect_file = Sybil(
    parsers=[blocks.parse],
    pattern="*.md",
    teardown=blocks.close,
    fixtures=["snippet_cache"],
).pytest()


TESTS = Path(__file__).parent / "tests"


def pytest_collection_modifyitems(items):
    """Marks documents, notebooks and the tests about them as slow."""
    for item in items:
        if TESTS not in item.path.parents or TESTS / "documents" in item.path.parents:
            item.add_marker("slow")


@pytest.fixture(scope="session")
def snippet_cache(tmp_path_factory):
    """What pages share: compiled programs, and an exported model."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "snippets"
    path.mkdir(exist_ok=True)
    return path
