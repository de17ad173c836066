import json

import numpy as np
import pytest
from test_folder import STRAY
from tiny import build

from mistral_jax.checkpoint import arrays, manifest, zarr


@pytest.fixture
def checkpoint(tmp_path):
    """A folder that is a checkpoint as far as `manifest` looks."""
    params = tmp_path / "params"
    sums = zarr.lay_out(params, [("a",), ("b", "c")], arrays.HANDLER)
    for name in ("a", "b/c"):
        sums |= zarr.write(params, name, np.arange(5, dtype=np.float32))
    (tmp_path / "tokenizer.model").write_text("tokens")
    manifest.write(tmp_path, build()[0].config, {"source": "somewhere", "n": 1}, sums)
    return tmp_path


def refused(folder, message):
    with pytest.raises(ValueError, match=message) as error:
        manifest.read(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def change(folder, **fields):
    file = folder / "config.json"
    contents = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({key: value for key, value in contents.items() if value is not ...}))


def test_what_is_written_is_read(checkpoint):
    config, provenance = manifest.read(checkpoint)
    assert config == build()[0].config
    assert provenance == {"source": "somewhere", "n": 1}
    assert manifest.is_checkpoint(checkpoint)


def test_a_copy_that_is_not_whole(checkpoint):
    chunk = checkpoint / "params" / "state" / "a" / "0"
    chunk.write_bytes(bytes(19))
    refused(checkpoint, r"array a: .*/0 has 19 bytes; expected 20 in a regular file: copy it again")
    chunk.unlink()
    refused(checkpoint, r"array a has no file .*/state/a/0: copy it again")


def test_a_copy_that_differs_from_what_was_counted(checkpoint):
    """For files whose sizes nothing else tells."""
    file = checkpoint / "params" / "_CHECKPOINT_METADATA"
    whole = sum(x.stat().st_size for x in (checkpoint / "params").rglob("*") if x.is_file())
    file.write_text(file.read_text() + " ")
    refused(
        checkpoint,
        rf"params has {whole + 1} bytes in 7 files; expected {whole} bytes in 7 files: copy it",
    )


@pytest.mark.parametrize("name", STRAY)
def test_what_systems_leave_does_not_count(checkpoint, name):
    for place in ("", "params", "params/state", "params/state/a"):
        (checkpoint / place / name).write_text("junk")
    assert manifest.read(checkpoint)
    assert manifest.kept(checkpoint) is None


def test_checksums_are_of_all_files_and_of_each_other(checkpoint):
    sums = manifest.verify(checkpoint)
    zarr.verify(checkpoint / "params", sums, manifest.examine(checkpoint).arrays)
    assert manifest.FORMAT_VERSION == 1
    for name in ("tokenizer.model", "checksums.json"):
        file = checkpoint / name
        text = file.read_text()
        file.write_text(text.replace("0", "1", 1).replace("tok", "tik"))
        with pytest.raises(ValueError, match=f"{name} is not the file that was written: its CRC"):
            manifest.verify(checkpoint)
        file.unlink()
        with pytest.raises(ValueError, match=rf"there is no file .*{name}"):
            manifest.verify(checkpoint)
        file.write_text(text)
    change(checkpoint, checksums=...)
    assert manifest.verify(checkpoint) == sums, "they may be added to an earlier checkpoint"
    (checkpoint / "checksums.json").unlink()
    assert manifest.verify(checkpoint) == {}


def test_only_what_is_ours_and_nothing_else_may_be_replaced(checkpoint):
    assert manifest.kept(checkpoint) is None
    (checkpoint / "params" / "notes.txt").touch()
    assert manifest.kept(checkpoint) == "has params/notes.txt, which this program did not write"
    (checkpoint / "params" / "notes.txt").unlink()
    (checkpoint / "config.json").write_text('{"lr": 0.1}')
    assert manifest.kept(checkpoint) == "has no config.json that this program wrote"


def test_a_later_format_is_refused(checkpoint):
    change(checkpoint, format_version=2)
    refused(checkpoint, r"has format_version 2; this version of mistral_jax reads up to 1")


@pytest.mark.parametrize("version", [..., None, "1", 0, True])
def test_a_format_that_never_was(checkpoint, version):
    change(checkpoint, format_version=version)
    refused(checkpoint, r"config\.json has format_version .*; this version of mistral_jax reads")


@pytest.mark.parametrize("key", ["model", "params", "provenance"])
@pytest.mark.parametrize("value", [..., None, 3])
def test_a_config_that_lost_a_part(checkpoint, key, value):
    change(checkpoint, **{key: value})
    refused(checkpoint, rf"config\.json has {key} (None|3); expected an object")


@pytest.mark.parametrize("value", [None, "3", True, -1, 2.0, [3]])
@pytest.mark.parametrize("key", ["files", "bytes"])
def test_an_extent_of_another_type(checkpoint, key, value):
    change(checkpoint, params={"files": 7, "bytes": 7} | {key: value})
    refused(checkpoint, rf"config\.json, params has {key} .*; expected an integer")


def test_a_config_of_an_architecture_that_is_none(checkpoint):
    change(checkpoint, model={"odd": 1})
    refused(checkpoint, r"config\.json: unknown key 'odd'")


def test_folders_that_are_no_checkpoint(tmp_path):
    refused(tmp_path / "nowhere", "nowhere is no folder; expected a checkpoint")
    with pytest.raises(ValueError, match=r"no folder a/b-7B; .* to-orbax a/b-7B b-7B$"):
        manifest.read("a/b-7B")
    refused(tmp_path, r"no whole checkpoint: it has no config\.json and no params")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, r"no whole checkpoint: it has no params$")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, r"config\.json is not valid JSON")


@pytest.mark.parametrize(
    ("file", "content"), [("params.json", "{}"), ("config.json", '{"model_type": "mistral"}')]
)
def test_a_source_gets_the_command_that_converts_it(tmp_path, file, content):
    (tmp_path / file).write_text(content)
    command = f"python -m mistral_jax.convert to-orbax {tmp_path} {tmp_path}-orbax"
    refused(tmp_path, f"PyTorch checkpoint; convert it first: {command}$")
