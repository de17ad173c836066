"""Adapter files: LoRA as PEFT keeps it, and as Mistral does. It trains nothing, and reads no model.

Files hold two matrices for each adapted one, A (R, in) and B (out, R); we unfold the heads of both.
Here all adapters of a model have one scale, whatever their ranks are. A file may give each its own:
what that differs by goes into `lora_b` when it is read.
"""

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
from mistral_jax.checkpoint import folder, peft, safetensors_file
from mistral_jax.checkpoint.lora import HEAD, Lora
from mistral_jax.checkpoint.names import Weight, to_halves, to_pairs, weights
from mistral_jax.config import ModelConfig
from mistral_jax.parallel import distributed

PREFIX = "base_model.model."  # of all tensors in PEFT's files
_DTYPES = ("float32", "bfloat16", "float16", "float64")
PEFT, PEFT_CONFIG, OFFICIAL = "adapter_model.safetensors", "adapter_config.json", "lora.safetensors"

# What `save` makes.
_FILES = re.compile(r"adapter_model\.safetensors|adapter_config\.json|lora\.safetensors")

# What mistral-inference multiplies products by, unless it is told another number.
_OFFICIAL_SCALE = 2.0

Pair = tuple[np.ndarray, np.ndarray]


class Place(NamedTuple):
    """A matrix of the model that can have an adapter.

    Attributes:
      weight: what the matrix is called in files.
      outputs: sizes of those of its axes that are its results.
      inputs: sizes of the others.
    """

    weight: Weight
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]

    @property
    def path(self) -> tuple[str, ...]:
        """The path of the module that holds it, in the tree of parameters."""
        return tuple(self.weight.path.split("/")[:-1])

    def names(self, official: bool) -> tuple[str, str]:
        """Returns the names of both matrices in a file."""
        module = ("" if official else PREFIX) + self.weight.module(official)
        return f"{module}.lora_A.weight", f"{module}.lora_B.weight"

    def checked(self, pair: Sequence[np.ndarray], official: bool, where: Any) -> Pair:
        """Returns the matrices of a file in float32.

        Raises:
          ValueError: they do not fit, or are not finite.
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
        """Returns matrices of a file that change nothing."""
        rows, columns = math.prod(self.outputs), math.prod(self.inputs)
        return np.zeros((rank, columns), np.float32), np.zeros((rows, rank), np.float32)

    def from_file(self, pair: Pair, official: bool) -> dict[str, np.ndarray]:
        """Turns the matrices of a file into ours."""
        a, b = pair
        b = b.reshape(*self.outputs, -1)
        b = to_halves(b) if official and self.weight.pairs else b
        return {"lora_a": a.reshape(-1, *self.inputs), "lora_b": b}

    def to_file(self, own: dict[str, np.ndarray], official: bool) -> Pair:
        """Turns our matrices into those of a file: the inverse of `from_file`."""
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
    """Reads adapters of either kind.

    Args:
      path: a folder with adapter_model.safetensors and adapter_config.json (PEFT's) or with
        lora.safetensors (Mistral's), or such a file.
      config: the model that they are for.
      scaling: what the products of Mistral's file are multiplied by, which it does not tell; None =
        as a params.json beside it says, or else 2. PEFT's tell it.

    Returns:
      What they are (where modules have ranks and alphas of their own: the file's defaults), and a
      tree of them as `init_adapters` makes it, in float32 NumPy arrays. `Lora.scale` is right for
      all of them.

    Raises:
      ValueError: there are none; they are not plain LoRA; or they are for another model.
    """
    file = _find(Path(path))
    tensors = safetensors_file.read(file)
    official = not any(name.startswith(PREFIX) for name in tensors)
    described = None if official else peft.read(file.parent / PEFT_CONFIG)
    pairs = _pairs(file, tensors, places(config), official)
    if described is not None and scaling is not None:
        raise ValueError(f"scaling is {scaling}, but {PEFT_CONFIG} has its own; leave it out")
    if described is None:
        rank = max(len(a) for a, _ in pairs.values())
        lora = Lora(rank, rank * (_official_scale(file) if scaling is None else scaling))
    else:
        lora = described.lora
    adapters = {}
    for place, (a, b) in pairs.items():
        if described is not None:
            module = place.weight.module(official)
            own = described.of(module)
            if own.rank != len(a):
                raise ValueError(
                    f"{file} has rank {len(a)} for {module}; expected {own.rank}, as {PEFT_CONFIG} "
                    "says"
                )
            b = _scaled(b, own.scale / lora.scale, f"{file} with {PEFT_CONFIG}")
        adapters[place.path] = place.from_file((a, b), official)
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
    """Saves adapters; the folder appears whole or not at all.

    Of several processes all must call it, and the first writes.

    Args:
      path: the folder to make.
      config: the model that they are for.
      lora: what they are.
      adapters: the tree of them, of any dtype, on any devices.
      base: path or name of the model in Hugging Face's format, for PEFT to look up.
      format: "peft", or "official" for mistral-inference. This wants an adapter in every projection
        of every layer, and gets zeros where there is none; its default scale, 2, is right.
      dtype: of the tensors; None = float32, but bfloat16 for mistral-inference, which wants that of
        its model.
      overwrite: whether adapters at `path` may be replaced that this function made, if nothing
        else is in their folder.

    Raises:
      ValueError: something else is at `path`, the format cannot hold them, or they are not those of
        `config`, or not finite.
    """
    if format not in ("peft", "official"):
        raise ValueError(f"format is {format!r}; expected 'peft' or 'official'")
    official, flat, found = format == "official", flatten_dict(adapters), {}
    known = {place.path: place for place in places(config)}
    if official:
        known.pop((HEAD,), None)
    for module in sorted({path[:-1] for path in flat}):
        if module not in known:
            raise ValueError(
                f"adapters has {'/'.join(module)}, which this model has not in {format}"
            )
        own = {
            name: distributed.gather(flat[*module, name]).astype(np.float32)
            for name in ("lora_a", "lora_b")
        }
        found[module] = known[module].to_file(own, official)
        known[module].checked(found[module], official, "adapters")
    ranks = {known[path].weight.module(official): len(a) for path, (a, _) in found.items()}
    dtype = np.dtype(dtype or (ml_dtypes.bfloat16 if official else np.float32))
    factor = lora.scale / _OFFICIAL_SCALE if official else 1
    tensors = {}
    for module, place in known.items():
        if module in found or official:
            a, b = found.get(module) or place.zeros(max(ranks.values()))
            for name, array in zip(place.names(official), (a, b * factor), strict=True):
                tensors[name] = np.ascontiguousarray(array.astype(dtype))

    def write():
        with folder.whole(path, kept if overwrite else None) as part:
            data = safetensors.numpy.save(tensors, {"format": "pt"})
            (part / (OFFICIAL if official else PEFT)).write_bytes(data)
            if not official:
                modules = [place.weight.module(official) for place in known.values()]
                peft.write(part / PEFT_CONFIG, lora, ranks, modules, base)

    distributed.from_first(write)


def _find(path: Path) -> Path:
    """Returns the file with the tensors."""
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
    """Returns the matrices of each projection that has them, in float32, checked."""
    names = {name for place in known for name in place.names(official)}
    # PEFT adds a copy of the frozen output to an adapter of it.
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
    """Returns the scale that mistral-finetune has used, or else the default."""
    beside = file.with_name("params.json")
    if not beside.is_file():
        return _OFFICIAL_SCALE
    described = read_json(beside, 4 << 20)
    check_table(described, {"lora": optional(table_of())}, str(beside))
    lora = described.get("lora") or {}
    check_table(lora, {"scaling": number(0, 1e6, above=True)}, f"{beside}: lora")
    return lora.get("scaling", _OFFICIAL_SCALE)


def _scaled(b: np.ndarray, factor: float, where: str) -> np.ndarray:
    """Returns `lora_b` times a factor, if float32 can hold it."""
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = b * np.float32(factor)
    if not np.isfinite(scaled).all():
        raise ValueError(f"{where} scales a lora_B by {factor:g}, more than float32 can hold")
    return scaled


def kept(path: Path) -> str | None:
    """Returns what keeps a folder from being replaced by what `save` makes.

    PEFT itself describes more than `save` does; Mistral's program writes no metadata.
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
