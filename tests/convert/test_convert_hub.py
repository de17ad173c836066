"""A repository name in place of a folder, against a stand-in for the Hugging Face Hub."""

import subprocess
import sys

import huggingface_hub.constants as constants
import pytest
import sources
import stand_in_hub
from mistral_jax.convert import hub

from mistral_jax.checkpoint import manifest


@pytest.fixture
def server(tmp_path):
    """A Hub on this machine with the repository nobody/tiny; remembers which files it gave."""
    root = tmp_path / "repository"
    with stand_in_hub.serve({"nobody/tiny": root}) as running:
        running.root = root
        yield running


def convert(server, tmp_path, *arguments, **variables):
    """Runs the command in a process of its own, whose Hub is the stand-in."""
    environment = stand_in_hub.environment(server.server_port, tmp_path / "cache") | variables
    command = [sys.executable, "-m", "mistral_jax.convert", "to-orbax", *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def test_only_what_is_needed_is_fetched(server, tmp_path):
    for format in ("hf-safetensors", "official-safetensors", "hf-torch"):
        sources.write(server.root, format, parts=1 + (format == "hf-safetensors"))
    sources.write_tokenizer(server.root / "tokenizer.model")
    (server.root / "README.md").write_text("not needed")
    done = convert(server, tmp_path, "nobody/tiny", str(tmp_path / "x"))
    assert done.returncode == 0, done.stderr
    needed = {"config.json", "model.safetensors.index.json", "tokenizer.model"}
    needed |= {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert needed <= set(server.given) <= needed | {"params.json"}
    assert "model-00001-of-00002.safetensors" in done.stderr or "Fetching" in done.stderr
    found = manifest.read(tmp_path / "x")[1]
    assert found["source"] == f"nobody/tiny@{stand_in_hub.COMMIT}"
    assert found["source_format"] == "hf-safetensors"

    server.given.clear()
    done = convert(server, tmp_path, "nobody/tiny", str(tmp_path / "y"), "--format", "official")
    assert done.returncode == 0, done.stderr
    assert manifest.read(tmp_path / "y")[1]["source_format"] == "official-safetensors"
    assert "consolidated.safetensors" in server.given
    assert not any(name.startswith("model") for name in server.given), "what is there is kept"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/other", "there is none of that name, or it is private"),
        ("nobody/gated", "ask for access at https://huggingface.co/nobody/gated"),
    ],
)
def test_what_the_hub_does_not_give(server, tmp_path, name, message):
    server.root.mkdir()
    done = convert(server, tmp_path, name, str(tmp_path / "x"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {name} is no folder, and the Hub does not give it: {message}")


def test_a_hub_that_does_not_answer(server, tmp_path):
    server.root.mkdir()
    port = server.server_port
    server.server_port = 9  # nobody listens there
    done = convert(server, tmp_path, "nobody/tiny", str(tmp_path / "x"))
    server.server_port = port
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: nobody/tiny is no folder, and the Hub does not give it: ")


OFFLINE = ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"})


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param(OFFLINE[0], id="told so"),
        pytest.param(OFFLINE[1], id="no network", marks=pytest.mark.slow),
    ],
)
def test_what_is_cached_is_read_without_a_network(server, tmp_path, variables):
    """Also what another program fetched, by the name of a branch."""
    sources.write(tmp_path / "repository", "hf-safetensors", parts=2)
    snapshot = stand_in_hub.cached(tmp_path / "cache", "nobody/tiny", server.root)
    done = convert(server, tmp_path, "nobody/tiny", str(tmp_path / "x"), **variables)
    assert done.returncode == 0, done.stderr
    assert not server.given
    commit = snapshot.name
    said = (
        f"nobody/tiny is read from the Hub's cache, which has no tokenizer of it, commit {commit}"
    )
    assert said in done.stderr
    assert manifest.read(tmp_path / "x")[1]["source"] == f"nobody/tiny@{commit}"
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    done = convert(server, tmp_path, "nobody/tiny", str(tmp_path / "y"), **variables)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "nobody/tiny is in the Hub's cache in part only, and the Hub does not give the" in line
    assert "nobody/tiny has no model-00002-of-00002.safetensors" in line
    assert not (tmp_path / "y").exists()


def test_what_is_not_cached_is_not_read_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    with pytest.raises(ValueError, match=r"does not give it: .* nor is it in the Hub's cache$"):
        hub.fetch("nobody/other")
    (tmp_path / "empty").mkdir()
    stand_in_hub.cached(tmp_path / "cache", "nobody/other", tmp_path / "empty")
    with pytest.raises(ValueError, match=r"in part only.* nobody/other holds no checkpoint"):
        hub.fetch("nobody/other")


@pytest.mark.slow
def test_what_was_fetched_once_is_read_without_a_network(server, tmp_path):
    sources.write(server.root, "official-safetensors")
    for name, variables in (("x", {}), ("y", OFFLINE[0])):
        done = convert(server, tmp_path, "nobody/tiny", str(tmp_path / name), **variables)
        assert done.returncode == 0, done.stderr
    assert manifest.read(tmp_path / "x") == manifest.read(tmp_path / "y")


def test_a_repository_without_a_checkpoint(server, tmp_path):
    server.root.mkdir()
    (server.root / "README.md").touch()
    done = convert(server, tmp_path, "nobody/tiny", str(tmp_path / "x"))
    assert done.returncode == 2
    assert "nobody/tiny holds no checkpoint to convert" in done.stderr.splitlines()[-1]


def test_without_the_extra_the_command_to_install_it_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'huggingface_hub>=1\.0'"):
        hub.fetch("nobody/tiny")


def test_what_is_a_repository_s_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_repository("mistralai/Mistral-7B-v0.1")
    for name in ("folder", "./a/b", "../b", "/a/b", "a/b/c", "a/", "a b/c", ""):
        assert not hub.is_repository(name), name
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert not hub.is_repository("a/b")
