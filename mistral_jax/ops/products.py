"""Products with a kernel and rows of a table, in the way that is fastest where it is computed.

It holds no parameters; kernels in 8 bits multiply themselves (`quantized.py`).
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mistral_jax.ops import kernels
from mistral_jax.ops.einsum import einsum
from mistral_jax.ops.quantized import MaybeQuantized, QuantizedKernel


def multiply(x: jax.Array, kernel: MaybeQuantized, outputs: int, dtype: jnp.dtype) -> jax.Array:
    """Sums over the axes of `kernel` but its first `outputs`, in `dtype`; the result is float32."""
    return multiply_each(x, [kernel], outputs, dtype)[0]


def multiply_each(
    x: jax.Array, each: Sequence[MaybeQuantized], outputs: int, dtype: jnp.dtype
) -> list[jax.Array]:
    """Is `multiply` by each kernel, all at once where that is faster."""
    places = x.shape[:2]
    # In a loop of single tokens XLA's CPU backend copies a kernel if the tokens keep their axis.
    rows = x.astype(dtype).reshape(*(places[:1] if places[1] == 1 else places), -1)
    matrices = [_matrix(kernel, outputs, dtype) for kernel in each]
    values = [_values(matrix) for matrix in matrices]
    if kernels.suit(rows, values):
        sums = kernels.products(rows, values)
        results = [_scale(*pair) for pair in zip(sums, matrices, strict=True)]
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


def _values(matrix: MaybeQuantized) -> jax.Array:
    return matrix.values if isinstance(matrix, QuantizedKernel) else matrix


def _scale(sums: jax.Array, matrix: MaybeQuantized) -> jax.Array:
    """Returns the product with `matrix`, of `sums`, that with its values."""
    return matrix.scaled(sums) if isinstance(matrix, QuantizedKernel) else sums


def _multiply(rows: jax.Array, matrix: MaybeQuantized) -> jax.Array:
    """Multiplies `rows` [..., X] by `matrix` [Y, X]; XLA's way."""
    if kernels.should_widen(rows, _values(matrix)):
        return _scale(_multiply_wide(rows, _values(matrix)), matrix)
    if isinstance(matrix, QuantizedKernel):
        return matrix.product(rows)
    # XLA's CPU backend converts a whole 16-bit matrix to float32 for a single row, but not for two.
    lonely = rows.shape[:-1] == (1,) and rows.dtype != jnp.float32
    if lonely and jax.default_backend() == "cpu":
        return einsum("...X,YX->...Y", jnp.concatenate([rows, rows]), matrix)[:1]
    return einsum("...X,YX->...Y", rows, matrix)


@jax.custom_jvp
def _multiply_wide(rows: jax.Array, matrix: jax.Array) -> jax.Array:
    """Multiplies `rows` [..., X] by `matrix` [Y, X], both widened to float32."""
    return einsum("...X,YX->...Y", rows.astype(jnp.float32), kernels.widen(matrix, rows))


@_multiply_wide.defjvp
def _differentiate(primals, tangents):
    """Differentiates what is the same, and keeps no widened matrix for the way back."""

    def narrow(rows, matrix):
        return einsum("...X,YX->...Y", rows, matrix.astype(rows.dtype))

    return _multiply_wide(*primals), jax.jvp(narrow, primals, tangents)[1]


def look_up(table: MaybeQuantized, tokens: jax.Array) -> jax.Array:
    """Takes the rows of `table` [V, D] that `tokens` [B, T] name: [B, T, D]."""
    if isinstance(table, QuantizedKernel):
        return look_up(table.values, tokens).astype(table.dtype) * look_up(table.scale, tokens)
    if table.dtype.itemsize == 2 and kernels.here():
        return kernels.take(table, tokens)
    return jnp.take(table, tokens, axis=0, mode="clip")
