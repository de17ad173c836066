"""Laws of the readers: one set of rules for every file, nothing without a bound."""

import gzip
import os
import re

import pytest
import sources

from mistral_jax.base import files


@pytest.fixture
def fifo(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.mark.parametrize("read", [files.read_text, files.read_json, files.read_toml])
def test_only_regular_files_are_opened(read, tmp_path, fifo):
    for path, kind in ((fifo, "a pipe"), ("/dev/zero", "a device"), (tmp_path, "a folder")):
        with pytest.raises(ValueError, match=f"{path} is {kind}; expected a regular file"):
            read(path)
    with pytest.raises(ValueError, match=r"there is no file .*absent"):
        read(tmp_path / "absent")
    with pytest.raises(ValueError, match="is a pipe"):
        next(files.read_lines(fifo))


@pytest.mark.parametrize(
    ("read", "limit"), [(files.read_json, files.MOST_JSON), (files.read_toml, files.MOST_TOML)]
)
def test_a_size_is_looked_at_before_a_byte_is_read(read, limit, tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(limit + 1)
    with pytest.raises(ValueError, match=r"large has .* expected at most"):
        read(path)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_a_line_is_bounded(tmp_path, name):
    path = tmp_path / name
    with (gzip.open if name.endswith("gz") else open)(path, "wb") as file:
        file.write(b"a\n" + bytes(files.MOST_LINE + 1))
    lines = files.read_lines(path)
    assert next(lines) == (f"{path}, line 1", b"a\n")
    with pytest.raises(ValueError, match="line 2 has more than"):
        next(lines)


def test_a_mark_at_the_beginning_is_no_text(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(files.MARK + b'{"a": 1}')
    assert files.read_text(path) == '{"a": 1}'
    assert files.read_json(path) == {"a": 1}
    assert list(files.read_lines(path)) == [(f"{path}, line 1", b'{"a": 1}')]
    assert list(files.read_records(path)) == [(f"{path}, line 1", {"a": 1})]
    path.write_bytes(files.MARK + b"a = 1\r\n")
    assert files.read_toml(path) == {"a": 1}
    path.write_bytes(files.MARK + b"ab\xff")
    with pytest.raises(ValueError, match="byte 0xff at offset 5"):
        files.read_text(path)


def test_lines_end_at_line_feeds_alone():
    assert files.split_lines("a\u2028b\x0cc\x85d\r\ne\n") == ["a\u2028b\x0cc\x85d", "e", ""]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 200_000, "is nested too deeply"),
        ('{"a":' * 65 + "1" + "}" * 65, "is nested too deeply: expected at most 64 levels"),
        ('{"a": ' + "9" * 5000 + "}", "has an integer of too many digits"),
        ("3", "holds a JSON int; expected an object"),
    ],
)
def test_json_that_no_config_is(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        files.read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    "content",
    [
        "a = " + "[" * 100_000,
        "a = " + "{a = " * 100_000,
        "[" + ".".join(f"a{i}" for i in range(100_000)) + "]",
        "[" + ".".join(f'"a{i}"' for i in range(100_000)) + "]",
        "a" + ".a" * 80 + " = 1",
        "x = 1\ny = {a" + " . a" * 80 + " = 1}",
    ],
)
def test_toml_is_not_nested_deeply(tmp_path, content):
    (tmp_path / "r.toml").write_text(content)
    with pytest.raises(ValueError, match="is nested too deeply"):
        files.read_toml(tmp_path / "r.toml")


def test_what_git_leaves_in_place_of_a_file_is_called_so(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(sources.POINTER)
    for read in (files.read_bytes, files.read_text, files.read_json, files.read_toml):
        with pytest.raises(
            ValueError, match=r"x is a Git LFS pointer, not the .* `git lfs pull` in"
        ):
            read(path)
    with pytest.raises(ValueError, match="x is a Git LFS pointer, not the weights: run `git lfs"):
        files.check_content(path, "the weights")
    for content in (b"", b" \n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="x is empty; expected a JSON object"):
            files.read_json(path)


def test_toml_may_have_many_dots_that_nest_nothing(tmp_path):
    prompt, numbers = "wait" + "." * 100, [x / 2 for x in range(100)]
    (tmp_path / "r.toml").write_text(f"a.b = {numbers}\nc = '{prompt}'  # {prompt}\n")
    assert files.read_toml(tmp_path / "r.toml") == {"a": {"b": numbers}, "c": prompt}
