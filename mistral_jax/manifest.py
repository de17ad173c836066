"""The `config.json` of a checkpoint folder: what it describes, and whether all of it is there.

It knows nothing of arrays: those in `params/` are files to it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral_jax.config import ModelConfig
from mistral_jax.files import read_json

FORMAT_VERSION = 1


def is_checkpoint(path: Path | str) -> bool:
    """Tells whether a folder has the parts that a checkpoint has, and a PyTorch one has not."""
    return (Path(path) / "config.json").is_file() and (Path(path) / "params").is_dir()


def read(path: Path | str) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads the architecture and the provenance in a checkpoint folder.

    Raises:
      ValueError: the folder is no whole checkpoint, or of a later format.
    """
    path = Path(path)
    if not is_checkpoint(path):
        raise ValueError(_what_instead(path))
    file = path / "config.json"
    contents = read_json(file)
    version = contents.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version {version}; this version of mistral_jax reads up to "
            f"{FORMAT_VERSION}"
        )
    for key in ("model", "params", "provenance"):
        if not isinstance(contents.get(key), dict):
            raise ValueError(f"{file} has {contents.get(key)} as {key}; expected an object")
    found, expected = _extent(path / "params"), contents["params"]
    if found != expected:
        raise ValueError(
            f"{path / 'params'} has {found['bytes']} bytes in {found['files']} files; expected "
            f"{expected.get('bytes')} bytes in {expected.get('files')} files: copy it again"
        )
    return ModelConfig.from_dict(contents["model"], str(file)), contents["provenance"]


def write(path: Path, config: ModelConfig, provenance: Mapping[str, Any]) -> None:
    """Writes `config.json` into a folder whose `params/` is complete."""
    contents = {
        "format_version": FORMAT_VERSION,
        "model": config.to_dict(),
        "params": _extent(path / "params"),
        "provenance": dict(provenance),
    }
    text = json.dumps(contents, indent=2, ensure_ascii=False)
    (path / "config.json").write_text(text + "\n", encoding="utf-8")


def _extent(folder: Path) -> dict[str, int]:
    """Returns the number and the bytes of all files in a folder: those of a whole copy agree."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".DS_Store"]
    return {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}


def _what_instead(path: Path) -> str:
    """Returns a sentence on a folder that is no checkpoint."""
    if not path.is_dir():
        return f"{path} is no folder; expected a checkpoint"
    config = path / "config.json"
    if (path / "params.json").is_file() or (config.is_file() and "model_type" in read_json(config)):
        return (
            f"{path} holds a PyTorch checkpoint; convert it first: python -m mistral_jax.convert "
            f"to-orbax {path} {path}-orbax"
        )
    missing = [name for name in ("config.json", "params") if not (path / name).exists()]
    return f"{path} is no whole checkpoint: it has no {' and no '.join(missing)}"
