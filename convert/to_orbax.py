"""A PyTorch checkpoint becomes an Orbax one, a tensor at a time. It computes nothing but casts."""

import contextlib
import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mistral_jax.base import VERSION
from mistral_jax.base.output import Progress
from mistral_jax.checkpoint import checkpoint, folder, manifest, origin, quantization
from mistral_jax.checkpoint.names import Weight
from mistral_jax.config import ModelConfig
from mistral_jax.ops.quantized import QuantizedMatrix, to_int8

from . import architecture, hub, tokens
from .checks import check_finite, match
from .source import Tensor, find


def to_orbax(
    source: Path | str,
    target: Path | str,
    *,
    format: str | None = None,
    dtype: str | None = None,
    rope_theta: float | None = None,
    quantize: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Converts a source folder into a checkpoint folder, which appears whole or not at all.

    Args:
      source: the folder to read, or the name of a repository on the Hugging Face Hub to fetch.
      target: the checkpoint folder to make.
      format: what to read of a folder that holds several checkpoints (see `source.find`).
      dtype: of the arrays; None = each as in the source.
      rope_theta: base of the rotary embedding, for sources that do not say.
      quantize: "int8" rounds the matrices of projections and of the output to 8 bits, with a scale
        for each output; None = they stay as they are.
      overwrite: whether a checkpoint at `target` may be replaced, if nothing else is in its
        folder.
      progress: what to tell of the work's course; None = nothing.

    Raises:
      ValueError: the source is no whole checkpoint of finite numbers and a known architecture,
        `target` is taken, its disk is too full, or `quantize` is neither.
    """
    quantization.check(quantize)
    progress = progress or Progress()
    folder.check_target(target, manifest.kept if overwrite else None)
    remote = hub.is_repository(source)
    found = hub.fetch(str(source), format, progress.say) if remote else find(source, format)
    stamps = found.stamps()
    if found.other_formats:
        others = " and ".join(found.other_formats)
        progress.say(f"{source} is read as {found.format}; it also holds {others} (see --format)")
    described = architecture.read(found.config_file, rope_theta)
    tokenizer, config, notes = tokens.read(found, described)
    for note in (*described.notes, *notes):
        progress.say(note)
    matched = match(found, found.tensors(progress.say), config)
    tree = unflatten_dict(
        {weight.path: jax.ShapeDtypeStruct(weight.shape(config), np.float32) for weight in matched},
        sep="/",
    )
    small = quantization.matrices(tree, output=True) if quantize else {}
    laid = flatten_dict(quantization.split(quantization.abstract(tree, small)), sep="/")
    outputs = {"/".join(path): count for path, count in small.items()}
    sizes = {
        weight.path: math.prod(weight.shape(config))
        * (1 if weight.path in outputs else np.dtype(dtype or places[0].array.dtype).itemsize)
        for weight, places in matched.items()
    }
    folder.check_space(target, sum(sizes.values()))
    provenance = {
        "source": origin.hub_name(found.folder) or found.folder.resolve().name,
        "source_format": found.format,
        "rope_theta_from": described.theta_origin,
        "program": f"mistral_jax {VERSION}",
    }
    if tokenizer is not None:
        provenance["tokenizer"] = found.tokenizer_file.name
    if quantize:
        provenance["quantized"] = quantize
    shapes = {path: array.shape for path, array in laid.items()}
    with (
        _hashing(found.files) as hashes,
        checkpoint.create(
            target, config, shapes, found.tokenizer_file, provenance, overwrite
        ) as write,
        progress.task(sum(sizes.values())) as advance,
    ):
        for weight, places in matched.items():
            array = _read(weight, places, config, found.official, dtype)
            if weight.path in outputs:
                # In blocks: float32 copies of the largest array would take more than all else.
                blocks = np.array_split(array, 1 + (array.nbytes >> 24))
                made = [to_int8(np.float32(x), outputs[weight.path]) for x in blocks]
                array = QuantizedMatrix(*map(np.concatenate, zip(*made, strict=True)))
            parts = quantization.split({weight.path: array})
            for path, part in flatten_dict(parts, sep="/").items():
                write(path, part)
            advance(sizes[weight.path])
        provenance |= {"source_sha256": hashes(), "source_stamps": stamps}


def _read(
    weight: Weight, places: Sequence[Tensor], config: ModelConfig, official: bool, dtype: str | None
) -> np.ndarray:
    """Returns an array of the model: the file's own memory where nothing has to change."""
    tensor = weight.join([place.array for place in places])
    with np.errstate(over="ignore"):  # What a dtype cannot hold is found below.
        array = np.require(weight.from_file(tensor, config, official), dtype, ["C", "ALIGNED"])
    files = " and ".join(str(place.file) for place in places)
    cast = f" as {dtype}" if dtype else ""
    check_finite(array, f"tensor {weight.name(official)} in {files}{cast}")
    return array


@contextlib.contextmanager
def _hashing(files: Sequence[Path]) -> Iterator[Callable[[], dict[str, str]]]:
    """Yields a function that waits for the SHA-256 of each file; a thread of its own makes them."""
    stop = threading.Event()

    def sha256(file: Path) -> str:
        digest, buffer = hashlib.sha256(), bytearray(1 << 20)
        with open(file, "rb", buffering=0) as stream:
            while not stop.is_set() and (count := stream.readinto(buffer)):
                digest.update(memoryview(buffer)[:count])
        return digest.hexdigest()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(lambda: {file.name: sha256(file) for file in files})
        try:
            yield future.result
        finally:
            stop.set()
