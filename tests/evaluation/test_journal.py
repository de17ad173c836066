"""The journal: what is written is found again, whatever happened to the end of the file."""

import json

import pytest

from mistral_jax.evaluation.journal import Journal


def test_entries_are_found_by_a_later_run(tmp_path):
    path = tmp_path / "new" / "x.journal"
    with Journal(path, "a model") as journal:
        keys = [journal.key("score", ["x", "\ud800"]), journal.key("write", ["x"], 1)]
        journal.add(keys[0], [-1.5, True])
        journal.add(keys[1], "日本\n")
        # Each is in the file at once.
        assert len(path.read_bytes().splitlines()) == 2
    with Journal(path, "a model") as journal:
        assert len(journal) == 2
        assert [journal[key] for key in keys] == [[-1.5, True], "日本\n"]


def test_keys_differ_in_all_that_an_answer_depends_on():
    one, other = Journal(identity="a"), Journal(identity="b")
    requests = [("score", ["x"], 0), ("write", ["x"], 0), ("score", ["y"], 0), ("score", ["x"], 1)]
    keys = {own.key(*request) for own in (one, other) for request in requests}
    assert len(keys) == 8
    options = {"a": 1, "b": 2}
    assert one.key("x", ["", options]) == one.key("x", ["", dict(reversed(options.items()))])


@pytest.mark.parametrize("cut", range(1, 25))
def test_a_half_written_line_is_dropped(tmp_path, cut):
    path = tmp_path / "x.journal"
    with Journal(path) as journal:
        journal.add("one", 1)
        journal.add("two", 2)
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(path) as journal:
        assert len(journal) == 1
        journal.add("three", 3)
    with Journal(path) as journal:
        assert journal["three"] == 3
        assert "two" not in journal


@pytest.mark.parametrize(
    "line", [b"\0" * 40, b"[]", b'{"key": 1, "value": 2}', b'{"key": "a"}', b""]
)
def test_a_damaged_line_is_ignored(tmp_path, line):
    path = tmp_path / "x.journal"
    good = [json.dumps({"key": key, "value": 1}).encode() for key in ("one", "two")]
    path.write_bytes(b"\n".join([good[0], line, good[1], b""]))
    with Journal(path) as journal:
        assert len(journal) == 2
        assert "one" in journal
        assert "two" in journal


def test_two_runs_do_not_share_a_file(tmp_path):
    path = tmp_path / "x.journal"
    with Journal(path), pytest.raises(ValueError, match="is in use by another run"):
        Journal(path)
    Journal(path).close()
    with pytest.raises(ValueError, match="is a folder"):
        Journal(tmp_path)
