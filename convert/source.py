"""Recognises a source, a folder with a PyTorch checkpoint, and locates its tensors.

Files are memory-mapped, so tensors are read only when they are used.
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
    """The names of the files of one format; `{}` stands for the number of a part."""

    config: str
    weights: str
    index: str | None


FORMATS = {  # in order of preference: safetensors first, then the more complete config
    "hf-safetensors": Format("config.json", "model.safetensors", "model.safetensors.index.json"),
    "official-safetensors": Format(
        "params.json", "consolidated.safetensors", "consolidated.safetensors.index.json"
    ),
    "hf-torch": Format("config.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    "official-torch": Format("params.json", "consolidated.{}.pth", None),
}


# Maximum bytes of an index; one for 1,000 tensors takes about 100,000.
_MOST_INDEX = 8 << 20
_INDEX_RULES = {"weight_map": table_of(string())}

TOKENIZERS = ("tokenizer.model", "tokenizer.model.v3", "tokenizer.model.v2", "tokenizer.model.v1")
# Files of Hugging Face's format that, like the config, may name the tokens that end an answer.
DETAILS = ("generation_config.json", "tokenizer_config.json", "added_tokens.json")


class Tensor(NamedTuple):
    """A memory-mapped tensor, or one part of it, and its file."""

    file: Path
    array: np.ndarray


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder with a PyTorch checkpoint.

    Attributes:
      folder: path of the folder.
      format: key of `FORMATS`.
      weight_files: files that hold the tensors; all of them exist.
      tokenizer_file: SentencePiece file, or None.
      detail_files: existing files of `DETAILS`, if the format is Hugging Face's.
      other_formats: other keys of `FORMATS` that the folder holds a checkpoint for.
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
        """The files that a conversion reads."""
        named = (self.config_file, self.tokenizer_file)
        return (*(file for file in named if file), *self.detail_files, *self.weight_files)

    def stamps(self) -> dict[str, str]:
        """Returns a stamp for each file by name; a stamp changes when the file changes.

        It is a hash of path, size, inode and times, which the recorded stamp does not reveal. Files
        are not read.
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
        """Whether tensor names and the order of rotary pairs are the official ones."""
        return self.format.startswith("official")

    def tensors(self, say: Callable[[str], None] = lambda note: None) -> dict[str, list[Tensor]]:
        """Returns the tensors by name: one each, or one for each part (`consolidated.NN.pth`).

        Args:
          say: called with a message if the state dict is nested in another dict.

        Raises:
          ValueError: a file is damaged, or two files hold the same tensor and are not parts.
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
      folder: path of the folder.
      format: a key of `FORMATS` or a prefix of one ("hf", "official"); None = the first match.
      names: names of the files in the folder, including files still to be downloaded; None = list
        the folder.

    Raises:
      ValueError: the folder holds no such checkpoint, or an incomplete one.
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
    """Returns the names of the files that hold the tensors; empty if the format does not match."""
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
    } or {
        int(match[1]): name  # The name in the first release of Mixtral 8x7B.
        for name in names
        if (match := re.fullmatch(r"consolidated\.(\d+)\.pt", name))
    }
    for number in range(max(numbers, default=-1)):
        if number not in numbers:
            ending = next(iter(numbers.values())).rpartition(".")[2]
            raise ValueError(f"{folder} has no consolidated.{number:02}.{ending}, but later parts")
    return [numbers[number] for number in sorted(numbers)]
