"""Adapter files: read and write LoRA adapters in PEFT's format and in Mistral's.

For each adapted matrix a file holds A (R, in) and B (out, R); ours have heads in an axis of their
own. All adapters of a model have one scale here, whatever their ranks. A file may give each adapter
its own scale: `read` then multiplies `lora_b` by the difference.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from mistral_jax.base.fields import check_table, number, optional, table_of
from mistral_jax.base.files import read_json
from mistral_jax.checkpoint import folder, peft, peft_experts, safetensors_file
from mistral_jax.checkpoint.lora import HEAD, Lora
from mistral_jax.checkpoint.names import Weight, to_halves, to_pairs, weights
from mistral_jax.config import ModelConfig
from mistral_jax.parallel import distributed

PREFIX = "base_model.model."  # The names of all tensors in PEFT's files begin with it.
_DTYPES = ("float32", "bfloat16", "float16", "float64")
PEFT, PEFT_CONFIG, OFFICIAL = "adapter_model.safetensors", "adapter_config.json", "lora.safetensors"

# The files that `save` makes.
_FILES = re.compile(r"adapter_model\.safetensors|adapter_config\.json|lora\.safetensors")

# The default scale of mistral-inference.
_OFFICIAL_SCALE = 2.0

Pair = tuple[np.ndarray, np.ndarray]


class Place(NamedTuple):
    """A matrix of the model that can have an adapter.

    Attributes:
      weight: the names of the matrix in files.
      outputs: sizes of its output axes.
      inputs: sizes of its input axes.
    """

    weight: Weight
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]

    @property
    def path(self) -> tuple[str, ...]:
        """The path of its module in the tree of parameters."""
        return tuple(self.weight.path.split("/")[:-1])

    def names(self, official: bool) -> tuple[str, str]:
        """Returns the names of A and B in a file."""
        module = ("" if official else PREFIX) + self.weight.module(official)
        return f"{module}.lora_A.weight", f"{module}.lora_B.weight"

    def checked(self, pair: Sequence[np.ndarray], official: bool, where: Any) -> Pair:
        """Checks A and B of a file, and returns them in float32.

        Args:
          pair: A and B.
          official: whether the file is in Mistral's format.
          where: what the message names as their source.

        Raises:
          ValueError: a shape, rank or dtype is wrong, or a number is not finite.
        """
        rank = len(pair[0]) if pair[0].ndim else 0
        shapes = (rank, math.prod(self.inputs)), (math.prod(self.outputs), rank)
        for name, array, shape in zip(self.names(official), pair, shapes, strict=True):
            if array.shape != shape:
                raise ValueError(
                    f"{where} has {array.shape} as {name}; expected {shape}: it is of another model"
                )
            if not 1 <= rank <= peft.MOST_RANK:
                raise ValueError(
                    f"{where} has rank {rank} for {name}; expected 1 to {peft.MOST_RANK}"
                )
            if array.dtype.name not in _DTYPES:
                raise ValueError(
                    f"{where} has {array.dtype} as {name}; expected {' or '.join(_DTYPES)}"
                )
        with np.errstate(over="ignore", invalid="ignore"):
            a, b = (array.astype(np.float32) for array in pair)
        for name, array in zip(self.names(official), (a, b), strict=True):
            if not np.isfinite(array).all():
                raise ValueError(f"{where} has values in {name} that are not finite")
        return a, b

    def zeros(self, rank: int) -> Pair:
        """Returns A and B of an adapter that changes nothing."""
        rows, columns = math.prod(self.outputs), math.prod(self.inputs)
        return np.zeros((rank, columns), np.float32), np.zeros((rows, rank), np.float32)

    def from_file(self, pair: Pair, official: bool) -> dict[str, np.ndarray]:
        """Converts A and B of a file to our arrays."""
        a, b = pair
        b = b.reshape(*self.outputs, -1)
        b = to_halves(b) if official and self.weight.pairs else b
        return {"lora_a": a.reshape(-1, *self.inputs), "lora_b": b}

    def to_file(self, own: dict[str, np.ndarray], official: bool) -> Pair:
        """Converts our arrays to A and B of a file: the inverse of `from_file`."""
        a, b = own["lora_a"], own["lora_b"]
        b = to_pairs(b) if official and self.weight.pairs else b
        return a.reshape(a.shape[0], -1), b.reshape(-1, b.shape[-1])


def places(config: ModelConfig) -> list[Place]:
    """Returns the matrices of a model that can have adapters."""
    return [
        Place(weight, *weight.divided(config))
        for weight in weights(config)
        if weight.path.endswith("/kernel")
    ]


def read(
    path: Path | str, config: ModelConfig, scaling: float | None = None
) -> tuple[Lora, dict[str, Any]]:
    """Reads adapters in either format.

    Args:
      path: a folder with adapter_model.safetensors and adapter_config.json (PEFT) or with
        lora.safetensors (Mistral), or one of these safetensors files.
      config: the model that the adapters are for.
      scaling: the scale of adapters in Mistral's format, whose file does not state it; None = the
        value in a params.json beside the file, or 2. PEFT states it, so leave it out there.

    Returns:
      The adapters' description (with the file's defaults, where modules have ranks and alphas of
      their own), and a tree of float32 NumPy arrays as `init_adapters` makes it. `Lora.scale` holds
      for all of them.

    Raises:
      ValueError: there are no adapters, they are not plain LoRA, or they are for another model.
    """
    file = _find(Path(path))
    tensors = safetensors_file.read(file)
    official = not any(name.startswith(PREFIX) for name in tensors)
    experts = config.num_experts > 0
    described = None if official else peft.read(file.parent / PEFT_CONFIG, experts)
    tensors, modules = peft_experts.separate(tensors, config)
    pairs = _pairs(file, tensors, places(config), official)
    if described is not None and scaling is not None:
        raise ValueError(f"scaling is {scaling}, but {PEFT_CONFIG} has its own; leave it out")
    if described is None:
        rank = max(len(a) for a, _ in pairs.values())
        lora = Lora(rank, rank * (_official_scale(file) if scaling is None else scaling))
    else:
        lora = described.lora
    adapters, stacks = {}, collections.defaultdict(dict)
    for place, (a, b) in pairs.items():
        if described is not None:
            module = place.weight.module(official)
            module = modules.get(PREFIX + module, PREFIX + module).removeprefix(PREFIX)
            own = described.of(module)
            if own.rank != len(a):
                raise ValueError(
                    f"{file} has rank {len(a)} for {module}; expected {own.rank}, as {PEFT_CONFIG} "
                    "says"
                )
            b = _scaled(b, own.scale / lora.scale, f"{file} with {PEFT_CONFIG}")
        if place.weight.expert is None:
            adapters[place.path] = place.from_file((a, b), official)
        else:
            stacks[place.path][place.weight.expert] = place.from_file((a, b), official)
    for path, each in stacks.items():
        adapters[path] = peft_experts.stack(each, config.num_experts)
    targets = tuple(sorted({place.path[-1] for place in pairs}))
    return dataclasses.replace(lora, targets=targets), unflatten_dict(adapters)


def save(
    path: Path | str,
    config: ModelConfig,
    lora: Lora,
    adapters: Mapping[str, Any],
    *,
    base: str | None = None,
    format: str = "peft",
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Saves adapters in a folder, which appears whole or not at all.

    With several processes all must call it, and the first one writes.

    Args:
      path: the folder to make.
      config: the model that the adapters are for.
      lora: the adapters' description.
      adapters: the tree of adapters, in any dtype, on any devices.
      base: path or name of the model in Hugging Face's format, which PEFT loads.
      format: "peft", or "official" for mistral-inference, which needs an adapter in every
        projection of every layer: missing ones are written as zeros. Its default scale, 2, is then
        right.
      dtype: dtype of the tensors. None = float32, or bfloat16 for mistral-inference, which needs
        the dtype of its model.
      overwrite: whether to replace adapters at `path`, if this function made them and their folder
        holds nothing else.

    Raises:
      ValueError: something else is at `path`, or the adapters do not fit the format or `config`, or
        are not finite.
    """
    if format not in ("peft", "official"):
        raise ValueError(f"format is {format!r}; expected 'peft' or 'official'")
    official, flat, found = format == "official", flatten_dict(adapters), {}
    known = [place for place in places(config) if not (official and place.path == (HEAD,))]
    for module in sorted({path[:-1] for path in flat}):
        adapted = [place for place in known if place.path == module]
        if not adapted:
            raise ValueError(
                f"adapters has {'/'.join(module)}, which this model does not have in "
                f"format {format!r}"
            )
        whole = {
            name: distributed.gather(flat[*module, name]).astype(np.float32)
            for name in ("lora_a", "lora_b")
        }
        for place in adapted:
            number = place.weight.expert
            own = {n: x if number is None else x[number] for n, x in whole.items()}
            found[place] = place.to_file(own, official)
            place.checked(found[place], official, "adapters")
    ranks = {place.weight.module(official): len(a) for place, (a, _) in found.items()}
    dtype = np.dtype(dtype or (ml_dtypes.bfloat16 if official else np.float32))
    factor = lora.scale / _OFFICIAL_SCALE if official else 1
    tensors = {}
    for place in known:
        if place in found or official:
            a, b = found.get(place) or place.zeros(max(ranks.values()))
            for name, array in zip(place.names(official), (a, b * factor), strict=True):
                tensors[name] = np.ascontiguousarray(array.astype(dtype))

    def write():
        with folder.whole(path, kept if overwrite else None) as part:
            data = safetensors.numpy.save(tensors, {"format": "pt"})
            (part / (OFFICIAL if official else PEFT)).write_bytes(data)
            if not official:
                modules = [place.weight.module(official) for place in known]
                peft.write(part / PEFT_CONFIG, lora, ranks, modules, base)

    distributed.from_first(write)


def _find(path: Path) -> Path:
    """Finds the file with the tensors."""
    if path.is_file() and path.suffix == ".safetensors":
        return path
    found = [path / name for name in (PEFT, OFFICIAL) if (path / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{path} has both {PEFT} and {OFFICIAL}; name one of the two files")
    if not found:
        pickled = path.is_file() or (path / "adapter_model.bin").is_file()
        remedy = "; save it with safetensors: PEFT does where safe_serialization=True"
        raise ValueError(f"{path} has no {PEFT} and no {OFFICIAL}{remedy if pickled else ''}")
    return found[0]


def _pairs(
    file: Path, tensors: Mapping[str, np.ndarray], known: list[Place], official: bool
) -> dict[Place, Pair]:
    """Returns A and B of each adapted projection, in float32, checked."""
    names = {name for place in known for name in place.names(official)}
    # With an adapter of the output matrix PEFT saves a copy of the frozen matrix too.
    names.add(f"{PREFIX}{HEAD}.base_layer.weight")
    if unknown := sorted(set(tensors) - names):
        raise ValueError(
            f"{file} has {unknown[0]}, and the model has nothing that it would adapt: it is of "
            "another model, or more than plain LoRA of projections"
        )
    pairs = {}
    for place in known:
        found = [name for name in place.names(official) if name in tensors]
        if len(found) == 1:
            raise ValueError(f"{file} has {found[0]} alone; expected both, lora_A and lora_B")
        if found:
            pairs[place] = place.checked([tensors[name] for name in found], official, file)
    if not pairs:
        raise ValueError(f"{file} has no lora_A and lora_B of any projection")
    return pairs


def _official_scale(file: Path) -> float:
    """Returns the scale in a params.json of mistral-finetune, or the default."""
    beside = file.with_name("params.json")
    if not beside.is_file():
        return _OFFICIAL_SCALE
    described = read_json(beside, 4 << 20)
    check_table(described, {"lora": optional(table_of())}, str(beside))
    lora = described.get("lora") or {}
    check_table(lora, {"scaling": number(0, 1e6, above=True)}, f"{beside}: lora")
    return lora.get("scaling", _OFFICIAL_SCALE)


def _scaled(b: np.ndarray, factor: float, where: str) -> np.ndarray:
    """Returns `lora_b` times a factor; a ValueError if float32 cannot hold the product."""
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = b * np.float32(factor)
    if not np.isfinite(scaled).all():
        raise ValueError(f"{where} scales a lora_B by {factor:g}, more than float32 can hold")
    return scaled


def kept(path: Path) -> str | None:
    """Returns the reason why `save` may not replace a folder, or None.

    `save` replaces only folders that it wrote. It recognises a file in PEFT's format by its fields,
    for PEFT writes more of them, and one in Mistral's by metadata that Mistral does not write.
    """
    if reason := folder.foreign(path, _FILES):
        return reason
    for file in (path / name for name in (PEFT, OFFICIAL) if (path / name).is_file()):
        try:
            with safetensors.safe_open(file, framework="np") as handle:
                found = handle.metadata()
            described = None if file.name == OFFICIAL else read_json(path / PEFT_CONFIG)
        except (safetensors.SafetensorError, ValueError, OSError):
            return f"has {file.name}, which this program did not write"
        if found != {"format": "pt"} or not set(described or ()) <= set(peft.FIELDS):
            return f"has {file.name}, which this program did not write"
        return None
    return "has no adapters that this program wrote"
