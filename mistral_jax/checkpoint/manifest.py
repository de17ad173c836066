"""The `config.json` of a checkpoint folder, which describes the model and the size of its files.

`examine` compares the folder with it. Beside it, `checksums.json` holds the CRC-32 of every other
file.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mistral_jax.base.fields import check_table, integer, show, string, table_of
from mistral_jax.base.files import read_json, read_text
from mistral_jax.checkpoint import checksums, folder, zarr
from mistral_jax.checkpoint.checksums import Checksums
from mistral_jax.config import ModelConfig
from mistral_jax.tokens.chat import NAMES, ChatForm

FORMAT_VERSION = 1
# The files of chat templates by the names of the templates, and their largest size in bytes.
TEMPLATES = {"default": "chat_template.jinja", "tool_use": "chat_template_tool_use.jinja"}
MOST_TEMPLATE = 1 << 20

# The files of a checkpoint of this version or an earlier one.
_FILES = re.compile(
    r"config\.json|checksums\.json|generation_config\.json|tokenizer(_config)?\.json"
    r"|special_tokens_map\.json|added_tokens\.json"
    r"|tokenizer\.model|tekken\.json|chat_template(_tool_use)?\.jinja"
    r"|params/(orbax\.checkpoint|_CHECKPOINT_METADATA|commit_success\.txt)"
    r"|params/state/_METADATA"
    r"|params/state/\w+(\.\w+)*/(\.zarray|zarr\.json|c(/\d+)+|\d+(\.\d+)*)"
)
_RULES = {
    "model": table_of(),
    "params": table_of(),
    "provenance": table_of(),
    "checksums": string(),
    "chat_form": string(*NAMES),
    "chat_tokens": table_of(string()),
    "chat_spaces": string("each", "first"),
}
_EXTENT_RULES = {"files": integer(0, 1 << 40), "bytes": integer(0, 1 << 60)}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Manifest(NamedTuple):
    """The contents of a checkpoint folder.

    Attributes:
      config: the architecture.
      provenance: the origin of the model, any JSON values.
      arrays: the stored arrays, as `zarr.stored` describes them; None = they are in Zarr 3, which
        the first versions wrote.
    """

    config: ModelConfig
    provenance: dict[str, Any]
    arrays: dict[str, zarr.Array] | None


def is_checkpoint(path: Path | str) -> bool:
    """Tells whether a folder has the parts of this package's checkpoints, not of PyTorch ones."""
    return (Path(path) / "config.json").is_file() and (Path(path) / "params").is_dir()


def kept(path: Path) -> str | None:
    """Returns the reason why a checkpoint may not replace a folder, or None; see `folder.whole`."""
    if reason := folder.foreign(path, _FILES):
        return reason
    try:
        _contents(path / "config.json")
    except (ValueError, OSError):
        return "has no config.json that this program wrote"
    return None


def read(path: Path | str) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads the architecture and the provenance of a checkpoint folder.

    Raises:
      ValueError: the folder is not a complete checkpoint, or has a later format.
    """
    return examine(path)[:2]


def examine(path: Path | str) -> Manifest:
    """Reads the description of a checkpoint folder, and checks that all files are there.

    Raises:
      ValueError: the folder is not a complete checkpoint, or has a later format; the message names
        the file.
    """
    path = Path(path)
    if not is_checkpoint(path):
        raise ValueError(_what_instead(path))
    file, params = path / "config.json", path / "params"
    contents = _contents(file)
    config = ModelConfig.from_dict(contents["model"], str(file))
    arrays = None if zarr.is_other(params) else zarr.stored(params)
    found, expected = _extent(params), contents["params"]
    if found != {name: expected[name] for name in _EXTENT_RULES}:
        raise ValueError(
            f"{params} has {found['bytes']} bytes in {found['files']} files; expected "
            f"{expected['bytes']} bytes in {expected['files']} files: copy it again"
        )
    return Manifest(config, contents["provenance"], arrays)


def read_chat(path: Path | str) -> ChatForm | None:
    """Reads the chat form of a checkpoint folder; None = it names none, and has the tokenizer's.

    Raises:
      ValueError: the description is invalid, or the template's file is missing.
    """
    contents = _contents(Path(path) / "config.json")
    if (name := contents.get("chat_form")) is None:
        return None
    files = {key: Path(path) / file for key, file in TEMPLATES.items()}
    templates = {
        key: read_text(file, MOST_TEMPLATE) for key, file in files.items() if file.is_file()
    }
    if name == "template" and "default" not in templates:
        raise ValueError(
            f"{path} has no {TEMPLATES['default']}, which its chat form needs: copy it again"
        )
    spaces = contents.get("chat_spaces", "each")
    return ChatForm(name, templates, contents.get("chat_tokens", {}), spaces)


def verify(path: Path | str) -> Checksums:
    """Compares the checksums of all files of a checkpoint except those of its arrays.

    Returns:
      The checksums of the arrays' files, for `zarr.verify`. They are empty for a checkpoint of an
      early version, which wrote no checksums.

    Raises:
      ValueError: a file is not the one that was written.
    """
    path = Path(path)
    total = _contents(path / "config.json").get("checksums")
    if total is not None:
        checksums.check_file(path / checksums.NAME, total)
    sums = checksums.read(path)
    for name in sums:
        if not name.startswith("params/"):
            checksums.check_file(path / name, sums[name])
    return {name.removeprefix("params/"): total for name, total in sums.items()}


def write(
    path: Path,
    config: ModelConfig,
    provenance: Mapping[str, Any],
    sums: Mapping[str, str] | None = None,
    chat: ChatForm | None = None,
) -> None:
    """Writes `config.json`, `checksums.json` and chat templates into a folder with the other files.

    Args:
      path: the folder.
      config: the architecture.
      provenance: the origin of the model, as JSON values.
      sums: the checksums of the files in `params/`, as `zarr.write` returns them; those of other
        files are computed here. None = write no checksums.
      chat: the chat form; None = that of the tokenizer's version.
    """
    contents: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "model": config.to_dict(),
        "params": _extent(path / "params"),
        "provenance": dict(provenance),
    }
    if chat is not None:
        contents["chat_form"] = chat.name
        if chat.templates:
            contents |= {"chat_tokens": dict(chat.tokens), "chat_spaces": chat.spaces}
        for key, text in chat.templates.items():
            (path / TEMPLATES[key]).write_text(text, encoding="utf-8", newline="")
    if sums is not None:
        checksums.write(path, {f"params/{name}": total for name, total in sums.items()})
        contents["checksums"] = checksums.of_file(path / checksums.NAME)
    _write_json(path / "config.json", contents)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def _contents(file: Path) -> dict[str, Any]:
    """Reads `config.json`, and checks the types of its values."""
    contents = read_json(file)
    version = contents.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version {show(version)}; this version of mistral_jax reads up to "
            f"{FORMAT_VERSION}"
        )
    for key in ("model", "params", "provenance"):
        contents.setdefault(key, None)
    check_table(contents, _RULES, str(file))
    for key in _EXTENT_RULES:
        contents["params"].setdefault(key, None)
    check_table(contents["params"], _EXTENT_RULES, f"{file}, params")
    return contents


def _extent(path: Path) -> dict[str, int]:
    """Returns the number and total size of the files in a folder, which show a partial copy."""
    sizes = []
    for place, inner, names in os.walk(path):
        inner[:] = [name for name in inner if not folder.is_stray(name)]
        own = [name for name in names if not folder.is_stray(name)]
        sizes += [os.stat(os.path.join(place, name)).st_size for name in own]
    return {"files": len(sizes), "bytes": sum(sizes)}


def _what_instead(path: Path) -> str:
    """Returns a message for a folder that is not a checkpoint, with the remedy."""
    if not path.is_dir():
        if not path.exists() and _HUB_NAME.fullmatch(str(path)):
            return (
                f"there is no folder {path}; if it is a repository of the Hugging Face Hub, "
                f"convert it first: python -m mistral_jax.convert to-orbax {path} {path.name}"
            )
        return f"{path} is no folder; expected a checkpoint"
    config = path / "config.json"
    if (path / "params.json").is_file() or (config.is_file() and "model_type" in read_json(config)):
        return (
            f"{path} holds a PyTorch checkpoint; convert it first: python -m mistral_jax.convert "
            f"to-orbax {path} {path}-orbax"
        )
    missing = [name for name in ("config.json", "params") if not (path / name).exists()]
    return f"{path} is no whole checkpoint: it has no {' and no '.join(missing)}"
