"""`QuantizedMatrix`, a matrix in 8 or 4 bits, and products with it.

It has the shape, ndim, dtype and sharding of an array, so most code treats it as a matrix;
`products.py` multiplies by it.
"""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

# Quantiles of a normal distribution, with an exact zero (arXiv 2305.14314, appendix E).
NF4_LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


def einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes an einsum with float32 sums.

    Float32 operands stay exact: by default a GPU or TPU rounds them to fewer bits.
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)


@flax.struct.dataclass
class QuantizedMatrix:
    """A matrix in small numbers with scales: `values * scale`, block by block.

    Attributes:
      values: int8 numbers, or uint4 indices into `NF4_LEVELS`, of the matrix's shape.
      scale: float32, with as many axes as the matrix. Along each axis it has one entry for a block
        of neighbouring values: an axis of n values and m scales has blocks of n / m.
    """

    values: jax.Array  # Must be first: Flax compares the first leaf with the parameter's shape.
    scale: jax.Array

    def dequantize(self, dtype: jnp.dtype) -> jax.Array:
        """Returns the matrix, computed in float32 and rounded to `dtype`."""
        # qwix is not used here: it flattens an array first, which gathers a partitioned one.
        if self.values.dtype == jnp.uint4:
            wide = jnp.asarray(NF4_LEVELS)[self.values.astype(jnp.int32)]
        else:
            wide = self.values.astype(jnp.float32)
        wide = wide.reshape(*self.shape[:-1], self.scale.shape[-1], -1) * self.scale[..., None]
        return wide.reshape(self.shape).astype(dtype)

    def scales_outputs(self, outputs: int) -> bool:
        """Tells whether the matrix is int8 with one scale for each output.

        Args:
          outputs: number of output axes, which come first.
        """
        return self.values.dtype == jnp.int8 and self.scale.size == math.prod(self.shape[:outputs])

    def product(self, rows: jax.Array, in_integers: bool = False) -> jax.Array:
        """Multiplies `rows` [..., X] by this matrix [Y, X] with scales [Y, 1].

        Args:
          rows: the rows.
          in_integers: whether to multiply in int8, which is faster on a CPU with few rows.

        Returns:
          [..., Y] float32.
        """
        by = _product if in_integers else _plain_product
        return by(rows, self.values, self.scale[:, 0])

    def scaled(self, sums: jax.Array) -> jax.Array:
        """Scales `sums` [..., Y], the product with the values, to the product with the matrix."""
        return sums * jnp.expand_dims(self.scale[:, 0], range(sums.ndim - 1))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """The number of axes of the matrix."""
        return self.values.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype in which the matrix is computed from values and scales."""
        return self.scale.dtype

    @property
    def sharding(self) -> jax.sharding.Sharding:
        """The sharding of the matrix's values."""
        return self.values.sharding


MaybeQuantized = jax.Array | QuantizedMatrix


def to_int8(matrix: Any, outputs: int, numpy: Any = np) -> tuple[Any, Any]:
    """Quantises a matrix to int8 with one scale for each output.

    The scale is the largest magnitude of the output's numbers, divided by 127.5, as in qwix.

    Args:
      matrix: float32, output axes first.
      outputs: number of output axes.
      numpy: the module to compute with, NumPy or `jax.numpy`; the bits are the same.

    Returns:
      The values, int8, and the scales, float32, with as many axes as the matrix.
    """
    axes = tuple(range(outputs, matrix.ndim))
    largest = numpy.max(numpy.abs(matrix), axis=axes, keepdims=True)
    # XLA multiplies by the reciprocal of a constant, so NumPy must too.
    scale = numpy.where(largest > 0, largest * np.float32(1 / 127.5), np.float32(1))
    return numpy.clip(numpy.round(matrix / scale), -127, 127).astype("int8"), scale


def _plain_product(rows, values, scale):
    """Multiplies `rows` [..., X] by `values` [Y, X] int8, then the sums by `scale` [Y]."""
    sums = einsum("...X,YX->...Y", rows, values.astype(rows.dtype))
    return sums * jnp.expand_dims(scale, range(rows.ndim - 1))


@jax.custom_jvp
def _product(rows, values, scale):
    """Computes `_plain_product` in integers, to the rounding of float32.

    XLA's CPU backend writes a whole int8 matrix out in float32 before it multiplies by it, but has
    a fast product of int8 with int8. So each row is rounded to 24 bits below its largest number and
    split into three int8 rows, whose products and sums are exact.
    """
    wide = rows.astype(jnp.float32).reshape(-1, rows.shape[-1])
    # 127 rather than 128 keeps each part of the largest number at 127 or below.
    step = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / (127 << 16)
    rest, parts = jnp.round(wide / jnp.where(step > 0, step, 1)).astype(jnp.int32), []
    for _ in range(3):
        part = ((rest + 128) & 255) - 128  # the lowest 8 bits, from -128 to 127
        parts.append(part.astype(jnp.int8))
        rest = (rest - part) >> 8
    if len(wide) == 1:  # XLA multiplies four rows in two thirds of the time of three.
        parts.append(jnp.zeros_like(parts[0]))
    sums = jnp.einsum("RX,YX->RY", jnp.concatenate(parts), values, preferred_element_type=jnp.int32)
    low, middle, high = jnp.split(sums[: 3 * len(wide)].astype(jnp.float32), 3)
    total = (high * 65536 + middle * 256 + low) * (step * scale[None])
    return total.reshape(*rows.shape[:-1], -1)


@_product.defjvp
def _differentiate(primals, tangents):
    """Differentiates `_plain_product`, for operations on integers have no gradient."""
    return _product(*primals), jax.jvp(_plain_product, primals, tangents)[1]
