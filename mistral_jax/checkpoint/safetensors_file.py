"""Read `.safetensors` files by mapping them into memory, and write them one tensor at a time."""

import json
import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from rich.filesize import decimal
from safetensors import SafetensorError, safe_open

from mistral_jax.base.fields import show
from mistral_jax.base.files import check_content
from mistral_jax.checkpoint.folder import write_array

_MOST_HEADER = 8 << 20  # Bytes; a model of 1,000 tensors has some 100,000.
_MOST_AXES = 8

_DTYPES = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
# Marks the files of this program; Transformers requires "format".
_METADATA = {"format": "pt", "writer": "mistral_jax"}

_KINDS = {np.dtype(dtype): kind for kind, dtype in _DTYPES.items()}


def read(file: Path) -> dict[str, np.ndarray]:
    """Maps the tensors of a file.

    Returns:
      Views of the mapped file by name. The system reads their bytes when they are used.

    Raises:
      ValueError: the file is damaged, is not a safetensors file, or has a tensor of a dtype without
        a NumPy dtype.
      OSError: the file cannot be read.
    """
    check_content(file, "the weights")
    with open(file, "rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    if header > _MOST_HEADER:
        raise ValueError(
            f"{file} is cut short or no safetensors file: its header would have "
            f"{decimal(header)}; expected at most {decimal(_MOST_HEADER)}"
        )
    try:
        with safe_open(file, framework="np") as handle:
            slices = {name: handle.get_slice(name) for name in handle.offset_keys()}
            heads = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{file} is cut short or no safetensors file: {error}") from None
    with open(file, "rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    arrays, offset = {}, 8 + header
    for name, (kind, shape) in heads.items():
        if kind not in _DTYPES:
            raise ValueError(f"tensor {name} in {file} is {kind}; expected BF16, F16 or F32")
        if len(shape) > _MOST_AXES or any(size >= 1 << 60 for size in shape):
            raise ValueError(
                f"tensor {name} in {file} has the shape {show(shape)}; expected at most "
                f"{_MOST_AXES} axes, each below 2**60"
            )
        flat = np.frombuffer(mapped, _DTYPES[kind], math.prod(shape), offset)
        arrays[name] = flat.reshape(shape)
        offset += flat.nbytes  # The library has checked that there are no gaps between tensors.
    return arrays


def is_ours(file: Path) -> bool:
    """Tells whether `write` of this version or an earlier one wrote a file.

    Earlier versions left no mark in the file. Their tensors are in the order of the forward pass,
    whereas other programs sort the tensors of a dtype by name.
    """
    try:
        with safe_open(file, framework="np") as handle:
            if (handle.metadata() or {}) != {"format": "pt"}:
                return handle.metadata() == _METADATA
            kinds = [(handle.get_slice(name).get_dtype(), name) for name in handle.offset_keys()]
    except (SafetensorError, OSError):
        return False
    return kinds != sorted(kinds) and any(
        (own := [name for kind, name in kinds if kind == which]) != sorted(own)
        for which, _ in kinds
    )


def write(
    file: Path,
    heads: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    tensors: Iterator[np.ndarray],
) -> None:
    """Writes a file, one tensor after another.

    Args:
      file: the file to write.
      heads: shape and dtype of each tensor, by name.
      tensors: the tensors, in the order of `heads`. Further tensors are not consumed.
    """
    header, offset = {"__metadata__": _METADATA}, 0
    for name, (shape, dtype) in heads.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _KINDS[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # Aligns the tensors.
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in zip(heads, tensors, strict=False):
            write_array(stream, tensor)
