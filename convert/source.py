"""A source: a folder with a PyTorch checkpoint, recognised by its files, its tensors unread.

It knows where tensors lie, not what they mean. Every file is mapped into memory, never loaded.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mistral_jax.base.fields import check_table, show, string, table_of
from mistral_jax.base.files import read_json
from mistral_jax.checkpoint import manifest, safetensors_file

from . import torch_zip


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


# Bytes of an index; that of a model of 1,000 tensors has some 100,000.
_MOST_INDEX = 8 << 20
_INDEX_RULES = {"weight_map": table_of(string())}

TOKENIZERS = ("tokenizer.model", "tokenizer.model.v3", "tokenizer.model.v2", "tokenizer.model.v1")
# Beside a config of Hugging Face's format: they too may name the tokens that end an answer.
DETAILS = ("generation_config.json", "tokenizer_config.json", "added_tokens.json")


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
      detail_files: those of `DETAILS` that belong to the format.
      other_formats: what else the folder could be read as.
    """

    folder: Path
    format: str
    weight_files: tuple[Path, ...]
    tokenizer_file: Path | None
    detail_files: tuple[Path, ...]
    other_formats: tuple[str, ...]

    @property
    def config_file(self) -> Path:
        """The file that describes the architecture."""
        return self.folder / FORMATS[self.format].config

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that a conversion reads."""
        named = (self.config_file, self.tokenizer_file)
        return (*(file for file in named if file), *self.detail_files, *self.weight_files)

    def stamps(self) -> dict[str, str]:
        """Returns what changes with each of the files, without reading them, by their names.

        It tells neither their paths nor their times to others.
        """
        found = {}
        for file in self.files:
            status = file.stat()
            times = (status.st_mtime_ns, status.st_ctime_ns)
            told = (str(file.resolve()), status.st_size, status.st_ino, *times)
            found[file.name] = hashlib.sha256(repr(told).encode()).hexdigest()[:16]
        return found

    @property
    def official(self) -> bool:
        """Whether names and rotary pairs are the official ones."""
        return self.format.startswith("official")

    def tensors(self, say: Callable[[str], None] = lambda note: None) -> dict[str, list[Tensor]]:
        """Maps every tensor's name to where it lies: one place, or one a part (`consolidated.NN`).

        Args:
          say: is told what is not plain in a file.

        Raises:
          ValueError: a file is damaged, or two files hold the same tensor of which each is whole.
        """
        found: dict[str, list[Tensor]] = {}
        for file in self.weight_files:
            torch = self.format.endswith("torch")
            held = torch_zip.read(file, say) if torch else safetensors_file.read(file)
            for name, array in held.items():
                found.setdefault(name, []).append(Tensor(file, array))
        for name, places in found.items():
            if len(places) > 1 and self.format != "official-torch":
                files = " and ".join(place.file.name for place in places)
                raise ValueError(f"tensor {name} is in {files}; expected in one of them")
        return found


def find(
    folder: Path | str, format: str | None = None, names: Collection[str] | None = None
) -> Source:
    """Recognises a source by the names of its files.

    Args:
      folder: where it is.
      format: a key of `FORMATS` or its beginning ("hf", "official"); None = the first that fits.
      names: files that the folder has, or will have when they are needed; None = those it has.

    Raises:
      ValueError: the folder holds no such checkpoint, or only a part of one.
    """
    folder = Path(folder)
    if names is None and not folder.is_dir():
        what = "is a file; name the folder that it is in" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {what}")
    if manifest.is_checkpoint(folder):
        raise ValueError(f"{folder} is a checkpoint of this program already; expected PyTorch's")
    if names is None:
        names = {path.name for path in folder.iterdir()}
    weights = {name: _weight_files(folder, kind, names) for name, kind in FORMATS.items()}
    whole = [
        name
        for name, files in weights.items()
        if files and FORMATS[name].config in names and names.issuperset(files)
    ]
    wanted = [name for name in FORMATS if name.startswith(format or "") and weights[name]]
    for name in wanted:
        others = tuple(other for other in whole if other != name)
        hint = f" (it also holds {' and '.join(others)}: see --format)" if others else ""
        if FORMATS[name].config not in names:
            continue
        missing = [file for file in weights[name] if file not in names]
        if missing:
            raise ValueError(f"{folder} has no {missing[0]}, which its index names{hint}")
        tokenizer = next((folder / file for file in TOKENIZERS if file in names), None)
        files = tuple(folder / file for file in weights[name])
        details = [folder / file for file in DETAILS if file in names and name.startswith("hf")]
        return Source(folder, name, files, tokenizer, tuple(details), others)
    if wanted:
        file, config = weights[wanted[0]][0], FORMATS[wanted[0]].config
        raise ValueError(f"{folder} has {file} but no {config}; expected both")
    kinds = ", ".join(
        f"{kind.weights.format('00')} with {kind.config}"
        for name, kind in FORMATS.items()
        if name.startswith(format or "")
    )
    raise ValueError(f"{folder} holds no checkpoint to convert; expected {kinds}")


def _weight_files(folder: Path, format: Format, names: Collection[str]) -> list[str]:
    """Returns the names of the files that hold the tensors, if any are there."""
    if format.index is None:
        return _parts(folder, names)
    if format.weights in names:
        return [format.weights]
    if format.index not in names:
        return []
    index = folder / format.index
    described = read_json(index, _MOST_INDEX)
    check_table(described, _INDEX_RULES, str(index))
    if not described.get("weight_map"):
        raise ValueError(f"{index} has no weight_map; expected a file for each tensor")
    files = sorted(set(described["weight_map"].values()))
    for file in files:
        if file != Path(file).name or "\0" in file:
            raise ValueError(
                f"{index} names the file {show(file)}; expected one in the same folder"
            )
    return files


def _parts(folder: Path, names: Collection[str]) -> list[str]:
    numbers = {
        int(match[1]): name
        for name in names
        if (match := re.fullmatch(r"consolidated\.(\d+)\.pth", name))
    }
    for number in range(max(numbers, default=-1)):
        if number not in numbers:
            raise ValueError(f"{folder} has no consolidated.{number:02}.pth, but later parts")
    return [numbers[number] for number in sorted(numbers)]
