"""Reads matrices in FP8 (e4m3) with one scale a tensor, and computes their values in bfloat16.

Despite its name in Hugging Face's files, `weight_scale_inv` multiplies. Scales of activations are
left out: activations are not rounded here.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mistral_jax.base.fields import show

DTYPE = np.dtype(ml_dtypes.float8_e4m3fn)
RESULT = np.dtype(ml_dtypes.bfloat16)

# The scale of `X.weight` is `X.` with one of these names.
_SCALES = ("weight_scale_inv", "qscale_weight")
# Scales of activations, and the state of the quantizers that found them.
IGNORABLE = re.compile(r"(.*\.)?(activation_scale|qscale_act)|.*fake_quantizer.*", re.DOTALL)

_OFFICIAL = {"qformat_weight": ("fp8_e4m3",), "qscheme_act": ("TENSOR", None)}
_HF = {
    "quant_method": ("fp8",),
    "activation_scheme": ("static",),
    "weight_block_size": (None,),
}
# Bytes of a block of values that are widened at a time.
_BLOCK = 1 << 24


def check_config(raw: Mapping[str, Any], file: Path) -> None:
    """Checks that a config describes no quantization, or the one that this module reads.

    Raises:
      ValueError: it describes another one.
    """
    for key, expected in (("quantization", _OFFICIAL), ("quantization_config", _HF)):
        value = raw.get(key)
        if value is None or value == {}:
            continue
        table = value if isinstance(value, dict) else {}
        known = all(table.get(name) in values for name, values in expected.items())
        if not table or not known:
            wanted = ", ".join(f"{name} {values[0]!r}" for name, values in expected.items())
            raise ValueError(
                f"{file} has {key} {show(value)}; expected none, or FP8 with one scale a tensor: "
                f"{wanted}"
            )


def find_scale(
    name: str, shape: tuple[int, ...], scales: Mapping[str, np.ndarray]
) -> tuple[str, np.ndarray]:
    """Returns the name and the value of the scale of a tensor in FP8.

    Args:
      name: name of the tensor, `X.weight`.
      shape: its shape.
      scales: arrays by name, among which the scale is.

    Raises:
      ValueError: there is no scale, or it is not a positive finite number.
    """
    names = [name.removesuffix("weight") + suffix for suffix in _SCALES]
    found = next((x for x in names if x in scales), None)
    if found is None:
        raise ValueError(
            f"tensor {name} is {DTYPE} without its scale; expected {' or '.join(names)}"
        )
    scale = scales[found]
    if scale.size != 1 or scale.dtype.name not in ("float32", "bfloat16", "float16"):
        raise ValueError(
            f"tensor {found} is {scale.dtype} {scale.shape}, for a tensor {shape}; expected one "
            "number: scales of blocks or rows are not supported"
        )
    value = scale.reshape(()).astype(np.float32)
    if not 0 < value < np.inf:
        raise ValueError(f"tensor {found} is {value}; expected a finite number above 0")
    return found, value


def is_scale(name: str) -> bool:
    """Tells whether a name is that of a tensor's scale."""
    return name.rpartition(".")[2] in _SCALES


def dequantize(array: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Returns `array * scale` in bfloat16, computed in float32, a block at a time."""
    made = np.empty(array.shape, RESULT)
    blocks = (np.array_split(x, 1 + array.nbytes // _BLOCK) for x in (array, made))
    for part, whole in zip(*blocks, strict=True):
        whole[...] = part.astype(np.float32) * scale
    return made
