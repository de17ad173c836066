"""Dequantises the blocks of GGUF files.

A quantised tensor is a sequence of blocks, each with its own scale. A block of the older types has
32 numbers. A block of the K types has 256, in parts of 16 or 32 with scales that are quantised
themselves. Sums and products are those of llama.cpp, in float32, so the results are equal bit for
bit. The layouts are those of `ggml-common.h`.
"""

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np


class Kind(NamedTuple):
    """A type of tensor.

    Attributes:
      name: its name in llama.cpp.
      numbers: numbers in a block.
      size: bytes of a block.
      dtype: dtype of the numbers as they are in the file; None = they are quantised.
      widen: maps blocks [n, size] uint8 to numbers [n, numbers] float32.
    """

    name: str
    numbers: int
    size: int
    dtype: np.dtype | None = None
    widen: Callable[[np.ndarray], np.ndarray] | None = None


def _halves(blocks: np.ndarray, *starts: int) -> list[np.ndarray]:
    """Returns the float16 numbers at some bytes of each block as float32, each [n, 1]."""
    found = (np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16) for at in starts)
    return [half.astype(np.float32) for half in found]


def _fields(data: np.ndarray, bits: int) -> np.ndarray:
    """Divides bytes [n, m] into fields of `bits` bits: [n, 8 / bits, m], the lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (data[:, None] >> shifts) & np.uint8((1 << bits) - 1)


def _parts(data: np.ndarray, bits: int, width: int) -> np.ndarray:
    """Divides bytes into parts of `width`, and each part into fields: [n, numbers]."""
    n = len(data)
    return _fields(data.reshape(-1, width), bits).reshape(n, -1)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    (scale,) = _halves(blocks, 0)
    return scale * (_parts(blocks[:, 2:], 4, 16).astype(np.float32) - 8)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    scale, least = _halves(blocks, 0, 2)
    return scale * _parts(blocks[:, 4:], 4, 16).astype(np.float32) + least


def _fifth_bits(data: np.ndarray) -> np.ndarray:
    """Returns the highest bits [n, 32] of 5-bit numbers from 4 bytes."""
    return np.unpackbits(data, axis=1, bitorder="little") << 4


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    (scale,) = _halves(blocks, 0)
    values = _parts(blocks[:, 6:], 4, 16) | _fifth_bits(blocks[:, 2:6])
    return scale * (values.astype(np.float32) - 16)


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    scale, least = _halves(blocks, 0, 2)
    values = _parts(blocks[:, 8:], 4, 16) | _fifth_bits(blocks[:, 4:8])
    return scale * values.astype(np.float32) + least


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    (scale,) = _halves(blocks, 0)
    return scale * blocks[:, 2:].view(np.int8).astype(np.float32)


def _spread(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Shapes numbers [n, 256] as one row for each of the scales [n, parts]."""
    return values.astype(np.float32).reshape(*scales.shape, -1)


def _affine(values: np.ndarray, scales: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return (scales[..., None] * _spread(values, scales) - offsets[..., None]).reshape(-1, 256)


def _six_bits(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the 8 scales and the 8 offsets of 6 bits each, [n, 8], that 12 bytes hold."""
    low, middle, high = np.split(data, 3, axis=1)
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
    offsets = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=1)
    return scales, offsets


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    scale, offset = _halves(blocks, 80, 82)
    low, high = blocks[:, :16] & 15, blocks[:, :16] >> 4
    return _affine(_parts(blocks[:, 16:80], 2, 32), scale * low, offset * high)


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    (scale,) = _halves(blocks, 108)
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    fours = _fields(low, 4).reshape(-1, 16)
    twos = _fields(high, 2).reshape(-1, 16)
    scales = scale * ((fours | twos << 4).astype(np.int8) - np.int8(32))
    # The third bit is inverted: it is subtracted where the mask has no bit.
    thirds = _fields(blocks[:, :32], 1).reshape(-1, 256) ^ 1
    values = _parts(blocks[:, 32:96], 2, 32).astype(np.int8) - (thirds << 2).astype(np.int8)
    return (scales[..., None] * _spread(values, scales)).reshape(-1, 256)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    scale, offset = _halves(blocks, 0, 2)
    scales, offsets = _six_bits(blocks[:, 4:16])
    return _affine(_parts(blocks[:, 16:], 4, 32), scale * scales, offset * offsets)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    scale, offset = _halves(blocks, 0, 2)
    scales, offsets = _six_bits(blocks[:, 4:16])
    fifths = _fields(blocks[:, 16:48], 1).reshape(-1, 256)
    values = _parts(blocks[:, 48:], 4, 32) | fifths << 4
    return _affine(values, scale * scales, offset * offsets)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    (scale,) = _halves(blocks, 208)
    scales = scale * blocks[:, 192:208].view(np.int8)
    low, high = _parts(blocks[:, :128], 4, 64), _parts(blocks[:, 128:192], 2, 32)
    values = (low | high << 4).astype(np.int8) - np.int8(32)
    return (scales[..., None] * _spread(values, scales)).reshape(-1, 256)


# By their numbers in a file.
KINDS = {
    0: Kind("F32", 1, 4, np.dtype(np.float32)),
    1: Kind("F16", 1, 2, np.dtype(np.float16)),
    2: Kind("Q4_0", 32, 18, None, _q4_0),
    3: Kind("Q4_1", 32, 20, None, _q4_1),
    6: Kind("Q5_0", 32, 22, None, _q5_0),
    7: Kind("Q5_1", 32, 24, None, _q5_1),
    8: Kind("Q8_0", 32, 34, None, _q8_0),
    10: Kind("Q2_K", 256, 84, None, _q2_k),
    11: Kind("Q3_K", 256, 110, None, _q3_k),
    12: Kind("Q4_K", 256, 144, None, _q4_k),
    13: Kind("Q5_K", 256, 176, None, _q5_k),
    14: Kind("Q6_K", 256, 210, None, _q6_k),
    30: Kind("BF16", 1, 2, np.dtype(ml_dtypes.bfloat16)),
}
# Names of the other kinds, for messages.
OTHERS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
