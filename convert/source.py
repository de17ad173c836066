"""A source: a folder with a PyTorch checkpoint, recognised by its files, its tensors unread.

It knows where tensors lie, not what they mean. Every file is mapped into memory, never loaded.
"""

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mistral_jax import manifest
from mistral_jax.config import read_json

from . import safetensors_file, torch_zip


class Format(NamedTuple):
    """The files of one format; `{}` stands for the number of a part."""

    config: str
    weights: str
    index: str | None


FORMATS = {  # In order of preference: safetensors first, and of these the fuller config.
    "hf-safetensors": Format("config.json", "model.safetensors", "model.safetensors.index.json"),
    "official-safetensors": Format(
        "params.json", "consolidated.safetensors", "consolidated.safetensors.index.json"
    ),
    "hf-torch": Format("config.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    "official-torch": Format("params.json", "consolidated.{}.pth", None),
}


class Tensor(NamedTuple):
    """A tensor, or one part of it, as it lies in a file."""

    file: Path
    array: np.ndarray


@dataclasses.dataclass(frozen=True)
class Source:
    """A recognised folder.

    Attributes:
      folder: where it is.
      format: key of `FORMATS`.
      weight_files: those that hold its tensors, all there.
      tokenizer_file: SentencePiece model, or None.
      other_formats: what else the folder could be read as.
    """

    folder: Path
    format: str
    weight_files: tuple[Path, ...]
    tokenizer_file: Path | None
    other_formats: tuple[str, ...]

    @property
    def config_file(self) -> Path:
        """The file that describes the architecture."""
        return self.folder / FORMATS[self.format].config

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that a conversion reads."""
        named = (self.config_file, self.tokenizer_file)
        return (*(file for file in named if file), *self.weight_files)

    @property
    def official(self) -> bool:
        """Whether names and rotary pairs are the official ones."""
        return self.format.startswith("official")

    def tensors(self) -> dict[str, list[Tensor]]:
        """Maps every tensor's name to where it lies: one place, or one a part (`consolidated.NN`).

        Raises:
          ValueError: a file is damaged, or two files hold the same tensor of which each is whole.
        """
        reader = safetensors_file if self.format.endswith("safetensors") else torch_zip
        found: dict[str, list[Tensor]] = {}
        for file in self.weight_files:
            for name, array in reader.read(file).items():
                found.setdefault(name, []).append(Tensor(file, array))
        for name, places in found.items():
            if len(places) > 1 and self.format != "official-torch":
                files = " and ".join(place.file.name for place in places)
                raise ValueError(f"tensor {name} is in {files}; expected in one of them")
        return found


def find(folder: Path | str, format: str | None = None) -> Source:
    """Recognises a source by the names of its files.

    Args:
      folder: where it is.
      format: a key of `FORMATS` or its beginning ("hf", "official"); None = the first that fits.

    Raises:
      ValueError: the folder holds no such checkpoint, or only a part of one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file; name the folder that it is in" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {what}")
    if manifest.is_checkpoint(folder):
        raise ValueError(f"{folder} is an Orbax checkpoint already")
    wanted = [name for name in FORMATS if name.startswith(format or "")]
    weights = {name: files for name in FORMATS if (files := _weight_files(folder, FORMATS[name]))}
    whole = [name for name in weights if (folder / FORMATS[name].config).is_file()]
    for name in wanted:
        if name in whole:
            others = tuple(other for other in whole if other != name)
            for file in weights[name]:
                if not file.is_file():
                    hint = f" (or choose --format {' or '.join(others)})" if others else ""
                    raise ValueError(f"{folder} has no {file.name}, which its index names{hint}")
            return Source(folder, name, weights[name], _tokenizer_file(folder), others)
    for name in wanted:
        if name in weights:
            raise ValueError(
                f"{folder} has {weights[name][0].name} but no {FORMATS[name].config}; expected both"
            )
    kinds = ", ".join(f"{f.weights.format('00')} with {f.config}" for f in FORMATS.values())
    raise ValueError(
        f"{folder} holds no {format or ''} checkpoint; expected one of: {kinds}".replace("  ", " ")
    )


def _weight_files(folder: Path, format: Format) -> tuple[Path, ...]:
    if format.index is None:
        return _parts(folder)
    if (folder / format.weights).is_file():
        return (folder / format.weights,)
    index = folder / format.index
    if not index.is_file():
        return ()
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} has no weight_map; expected a file for each tensor")
    names = sorted(set(map(str, places.values())))
    for name in names:
        if name != Path(name).name:
            raise ValueError(f"{index} names the file {name!r}; expected one in the same folder")
    return tuple(folder / name for name in names)


def _parts(folder: Path) -> tuple[Path, ...]:
    numbers = {
        int(match[1]): path
        for path in folder.iterdir()
        if (match := re.fullmatch(r"consolidated\.(\d+)\.pth", path.name))
    }
    for number in range(max(numbers, default=-1)):
        if number not in numbers:
            raise ValueError(f"{folder} has no consolidated.{number:02}.pth, but later parts")
    return tuple(numbers[number] for number in sorted(numbers))


def _tokenizer_file(folder: Path) -> Path | None:
    names = ("tokenizer.model", "tokenizer.model.v3", "tokenizer.model.v2", "tokenizer.model.v1")
    return next((folder / name for name in names if (folder / name).is_file()), None)
