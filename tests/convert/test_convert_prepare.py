"""One name for a model, whatever form it is in."""

import os
import shutil

import pytest
import sources
import stand_in_hub
from mistral_jax.convert import hub
from mistral_jax.convert.prepare import prepare

from mistral_jax.checkpoint import checkpoint, manifest


def test_what_is_ready_is_left_as_it_is():
    assert prepare(None) is None
    assert prepare(str(checkpoint.BUNDLED)) == checkpoint.BUNDLED


def test_what_is_not_is_converted_once(tmp_path, capsys):
    source = tmp_path / "tiny"
    sources.write(source, "hf-safetensors")
    made = prepare(f"{source}/", tmp_path / "checkpoints")
    assert made == tmp_path / "checkpoints" / "tiny"
    assert manifest.read(made)[1]["source_format"] == "hf-safetensors"
    assert capsys.readouterr().err, "a conversion shows its progress"
    before = (made / "config.json").stat().st_mtime_ns
    assert prepare(source, tmp_path / "checkpoints") == made
    assert (made / "config.json").stat().st_mtime_ns == before
    assert not capsys.readouterr().err


def theta(made):
    return manifest.read(made)[0].rope_theta


def test_models_of_one_name_are_told_apart(tmp_path, capsys):
    """By their bytes: sizes and times may agree, as archives and copies have them."""
    folder = tmp_path / "checkpoints"
    for parent, base in (("a", 1e4), ("b", 2e4)):
        sources.write(tmp_path / parent / "merged", "hf-safetensors", rope_theta=base)
        for file in (tmp_path / parent / "merged").iterdir():
            os.utime(file, ns=(0, 0))
    first, second = (prepare(tmp_path / parent / "merged", folder) for parent in "ab")
    assert (theta(first), theta(second)) == (1e4, 2e4)
    assert (first.name, second.name) == ("merged", "merged-2")
    # Again, and as another copy of the same files.
    shutil.copytree(tmp_path / "b" / "merged", tmp_path / "c" / "merged")
    capsys.readouterr()
    for parent, made in (("a", first), ("b", second), ("c", second)):
        assert prepare(tmp_path / parent / "merged", folder) == made
    assert not capsys.readouterr().err


def test_a_source_that_has_changed_is_converted_again(tmp_path):
    source, folder = tmp_path / "tiny", tmp_path / "checkpoints"
    sources.write(source, "official-torch", rope_theta=1e4)
    assert theta(prepare(source, folder)) == 1e4
    sources.write(source, "official-torch", rope_theta=2e4)
    assert theta(prepare(source, folder)) == 2e4
    tensors = sources.tensors() | {"norm.weight": sources.tensors()["norm.weight"] * 2}
    sources.write(source, "official-torch", tensors, rope_theta=2e4)
    assert prepare(source, folder).name == "tiny-3"
    assert prepare(source, folder).name == "tiny-3"
    shutil.rmtree(source)
    with pytest.raises(
        ValueError, match=r"tiny does not exist; \S+checkpoints/tiny was made from a"
    ):
        prepare(source, folder)


def test_what_stands_in_its_place_is_left_alone(tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / "tiny").mkdir(parents=True)
    (folder / "tiny" / "notes.txt").touch()
    shutil.copytree(checkpoint.BUNDLED, folder / "tiny-2")
    made = prepare(sources.write(tmp_path / "tiny", "hf-safetensors"), folder)
    assert made.name == "tiny-3"
    assert [path.name for path in (folder / "tiny").iterdir()] == ["notes.txt"]


def test_repositories_of_one_name_are_told_apart(tmp_path, monkeypatch):
    """By theirs, and without asking the Hub again."""
    asked = []

    def fetch(repository, *_):
        asked.append(repository)
        (folder,) = (tmp_path / "hub").glob(f"models--{repository.replace('/', '--')}/snapshots/*")
        return sources_found(folder)

    sources_found = hub.find
    monkeypatch.setattr(hub, "fetch", fetch)
    for owner in ("acme", "other"):
        commit = tmp_path / "hub" / f"models--{owner}--tiny" / "snapshots" / stand_in_hub.COMMIT
        sources.write(commit, "hf-safetensors", rope_theta=1e4 if owner == "acme" else 2e4)
    folder = tmp_path / "checkpoints"
    sources.write(tmp_path / "tiny", "hf-safetensors", rope_theta=3e4)
    assert theta(prepare(tmp_path / "tiny", folder)) == 3e4
    for _ in range(2):
        assert theta(prepare("acme/tiny", folder)) == 1e4
        assert theta(prepare("other/tiny", folder)) == 2e4
    assert asked == ["acme/tiny", "other/tiny"]
    # The snapshot's folder is the same model by another name.
    assert prepare(commit, folder) == prepare("other/tiny", folder)
