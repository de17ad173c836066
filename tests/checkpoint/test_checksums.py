"""Laws of checksums: what was written passes, whatever differs is named, earlier ones count too."""

import json
import zlib

import pytest

from mistral_jax.checkpoint import checksums

CONTENTS = {"a": b"", "b/c": b"data", "b/d.bin": bytes(3 << 20)}


def earlier(folder):
    """Writes what runs of earlier versions have in place of `checksums.json`."""
    files = {name: [len(data), zlib.crc32(data)] for name, data in CONTENTS.items()}
    (folder / "sums.json").write_text(json.dumps({"files": files}) + "\n")


@pytest.fixture(params=[checksums.write, earlier])
def folder(tmp_path, request):
    (tmp_path / "b").mkdir()
    for name, data in CONTENTS.items():
        (tmp_path / name).write_bytes(data)
    request.param(tmp_path)
    return tmp_path


def test_either_format_has_a_checksum_of_every_file(folder):
    assert checksums.read(folder) == {
        name: checksums.of_bytes(data) for name, data in CONTENTS.items()
    }
    checksums.check(folder, "x")


@pytest.mark.parametrize("name", CONTENTS)
def test_what_differs_is_named_with_the_remedy(folder, name):
    file = folder / name
    file.write_bytes(CONTENTS[name] + b"x")
    with pytest.raises(ValueError, match=rf"{file} is not the file that was written: .*: copy it$"):
        checksums.check(folder, "copy it")
    file.unlink()
    with pytest.raises(ValueError, match=rf"{file} is missing: copy it$"):
        checksums.check(folder, "copy it")


def test_known_checksums_are_taken_as_they_are(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(b"data")
    checksums.write(tmp_path, {"a": "0"})
    assert checksums.read(tmp_path) == {"a": "0", "b": checksums.of_bytes(b"data")}


@pytest.mark.parametrize("text", ['{"a": 1}', '{"a": null}', "[]"])
def test_a_damaged_list_is_named(tmp_path, text):
    (tmp_path / "checksums.json").write_text(text)
    with pytest.raises(ValueError, match=r"checksums\.json"):
        checksums.read(tmp_path)


def test_a_folder_without_them_is_not_compared(tmp_path):
    (tmp_path / "a").write_bytes(b"data")
    assert checksums.read(tmp_path) == {}
    checksums.check(tmp_path, "x")
