"""The recipes of CONTRIBUTING.md, followed in a copy of the repository: their tests pass there."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference

from mistral_jax.config import CHECKOUT

PAGE = (CHECKOUT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPES = dict(part.split("\n", 1) for part in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:])
# A block, and the file that it is, if a line above it names one.
BLOCK = re.compile(r"(?:`([^`\n]+)`:\n\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TESTS = re.compile(r"^Run `python (-m pytest [^`]+)`", re.MULTILINE)
HUNK = re.compile(r"((?:[ -].*\n)*)((?:\+.*\n)*)")


@pytest.fixture
def copy(tmp_path):
    """A copy of what the tests need, but for the bundled weights, which are the same files."""
    for name in ("mistral_jax", "convert", "configs", "tests"):
        ignored = shutil.ignore_patterns("assets", "__pycache__")
        shutil.copytree(CHECKOUT / name, tmp_path / name, ignore=ignored)
    (tmp_path / "mistral_jax" / "assets").symlink_to(CHECKOUT / "mistral_jax" / "assets")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, tmp_path)
    return tmp_path


def edit(path: Path, changes: str) -> None:
    """Makes the changes of a diff without line numbers, in the order of the file.

    Lines that stay or go must stand once below the last change; what is added follows them.
    """
    lines, start = path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 0
    for old, new in HUNK.findall(changes):
        old, new = old.splitlines(), [line[1:] for line in new.splitlines()]
        there = [line[1:] for line in old]
        places = [i for i in range(start, len(lines) + 1) if lines[i : i + len(there)] == there]
        if there:
            assert len(places) == 1, f"{path.name} has {there} {len(places)} times"
            start = places[0]
        new = [line[1:] for line in old if line[0] == " "] + new
        lines[start : start + len(there)] = new
        start += len(new)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def follow(recipe: str, folder: Path) -> list[str]:
    """Takes the steps of a recipe; returns the files that it touched."""
    touched = []
    for name, language, body in BLOCK.findall(recipe):
        if language == "diff":
            for part in re.split(r"^--- ", body, flags=re.MULTILINE)[1:]:
                path, changes = part.split("\n", 1)
                edit(folder / path, changes)
                touched.append(path)
        elif name:
            assert not (folder / name).exists(), f"there is a {name} already"
            (folder / name).write_text(body, encoding="utf-8")
            touched.append(name)
    return touched


def stand_in_for_transformers(folder: Path) -> None:
    """Writes the golden files of new cases from the float64 reference, for want of PyTorch."""
    tree = ast.parse((folder / "tests/golden/make_transformers.py").read_text(encoding="utf-8"))
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("BASE", "CASES")
    }
    keys = ("n_heads", "n_kv_heads", "sliding_window", "rope_theta")
    for name, (seed, *given, fields) in values["CASES"].items():
        path = folder / f"tests/golden/{name}.npz"
        if path.exists():
            continue
        config = values["BASE"] | dict(zip(keys, given, strict=True)) | fields
        tensors = reference.random_tensors(config, seed)
        about = {"config": config, "seed": seed, "tied": False}
        arrays, greedy = {"about": json.dumps(about)}, []
        for length in (1, 4, 5, 6, 17):
            tokens = np.random.default_rng(seed).integers(config["vocab_size"], size=length)
            arrays[f"tokens_{length}"] = tokens.astype(np.int32)
            arrays[f"logits_{length}"] = reference.forward(config, tensors, tokens)
        for _ in range(8):
            logits = reference.forward(config, tensors, [*tokens, *greedy])
            greedy.append(int(logits[-1].argmax()))
        np.savez_compressed(path, greedy=np.array(greedy, np.int32), **arrays)


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_there_are_four_recipes():
    names = [title.split(" ", 1)[1] for title in RECIPES]
    assert names == ["A model", "A kernel", "A layout", "A sampling filter"]


def test_an_edit_needs_its_lines_once_and_in_order(tmp_path):
    path = tmp_path / "file.py"
    for changes in (" c\n+x\n", " b\n+x\n", "-d\n+x\n a\n+x\n"):
        path.write_text("a\nb\nb\nd\n")
        with pytest.raises(AssertionError, match=r"file\.py has \['.'\] [02] times"):
            edit(path, changes)
    edit(path, " a\n+x\n b\n-b\n+y\n+\n-d\n")
    assert path.read_text() == "a\nx\nb\ny\n\n"


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_lands_and_its_tests_pass(copy, title):
    touched = follow(RECIPES[title], copy)
    stand_in_for_transformers(copy)
    where = run(copy, "-c", "import mistral_jax; print(mistral_jax.__file__)")
    assert Path(where.strip()).is_relative_to(copy)
    (tests,) = TESTS.findall(RECIPES[title])
    assert " passed" in run(copy, *shlex.split(" ".join(tests.split())), "-p", "no:cacheprovider")
    code = [path for path in touched if path.endswith(".py")]
    for how in (["check"], ["format", "--check"]) if code else ():
        run(copy, "-m", "ruff", *how, "--no-cache", *code)
    run(copy, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_folders.py")
