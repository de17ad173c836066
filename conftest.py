"""Runs the commands and snippets of all documents as tests; tests/snippets says how."""

import os
from pathlib import Path
from unittest import mock

import processes
import pytest
from snippets import blocks
from sybil import Sybil

pytest_collect_file = Sybil(
    parsers=[blocks.parse],
    pattern="*.md",
    teardown=blocks.close,
    fixtures=["snippet_cache"],
).pytest()


ROOT = Path(__file__).parent
TESTS = ROOT / "tests"
# The folders with the longest files come first, so that no worker begins one of them at the end.
_LONG = ("notebooks", *(f"tests/{name}" for name in ("training", "parallel", "planning", "ops")))


def pytest_collection_modifyitems(items):
    """Marks documents, notebooks and the tests about them as slow, and has long files run first."""
    for item in items:
        if TESTS not in item.path.parents or TESTS / "documents" in item.path.parents:
            item.add_marker("slow")
    folders = [ROOT / name for name in _LONG]
    items.sort(key=lambda item: [folder not in item.path.parents for folder in folders])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Gives notebooks the settings of the tests; those of documents are a user's."""
    settings = processes.settings() if item.path.suffix == ".ipynb" else {}
    with mock.patch.dict(os.environ, settings):
        return (yield)


@pytest.fixture(scope="session")
def snippet_cache(tmp_path_factory):
    """What pages share: compiled programs, and an exported model."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "snippets"
    path.mkdir(exist_ok=True)
    return path
