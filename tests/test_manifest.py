import json

import pytest
from tiny import build

from mistral_jax import manifest


@pytest.fixture
def checkpoint(tmp_path):
    """A folder that is a checkpoint as far as `manifest` looks."""
    (tmp_path / "params" / "sub").mkdir(parents=True)
    (tmp_path / "params" / "a").write_text("12345")
    (tmp_path / "params" / "sub" / "b").write_text("678")
    manifest.write(tmp_path, build()[0].config, {"source": "somewhere", "n": 1})
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
    (checkpoint / "params" / "a").write_text("1234")
    refused(
        checkpoint, r"params has 7 bytes in 2 files; expected 8 bytes in 2 files: copy it again"
    )
    (checkpoint / "params" / "sub" / "b").unlink()
    refused(checkpoint, r"has 4 bytes in 1 files; expected 8 bytes in 2 files")
    (checkpoint / "params" / "a").write_text("12345678")
    refused(checkpoint, r"has 8 bytes in 1 files; expected 8 bytes in 2 files")


def test_files_of_a_file_browser_do_not_count(checkpoint):
    (checkpoint / "params" / ".DS_Store").write_text("junk")
    assert manifest.read(checkpoint)


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
    refused(checkpoint, rf"config\.json has (None|3) as {key}; expected an object")


def test_a_config_of_an_architecture_that_is_none(checkpoint):
    change(checkpoint, model={"odd": 1})
    refused(checkpoint, r"config\.json: unknown key 'odd'")


def test_folders_that_are_no_checkpoint(tmp_path):
    refused(tmp_path / "nowhere", "nowhere is no folder; expected a checkpoint")
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
