"""A PyTorch checkpoint becomes an Orbax one, a layer at a time. It computes nothing but casts."""

import contextlib
import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from flax.traverse_util import unflatten_dict

import mistral_jax
from mistral_jax import checkpoint, folder, manifest
from mistral_jax.config import ModelConfig

from . import architecture, hub, names
from .checks import check_finite, check_tensors
from .progress import Progress
from .source import Source, Tensor, find


def to_orbax(
    source: Path | str,
    target: Path | str,
    *,
    format: str | None = None,
    dtype: str | None = None,
    rope_theta: float | None = None,
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
      overwrite: whether a checkpoint at `target` may be replaced.
      progress: what to tell of the work's course; None = nothing.

    Raises:
      ValueError: the source is no whole checkpoint of finite numbers and a known architecture,
        `target` is taken, or its disk is too full.
    """
    progress = progress or Progress()
    replaceable = manifest.is_checkpoint if overwrite else None
    folder.check_target(target, replaceable)
    remote = hub.is_repository(source)
    found = hub.fetch(str(source), format) if remote else find(source, format)
    if found.other_formats:
        others = " and ".join(found.other_formats)
        progress.say(f"{source} is read as {found.format}; it also holds {others} (see --format)")
    described = architecture.read(found.config_file, rope_theta)
    for note in described.notes:
        progress.say(note)
    config, tensors = described.config, found.tensors()
    check_tensors(found, tensors, config)

    size = _size(found, tensors, config, dtype)
    folder.check_space(target, size)
    provenance = {
        "source": f"{source}@{found.folder.name}" if remote else found.folder.resolve().name,
        "source_format": found.format,
        "rope_theta_from": described.theta_origin,
        "program": f"mistral_jax {mistral_jax.__version__}",
    }
    tokenizer = found.tokenizer_file
    if tokenizer is not None:
        checkpoint.read_tokenizer(tokenizer, config)
        provenance["tokenizer"] = tokenizer.name
    with (
        _hashing(found.files) as hashes,
        checkpoint.create(target, config, tokenizer, provenance, overwrite) as add,
        progress.task(size) as advance,
    ):
        for group in names.groups(config):
            arrays = {row.path: read(row, found, tensors, config, dtype) for row in group}
            add(unflatten_dict(arrays, sep="/"))
            advance(sum(array.nbytes for array in arrays.values()))
        provenance["source_sha256"] = hashes()


def read(
    row: names.Row,
    source: Source,
    tensors: Mapping[str, Sequence[Tensor]],
    config: ModelConfig,
    dtype: str | None = None,
) -> np.ndarray:
    """Reads one array of the model: the file's own memory where nothing has to change.

    Raises:
      ValueError: it is not finite.
    """
    name = row.name(source.official)
    parts = [array for _, array in tensors[name]]
    tensor = parts[0] if row.split is None or len(parts) == 1 else np.concatenate(parts, row.split)
    with np.errstate(over="ignore"):  # What float16 cannot hold is found below.
        array = np.require(
            row.from_file(tensor, config, source.official), dtype, ["C_CONTIGUOUS", "ALIGNED"]
        )
    files = " and ".join(str(file) for file, _ in tensors[name])
    check_finite(array, f"tensor {name} in {files}" + (f" as {dtype}" if dtype else ""))
    return array


def _size(
    source: Source,
    tensors: Mapping[str, Sequence[Tensor]],
    config: ModelConfig,
    dtype: str | None,
) -> int:
    """Returns the bytes of all arrays."""
    return sum(
        math.prod(row.shape(config))
        * np.dtype(dtype or tensors[row.name(source.official)][0].array.dtype).itemsize
        for group in names.groups(config)
        for row in group
    )


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
