"""Names of models: those that others know, or none."""

import huggingface_hub.constants
import pytest
from stand_in_hub import COMMIT, cached

from mistral_jax.checkpoint import origin


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """A snapshot of acme/tiny in a cache of its own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    (tmp_path / "files" / "x").mkdir(parents=True)
    (tmp_path / "files" / "x" / "config.json").write_text("{}")
    return cached(tmp_path / "home", "acme/tiny", tmp_path / "files" / "x")


def test_the_cache_s_folders_have_the_hub_s_name(snapshot, tmp_path, monkeypatch):
    expected = f"acme/tiny@{COMMIT}"
    (snapshot / "original").mkdir()
    (tmp_path / "link").symlink_to(snapshot)
    for path in (snapshot, f"{snapshot}/", tmp_path / "link", snapshot / "original"):
        assert origin.hub_name(path) == expected, path
    monkeypatch.chdir(snapshot)
    assert origin.hub_name(".") == expected
    for other in (
        tmp_path,
        f"models--acme--tiny/{COMMIT}",
        "models--acme--tiny/snapshots/main",
        f"datasets--acme--tiny/snapshots/{COMMIT}",
        f"models--a--b--c/snapshots/{COMMIT}",
        f"models/snapshots/{COMMIT}",
        f"models--/snapshots/{COMMIT}",
    ):
        monkeypatch.chdir(tmp_path)
        assert origin.hub_name(other) is None, other
    assert origin.hub_name(f"models--tiny/snapshots/{COMMIT}") == f"tiny@{COMMIT}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (f"acme/tiny@{COMMIT}", "acme/tiny"),
        (f"tiny@{COMMIT}", "tiny"),
        ("acme/tiny", "acme/tiny"),
        (COMMIT, "acme/tiny"),  # As earlier versions called a snapshot's folder.
        (COMMIT[::-1], None),
        ("merged", None),
        ("/home/me/merged", None),
        ("../merged", None),
        ("/home/me/merged@2", None),
        ("a/b/c", None),
        ("", None),
        (None, None),
        ({"a": 1}, None),
    ],
)
def test_a_base_is_called_by_a_name_of_the_hub_or_not_at_all(snapshot, source, expected):
    assert origin.base_name(source) == expected


def test_the_main_branch_s_snapshot_is_taken(snapshot, tmp_path):
    other = cached(tmp_path / "home", "acme/tiny", tmp_path / "files" / "x", COMMIT[::-1])
    assert origin.snapshot("acme/tiny") == other
    refs = snapshot.parent.parent / "refs" / "main"
    refs.write_text(f"{COMMIT}\n")
    assert origin.snapshot("acme/tiny") == snapshot
    refs.unlink()  # As it is of what was fetched by its commit.
    (other / "later").touch()
    assert origin.snapshot("acme/tiny") == other
    assert origin.snapshot("acme/other") is None
