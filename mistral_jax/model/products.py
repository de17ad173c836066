"""Products with a kernel and rows of a table, in the way that is fastest where it is computed.

It holds no parameters; kernels in 8 bits multiply themselves (`quantized.py`).
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mistral_jax.model import kernels
from mistral_jax.model.einsum import einsum
from mistral_jax.model.quantized import MaybeQuantized, QuantizedKernel


def multiply(x: jax.Array, kernel: MaybeQuantized, outputs: int, dtype: jnp.dtype) -> jax.Array:
    """Sums over the axes of `kernel` but its first `outputs`, in `dtype`; the result is float32."""
    return multiply_each(x, [kernel], outputs, dtype)[0]


def multiply_each(
    x: jax.Array, each: Sequence[MaybeQuantized], outputs: int, dtype: jnp.dtype
) -> list[jax.Array]:
    """Is `multiply` by each kernel, all at once where that is faster."""
    places = x.shape[:2]
    rows = x.astype(dtype).reshape(*(places[:1] if places[1] == 1 else places), -1)
    matrices = [_matrix(kernel, outputs, dtype) for kernel in each]
    values = [getattr(matrix, "values", matrix) for matrix in matrices]
    if kernels.suit(rows, values):
        results = kernels.products(rows, values)
        results = [
            matrix.scaled(sums) if isinstance(matrix, QuantizedKernel) else sums
            for matrix, sums in zip(matrices, results, strict=True)
        ]
    else:
        results = [_multiply(rows, matrix) for matrix in matrices]
    return [
        result.reshape(*places, *kernel.shape[:outputs])
        for result, kernel in zip(results, each, strict=True)
    ]


def _matrix(kernel: MaybeQuantized, outputs: int, dtype: jnp.dtype) -> MaybeQuantized:
    """Returns `kernel` as [Y, X], in 8 bits if they have one scale for each output."""
    # XLA's CPU backend makes transposed copies of a kernel with heads unfolded.
    shape = (math.prod(kernel.shape[:outputs]), -1)
    if isinstance(kernel, QuantizedKernel):
        if kernel.scales_outputs(outputs):
            return QuantizedKernel(kernel.values.reshape(shape), kernel.scale.reshape(shape))
        kernel = kernel.dequantize(dtype)
    return kernel.astype(dtype).reshape(shape)


def _multiply(rows: jax.Array, matrix: MaybeQuantized) -> jax.Array:
    """Multiplies `rows` [..., X] by `matrix` [Y, X]; XLA's way."""
    quantized = isinstance(matrix, QuantizedKernel)
    values = matrix.values if quantized else matrix
    if kernels.should_widen(rows, values):
        wide = rows.astype(jnp.float32), kernels.widen(values, rows)
        sums = einsum("...X,YX->...Y", *wide)
        return matrix.scaled(sums) if quantized else sums
    if quantized:
        return matrix.product(rows)
    # XLA's CPU backend converts a whole 16-bit matrix to float32 for a single row, but not for two.
    lonely = rows.shape[:-1] == (1,) and rows.dtype != jnp.float32
    if lonely and jax.default_backend() == "cpu":
        return einsum("...X,YX->...Y", jnp.concatenate([rows, rows]), matrix)[:1]
    return einsum("...X,YX->...Y", rows, matrix)


def look_up(table: MaybeQuantized, tokens: jax.Array) -> jax.Array:
    """Takes the rows of `table` [V, D] that `tokens` [B, T] name: [B, T, D]."""
    if isinstance(table, QuantizedKernel):
        return look_up(table.values, tokens).astype(table.dtype) * look_up(table.scale, tokens)
    if table.dtype.itemsize == 2 and kernels.here():
        return kernels.take(table, tokens)
    return jnp.take(table, tokens, axis=0, mode="clip")
