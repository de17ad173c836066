"""Recognises a source, a PyTorch checkpoint or a GGUF file, and locates its tensors.

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

from . import fp8, gguf, gguf_model, gguf_tokenizer, torch_zip


class Format(NamedTuple):
    """The names of the files of one format; `{}` stands for the number of a part.

    Attributes:
      config: the file that describes the architecture; None = the weights' file does.
      weights: the file of the weights, or of one part of them.
      index: the file that names the parts; None = their own names do.
    """

    config: str | None
    weights: str
    index: str | None


FORMATS = {  # in order of preference: safetensors first, then the more complete config
    "hf-safetensors": Format("config.json", "model.safetensors", "model.safetensors.index.json"),
    "official-safetensors": Format(
        "params.json", "consolidated.safetensors", "consolidated.safetensors.index.json"
    ),
    "hf-torch": Format("config.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    "official-torch": Format("params.json", "consolidated.{}.pth", None),
    "gguf": Format(None, "NAME.gguf", None),
}


# Maximum bytes of an index; one for 1,000 tensors takes about 100,000.
_MOST_INDEX = 8 << 20
_INDEX_RULES = {"weight_map": table_of(string())}

# The names of tokenizer files in the order of preference.
TOKENIZERS = (
    *("tokenizer.model", "tokenizer.model.v3", "tokenizer.model.v2", "tokenizer.model.v1"),
    *("tekken.json", "tokenizer.json"),
)
# Files of Hugging Face's format that, like the config, may name the tokens that end an answer.
DETAILS = (
    *("generation_config.json", "tokenizer_config.json"),
    *("added_tokens.json", "special_tokens_map.json"),
)
# Files of that format with chat templates.
CHATS = (
    *("chat_template.jinja", "chat_template.json"),
    "additional_chat_templates/tool_use.jinja",
)


# The text model's place in a Hugging Face model that reads images too.
_TEXT_MODEL = re.compile(r"(model\.)?language_model\.(model\.)?(?P<name>.+)", re.DOTALL)


class Tensor(NamedTuple):
    """A memory-mapped tensor, or one part of it, and its file.

    Attributes:
      file: the file.
      array: the stored values; NumPy dequantises those of a GGUF file.
      scale: the factor of values in FP8; None = the values are those that are stored.
    """

    file: Path
    array: np.ndarray | gguf.Quantized
    scale: np.ndarray | None = None

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the values."""
        return self.array.dtype if self.scale is None else fp8.RESULT

    def read(self) -> np.ndarray:
        """Returns the values: a view of the file, unless they are quantised."""
        array = np.asarray(self.array)
        return array if self.scale is None else fp8.dequantize(array, self.scale)


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder with a PyTorch checkpoint or a GGUF file.

    Attributes:
      folder: path of the folder.
      format: key of `FORMATS`.
      weight_files: files that hold the tensors; all of them exist.
      tokenizer_file: the first of `TOKENIZERS` that exists, or None.
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
        config = FORMATS[self.format].config
        return self.weight_files[0] if config is None else self.folder / config

    @property
    def name(self) -> str:
        """The name of the folder or of the GGUF file."""
        file = self.weight_files[0] if self.format == "gguf" else self.folder
        return file.resolve().name.removesuffix(".gguf")

    @property
    def details(self) -> Path:
        """The folder of the tokenizer and of the files that describe it."""
        packed = self.format == "gguf" and self.tokenizer_file
        return self.tokenizer_file.parent if packed else self.folder

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that a conversion reads, without those that `unpacked` wrote."""
        named = (self.config_file, self.tokenizer_file, *self.detail_files, *self.weight_files)
        found = dict.fromkeys(file for file in named if file and file.parent == self.folder)
        chats = (self.folder / name for name in CHATS if self.format.startswith("hf"))
        return (*found, *(file for file in chats if file.is_file()))

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
        return not self.format.startswith("hf")

    def unpacked(self, folder: Path) -> "Source":
        """Writes the tokenizer that a GGUF file holds into a folder, as files of its own.

        Returns:
          The source with these files; other formats have such files, and are returned unchanged.

        Raises:
          ValueError: the file is damaged, or its tokenizer is of an unknown kind.
        """
        if self.format != "gguf":
            return self
        made = gguf_tokenizer.files(gguf.read(self.config_file).metadata, self.config_file)
        for name, data in made.items():
            (folder / name).write_bytes(data)
        tokenizer = next((folder / name for name in TOKENIZERS if name in made), None)
        details = tuple(folder / name for name in DETAILS if name in made)
        return dataclasses.replace(self, tokenizer_file=tokenizer, detail_files=details)

    def tensors(self, say: Callable[[str], None] = lambda note: None) -> dict[str, list[Tensor]]:
        """Returns the tensors by name: one each, or one for each part (`consolidated.NN.pth`).

        Args:
          say: called with a message if the state dict is nested in another dict.

        Raises:
          ValueError: a file is damaged, or two files hold the same tensor and are not parts.
        """
        if self.format == "gguf":
            held = gguf_model.tensors(self.weight_files)
            return {name: [Tensor(*tensor)] for name, tensor in held.items()}
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
        return _scaled(found if self.official else _text_names(found))


def _text_names(found: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """Renames the tensors of a text model within another model to those of the text model alone."""
    renamed = {}
    for name, places in found.items():
        if match := _TEXT_MODEL.fullmatch(name):
            inner = match["name"]
            name = inner if inner.startswith("lm_head.") else f"model.{inner}"
        if name in renamed:
            raise ValueError(
                f"tensor {name} is in {places[0].file} with several prefixes; expected it once"
            )
        renamed[name] = places
    return renamed


def _scaled(found: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """Joins each tensor in FP8 and its scale."""
    scales = {name: places[0].array for name, places in found.items() if fp8.is_scale(name)}
    used = set()
    for name, places in found.items():
        if places[0].array.dtype == fp8.DTYPE:
            scale, value = fp8.find_scale(name, places[0].array.shape, scales)
            used.add(scale)
            found[name] = [place._replace(scale=value) for place in places]
    return {name: places for name, places in found.items() if name not in used}


def find(
    folder: Path | str, format: str | None = None, names: Collection[str] | None = None
) -> Source:
    """Recognises a source by the names of its files.

    Args:
      folder: path of the folder, or of a GGUF file.
      format: a key of `FORMATS` or a prefix of one ("hf", "official"); None = the first match.
      names: names of the files in the folder, including files still to be downloaded; None = list
        the folder.

    Raises:
      ValueError: the folder holds no such checkpoint, or an incomplete one.
    """
    folder = Path(folder)
    if names is None and folder.suffix == ".gguf" and folder.is_file():
        return Source(folder.parent, "gguf", tuple(gguf.parts(folder)), None, (), ())
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
        if files and _has_config(name, names) and names.issuperset(files)
    ]
    wanted = [name for name in FORMATS if name.startswith(format or "") and weights[name]]
    for name in wanted:
        others = tuple(other for other in whole if other != name)
        hint = f" (it also holds {' and '.join(others)}: see --format)" if others else ""
        if not _has_config(name, names):
            continue
        if name == "gguf" and len(gguf.parts(folder / weights[name][0])) != len(weights[name]):
            raise ValueError(f"{folder} holds {' and '.join(weights[name][:3])}; name one file")
        missing = [file for file in weights[name] if file not in names]
        if missing:
            raise ValueError(f"{folder} has no {missing[0]}, which its index names{hint}")
        # The official formats have no tokenizer.json.
        known = [file for file in TOKENIZERS if name.startswith("hf") or file != "tokenizer.json"]
        tokenizer = next((folder / file for file in known if file in names), None)
        files = tuple(folder / file for file in weights[name])
        details = [folder / file for file in DETAILS if file in names and name.startswith("hf")]
        return Source(folder, name, files, tokenizer, tuple(details), others)
    if wanted:
        file, config = weights[wanted[0]][0], FORMATS[wanted[0]].config
        raise ValueError(f"{folder} has {file} but no {config}; expected both")
    kinds = ", ".join(
        kind.weights.format("00") + (f" with {kind.config}" if kind.config else "")
        for name, kind in FORMATS.items()
        if name.startswith(format or "")
    )
    raise ValueError(f"{folder} holds no checkpoint to convert; expected {kinds}")


def _has_config(format: str, names: Collection[str]) -> bool:
    config = FORMATS[format].config
    return config is None or config in names


def _weight_files(folder: Path, format: Format, names: Collection[str]) -> list[str]:
    """Returns the names of the files that hold the tensors; empty if the format does not match."""
    if format.config is None:
        return sorted(name for name in names if name.endswith(".gguf"))
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
