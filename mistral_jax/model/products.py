"""Products with a kernel and rows of a table, in the way that is fastest where it is computed.

It holds no parameters; kernels in 8 bits multiply themselves (`quantized.py`).
"""

import math

import jax
import jax.numpy as jnp

from mistral_jax.model import kernels
from mistral_jax.model.einsum import einsum
from mistral_jax.model.quantized import MaybeQuantized, QuantizedKernel


def multiply(x: jax.Array, kernel: jax.Array, outputs: int, dtype: jnp.dtype) -> jax.Array:
    """Sums over the axes of `kernel` but its first `outputs`, in `dtype`; the result is float32."""
    places = x.shape[:2]
    rows = x.astype(dtype).reshape(*(places[:1] if places[1] == 1 else places), -1)
    if isinstance(kernel, QuantizedKernel):
        if kernel.scales_outputs(outputs):
            product = kernel.product(rows, outputs)
            return product.reshape(*places, *kernel.shape[:outputs])
        kernel = kernel.dequantize(dtype)
    # Matrices, for XLA's CPU backend: it makes transposed copies of a kernel with heads unfolded,
    # and, in a loop of single tokens, of any kernel if the tokens keep their axis.
    matrix = kernel.astype(dtype).reshape(math.prod(kernel.shape[:outputs]), -1)
    if kernels.suit(math.prod(places), dtype):
        return kernels.product(rows, matrix).reshape(*places, *kernel.shape[:outputs])
    # It also converts a whole 16-bit kernel to float32 for a single row, but not for two.
    lonely = places == (1, 1) and dtype != jnp.float32 and jax.default_backend() == "cpu"
    product = einsum("...X,YX->...Y", jnp.concatenate([rows, rows]) if lonely else rows, matrix)
    return product[: places[0]].reshape(*places, *kernel.shape[:outputs])


def look_up(table: MaybeQuantized, tokens: jax.Array) -> jax.Array:
    """Takes the rows of `table` [V, D] that `tokens` [B, T] name: [B, T, D]."""
    if isinstance(table, QuantizedKernel):
        return look_up(table.values, tokens).astype(table.dtype) * look_up(table.scale, tokens)
    if table.dtype.itemsize == 2 and kernels.here():
        return kernels.take(table, tokens)
    return jnp.take(table, tokens, axis=0, mode="clip")
