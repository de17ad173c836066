"""Finds or makes the checkpoint folder of a model, for notebooks."""

import hashlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral_jax.base.output import Screen
from mistral_jax.checkpoint import manifest, origin

from . import hub
from .source import Source, find
from .to_orbax import to_orbax


def prepare(model: Path | str | None, folder: Path | str = "checkpoints") -> Path | None:
    """Returns the checkpoint folder of a model, and converts the model if necessary.

    Notebooks call it with one name at the top that decides which model is used. A conversion shows
    its progress.

    Args:
      model: a checkpoint folder; or a source for `to_orbax`: the folder of a PyTorch checkpoint, or
        the name of a repository on the Hugging Face Hub. None = the bundled model.
      folder: folder for converted checkpoints. Each gets the last part of the model's name, with a
        number appended if that name is taken by another model or by other files.

    Returns:
      A folder, or None, for `mistral_jax.load`. An existing folder is returned only if it was made
      from the same repository, or from files with the same bytes.

    Raises:
      ValueError: as `to_orbax`; or the folder of the model no longer exists.
    """
    if model is None:
        return None
    if manifest.is_checkpoint(model):
        return Path(model)
    name = Path(model).resolve().name
    if hub.is_repository(model):
        source = None
    elif not Path(model).exists() and manifest.is_checkpoint(Path(folder) / name):
        raise ValueError(
            f"{model} does not exist; {Path(folder) / name} was made from a folder of that name: "
            "use that path instead"
        )
    else:
        source = find(model)
        name = (origin.base_name(origin.hub_name(model)) or source.name).rpartition("/")[2]
    for number in itertools.count(1):
        target = Path(folder) / (name if number == 1 else f"{name}-{number}")
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            to_orbax(model, target, progress=Screen())
            return target
        if manifest.is_checkpoint(target):
            provenance = manifest.read(target)[1]
            if source is None and origin.base_name(provenance.get("source")) == str(model):
                return target
            if source is not None and _made_from(source, provenance):
                return target


def _made_from(source: Source, provenance: Mapping[str, Any]) -> bool:
    """Returns whether a checkpoint was made from the files of a source.

    It reads files, smallest first, only if their stamps differ from those recorded.
    """
    if provenance.get("source_stamps") == source.stamps():
        return True
    sums = provenance.get("source_sha256")
    files = sorted(source.files, key=lambda file: file.stat().st_size)
    return (
        isinstance(sums, dict)
        and sums.keys() == {file.name for file in files}
        and all(sums[file.name] == _sha256(file) for file in files)
    )


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
