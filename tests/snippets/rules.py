"""Where commands of documents are not run as they stand: all exceptions are here.

Commands that would take minutes are given another option (`SHORTENED`); those that cannot run here
are checked in another way (`CHECKS`), which can fail.
"""

import ast
import dataclasses
import importlib.metadata
import json
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path

import jax
import yaml
from mistral_jax.convert import __main__ as convert
from packaging.requirements import Requirement

from mistral_jax.cli import evaluate, options, plan, serve, train
from mistral_jax.config import ModelConfig
from mistral_jax.parallel.sharding import read_layout
from mistral_jax.training.recipe import Recipe

jax.config.update("jax_num_cpu_devices", 8)  # for layouts that are shown

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PARSERS = {
    "mistral_jax.sample": options.parser,
    "mistral_jax.train": train._parser,
    "mistral_jax.serve": serve.parser,
    "mistral_jax.evaluate": evaluate._parser,
    "mistral_jax.plan": plan._parser,
    "mistral_jax.convert": convert._parser,
    "convert": convert._parser,
}

# What is added to commands that would take minutes: runs of a few steps, files of a few lines.
_FEW = (
    "--set steps=1 --set rows=2 --set microbatches=1 --set context=64 --set warmup_steps=0 "
    "--set sample_every=0"
)
_FEW_ON_EIGHT = _FEW.replace("rows=2", "rows=8")
_RECIPE = r"-m mistral_jax\.train (configs/training/\w+\.toml|\w+(?![\w./]))"
SHORTENED = (
    (rf"{_RECIPE}(?!.*--(preview|sharding))", _FEW),
    (rf"{_RECIPE}(?=.*--sharding)", _FEW_ON_EIGHT),
    (r"-m mistral_jax\.train examples/finetune/signatures\.toml(?!.*--preview)", _FEW),
    (r"--suite guardrails", "--limit 2"),
    (r"signatures\.py make (\S+)", r"&& sed -i '9,$ d' \1/test.jsonl"),
)

# What is shown is of the real model, or of the whole training: the letters differ.
UNCOMPARED = (
    r"mistral_jax\.plan mistral-7b-v0\.3 --sharding",  # where there is libtpu, the TPU's compiler
    r"mistral_jax\.train (?!.*--preview)",
    r"runs/signatures",
)

# What is run on one of the pages that show it: a stand-in is there for what others need of it.
ONCE = (
    r"python -m mistral_jax\.(plan mistral-7b|convert to-orbax mistralai/"
    r"|train (configs/training/lora\.toml|lora\b))"
)


def shorten(command: str) -> str:
    """Returns a command with what makes it short."""
    for pattern, added in SHORTENED:
        if found := re.search(pattern, command, re.DOTALL):
            command = f"{command} {found.expand(added)}"
    return command


def is_comparable(command: str) -> bool:
    """Tells whether a command prints here what it shows."""
    return not any(re.search(pattern, command, re.DOTALL) for pattern in UNCOMPARED)


def words_of(command: str) -> list[str]:
    """Splits a command as a shell does, without comments."""
    return shlex.split(command.replace("\\\n", " "), comments=True)


def check_parsed(page, command: str) -> str | None:
    """Parses a command of ours."""
    words = words_of(command)
    words = words[: next((i for i, word in enumerate(words) if word in "|&>"), None)]
    while "=" in words[0]:
        words.pop(0)
    python, module, name, *rest = words
    if f"{python} {module}" != "python -m" or name not in PARSERS:
        return "it is no command of ours"
    try:
        PARSERS[name]().parse_args(rest)
    except SystemExit as error:
        return "its options are wrong" if error.code else None
    return None


def options_of_benchmark(file: Path) -> set[str]:
    """Returns the options of a benchmark, which may need packages that are not installed."""
    return {
        node.args[0].value
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"
    }


def check_benchmark(page, command: str) -> str | None:
    """Looks the options of a benchmark up in its source."""
    _, file, *words = words_of(command)
    if not (ROOT / file).is_file():
        return f"there is no {file}"
    known = options_of_benchmark(ROOT / file)
    unknown = {word for word in words if word.startswith("--")} - known
    return f"it has no {min(unknown)}" if unknown else None


def check_pip(page, command: str) -> str | None:
    """Holds extras against pyproject.toml, addresses against the project's, names against both."""
    mine, url = PROJECT["optional-dependencies"], PROJECT["urls"]["Repository"]
    named = [Requirement(r).name for r in sum(mine.values(), PROJECT["dependencies"])]
    for word in words_of(command)[2:]:
        if word.startswith("-"):
            continue
        if word.startswith("git+"):
            word = f"{PROJECT['name']} @ {word}"
        found = Requirement(re.sub(r"^\.", PROJECT["name"], word))
        extras = mine if found.name == PROJECT["name"] else None
        if found.url and found.url != f"git+{url}":
            return f"{found.url} is not the project's address, {url}"
        if extras is None and found.name not in {*named, "libtpu"}:
            return f"the project does not use {found.name}"
        if extras is None and found.extras:
            extras = importlib.metadata.metadata(found.name).get_all("Provides-Extra")
        if unknown := found.extras - set(extras or ()):
            return f"{found.name} has no extra {min(unknown)}"
    return None


def _make(page, command: str) -> str | None:
    status, printed = page.bash(shlex.join(["make", "-n", *words_of(command)[1:]]))
    return printed if status else None


def _clone(page, command: str) -> str | None:
    url = PROJECT["urls"]["Repository"]
    return None if url in words_of(command) else f"expected {url}"


def _launcher(page, command: str) -> str | None:
    """Reads the files that a launcher is given."""
    files = [page.folder / w for w in words_of(command) if re.search(r"\.(sh|sbatch|yaml)$", w)]
    for file in files:
        if not file.is_file():
            return f"there is no {file.name}"
        if file.suffix == ".yaml":
            list(yaml.safe_load_all(file.read_text()))
        elif page.bash(f"bash -n {shlex.quote(str(file))}")[0]:
            return f"bash cannot read {file.name}"
    return None if files else "it names no file"


def _help(page, command: str) -> str | None:
    status, printed = page.bash(f"{command} --help")
    return printed if status else None


def _unread(page, command: str) -> str | None:
    """Looks up whether the packages are installed; what else it does, the page does before."""
    words = words_of(command)
    for name in words[words.index("--unread") + 1 :]:
        importlib.metadata.version(name)
    return None


CHECKS = (
    (r"(python -m )?pip install ", check_pip),
    (r"make ", _make),
    (r"git clone ", _clone),
    (r"(sbatch|kubectl|sky|bash|examples/tpu_pod\.sh) ", _launcher),
    (r"python benchmarks/", check_benchmark),
    # Takes a minute, or libtpu: tests/planning/test_planning.py holds the table to its arithmetic.
    (r"python -m mistral_jax\.plan mistral-7b-v0\.3 --quantize ", check_parsed),
    (r"python examples/finetune/signatures\.py make .*--unread", _unread),
    (r"hf auth ", _help),  # asks a person
    (r".* /shared/", check_parsed),  # is on a cluster
    (r".* --report equivalent-sizes .*results", check_parsed),
    # These need lm-evaluation-harness, which fetches its data, or results that it made.
    (r".* --(tasks|suite paper|report table)\b", check_parsed),
)


def check_of(command: str) -> Callable | None:
    """Returns the check of a command that cannot run here; None = it runs."""
    return next((check for pattern, check in CHECKS if re.match(pattern, command, re.DOTALL)), None)


def read_table(table: dict, folder: Path) -> None:
    """Reads a layout, a model or (a part of) a recipe as the project does."""
    if "mesh" in table:
        file, lines = folder / "shown.toml", ""
        for name, values in table.items():
            pairs = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
            lines += f"[{name}]\n{pairs}"
        file.write_text(lines)
        read_layout(file, ModelConfig.from_name("nano"), jax.devices()[:8])
    elif "vocab_size" in table:
        ModelConfig.from_dict(table, "the model shown")
    elif set(table) <= {field.name for field in dataclasses.fields(Recipe)}:
        lora = tomllib.loads((ROOT / "configs/training/lora.toml").read_text())
        lora["data"] = {"train": ["train.jsonl"]}
        Recipe.from_dict(lora | table, "the recipe shown")
    else:
        raise ValueError(f"a table of {', '.join(table)}; expected a layout, a model or a recipe")
