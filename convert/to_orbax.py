"""Converts a PyTorch checkpoint or a GGUF file to a checkpoint folder, one tensor at a time."""

import contextlib
import functools
import hashlib
import math
import tempfile
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

from . import architecture, chat, checks, hub, tokens
from .checks import check_finite, match
from .source import Source, Tensor, find


def to_orbax(
    source: Path | str,
    target: Path | str,
    *,
    format: str | None = None,
    dtype: str | None = None,
    rope_theta: float | None = None,
    quantize: str | None = None,
    overwrite: bool = False,
    chat_form: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Converts a PyTorch checkpoint to a checkpoint folder, which appears complete or not at all.

    Args:
      source: the folder or the GGUF file to read, or the name of a repository on the Hugging Face
        Hub.
      target: the checkpoint folder to make.
      format: the checkpoint to read if the folder holds several (see `source.find`).
      dtype: dtype of the arrays; None = unchanged; float32 for the quantised ones of a GGUF file.
      rope_theta: base of the rotary embedding, for sources that lack it.
      quantize: "int8" = round the weights of the projections and of the output to 8 bits, with one
        scale for each output; None = do not.
      overwrite: whether to replace a checkpoint at `target`, if its folder holds nothing else.
      chat_form: name of the form of conversations (`tokens.chat.NAMES`); None = chosen by the
        source's files.
      progress: receives messages and the bytes done; None = nothing is shown.

    Raises:
      ValueError: the source is incomplete, has values that are not finite or an unsupported
        architecture; `target` exists; its disk is too small; or `quantize` is unknown.
    """
    quantization.check(quantize)
    progress = progress or Progress()
    folder.check_target(target, manifest.kept if overwrite else None)
    remote = hub.is_repository(source)
    found = hub.fetch(str(source), format, progress.say) if remote else find(source, format)
    if found.other_formats:
        others = " and ".join(found.other_formats)
        progress.say(f"{source} is read as {found.format}; it also holds {others} (see --format)")
    with tempfile.TemporaryDirectory() as scratch:
        source = found.unpacked(Path(scratch))
        _convert(source, target, dtype, rope_theta, quantize, overwrite, chat_form, progress)


def _convert(
    found: Source,
    target: Path | str,
    dtype: str | None,
    rope_theta: float | None,
    quantize: str | None,
    overwrite: bool,
    chat_form: str | None,
    progress: Progress,
) -> None:
    stamps = found.stamps()
    tensors = functools.cache(lambda: found.tensors(progress.say))
    described = architecture.read(found.config_file, rope_theta, tensors)
    tokenizer, config, notes = tokens.read(found, described)
    for note in (*described.notes, *notes):
        progress.say(note)
    form = chat.choose(found, tokenizer, chat_form, progress.say) if tokenizer else None
    matched = match(found, tensors(), config)
    for note in checks.notes(tensors()):
        progress.say(note)
    tree = unflatten_dict(
        {
            weight.path: jax.ShapeDtypeStruct(weight.parameter_shape(config), np.float32)
            for weight in matched
        },
        sep="/",
    )
    small = quantization.matrices(tree, output=True) if quantize else {}
    laid = flatten_dict(quantization.split(quantization.abstract(tree, small)), sep="/")
    outputs = {"/".join(path): count for path, count in small.items()}
    sizes = {
        weight: math.prod(weight.shape(config))
        * (1 if weight.path in outputs else np.dtype(dtype or places[0].dtype).itemsize)
        for weight, places in matched.items()
    }
    folder.check_space(target, sum(sizes.values()))
    provenance = {
        "source": origin.hub_name(found.folder) or found.name,
        "source_format": found.format,
        "rope_theta_from": described.theta_origin,
        "program": f"mistral_jax {VERSION}",
    }
    if described.model_type != architecture.MISTRAL:
        provenance["model_type"] = described.model_type
    if tokenizer is not None:
        provenance["tokenizer"] = found.tokenizer_file.name
    if quantize:
        provenance["quantized"] = quantize
    shapes = {path: array.shape for path, array in laid.items()}
    with (
        _hashing(found.files) as hashes,
        checkpoint.create(
            target, config, shapes, found.tokenizer_file, provenance, overwrite, form
        ) as write,
        progress.task(sum(sizes.values())) as advance,
    ):
        for weight, places in matched.items():
            array = _read(weight, places, config, found.official, dtype)
            if weight.path in outputs:
                # In blocks, because a float32 copy of the largest array would dominate memory.
                blocks = np.array_split(array, 1 + (array.nbytes >> 24))
                count = outputs[weight.path] - (weight.expert is not None)
                made = [to_int8(np.float32(x), count) for x in blocks]
                array = QuantizedMatrix(*map(np.concatenate, zip(*made, strict=True)))
            parts = quantization.split({weight.path: array})
            for path, part in flatten_dict(parts, sep="/").items():
                write(path, part, weight.expert)
            advance(sizes[weight])
        provenance |= {"source_sha256": hashes(), "source_stamps": stamps}


def _read(
    weight: Weight, places: Sequence[Tensor], config: ModelConfig, official: bool, dtype: str | None
) -> np.ndarray:
    """Returns an array of the model; it is a view of the mapped file if nothing has to change."""
    tensor = weight.join([place.read() for place in places])
    with np.errstate(over="ignore"):  # `check_finite` reports overflow.
        array = np.require(weight.from_file(tensor, config, official), dtype, ["C", "ALIGNED"])
    files = " and ".join(str(place.file) for place in places)
    cast = f" as {dtype}" if dtype else ""
    check_finite(array, f"tensor {weight.name(official)} in {files}{cast}")
    return array


@contextlib.contextmanager
def _hashing(files: Sequence[Path]) -> Iterator[Callable[[], dict[str, str]]]:
    """Computes the SHA-256 of files in a thread; yields a function that waits for the digests."""
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
