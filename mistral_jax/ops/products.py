"""Products with a matrix, in the way that is fastest on the backend.

`quantized.py` has the products with int8 matrices.
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mistral_jax.ops import kernels
from mistral_jax.ops.backend import PLAIN, Backend
from mistral_jax.ops.quantized import MaybeQuantized, QuantizedMatrix, einsum
from mistral_jax.ops.rows import stored

# Rows from which writing operands out takes less time than it saves.
_MANY = 1024


def multiply(
    x: jax.Array,
    matrix: MaybeQuantized,
    outputs: int,
    dtype: jnp.dtype,
    backend: Backend = PLAIN,
) -> jax.Array:
    """Multiplies `x` by a matrix with operands in `dtype`, and sums in float32.

    Args:
      x: [B, T, ...], whose last axes are the matrix's input axes.
      matrix: output axes first.
      outputs: number of output axes.
      dtype: dtype of the operands.
      backend: the backend that this is traced for.

    Returns:
      [B, T, ...] float32, whose last axes are the matrix's output axes.
    """
    return multiply_each(x, [matrix], outputs, dtype, backend)[0]


def multiply_each(
    x: jax.Array,
    each: Sequence[MaybeQuantized],
    outputs: int,
    dtype: jnp.dtype,
    backend: Backend = PLAIN,
) -> list[jax.Array]:
    """Multiplies `x` by each matrix as `multiply` does, in one call where that is faster."""
    places = x.shape[:2]
    if backend.writes_operands and math.prod(places) >= _MANY:
        x = stored(x, backend)
    # Without the axis T = 1, XLA's CPU backend does not copy the matrix at each step of decoding.
    rows = x.astype(dtype).reshape(*(places[:1] if places[1] == 1 else places), -1)
    matrices = [_flat(matrix, outputs, dtype, backend) for matrix in each]
    values = [_values(matrix) for matrix in matrices]
    by_heads = outputs == 1 and each[0].ndim == 3 and not isinstance(each[0], QuantizedMatrix)
    if by_heads and backend.platform == "tpu" and math.prod(places) >= 128:
        # To flatten heads, XLA's TPU backend would copy the activations and the matrix.
        narrow = (_cast(matrix, dtype, backend) for matrix in each)
        return [einsum("...NH,YNH->...Y", x.astype(dtype), matrix) for matrix in narrow]
    if backend.has_native and kernels.suit(rows, values):
        sums = kernels.products(rows, values)
        results = [_scale(*pair) for pair in zip(sums, matrices, strict=True)]
    elif len(each) > 1 and _should_join(values, rows, backend):
        # The matrix unit multiplies by 128 columns at a time, and `rows` are read once.
        ends = [*itertools.accumulate(map(len, values))]
        joined = _multiply(rows, jnp.concatenate(values), backend)
        results = jnp.split(joined, ends[:-1], axis=-1)
    else:
        results = [_multiply(rows, matrix, backend) for matrix in matrices]
    return [
        result.reshape(*places, *matrix.shape[:outputs])
        for result, matrix in zip(results, each, strict=True)
    ]


def _should_join(values: Sequence[jax.Array], rows: jax.Array, backend: Backend) -> bool:
    """Tells whether to multiply many rows by a few narrow matrices at once."""
    narrow = sum(map(len, values)) <= 128 and math.prod(rows.shape[:-1]) >= 128
    return narrow and backend.platform == "tpu" and values[0].dtype != jnp.int8


def _flat(
    matrix: MaybeQuantized, outputs: int, dtype: jnp.dtype, backend: Backend
) -> MaybeQuantized:
    """Returns `matrix` as [Y, X]; it stays quantised if it is int8 with a scale for each output."""
    # XLA's CPU backend would make transposed copies of a matrix with a separate axis of heads.
    shape = (math.prod(matrix.shape[:outputs]), -1)
    if isinstance(matrix, QuantizedMatrix):
        if matrix.scales_outputs(outputs):
            return QuantizedMatrix(matrix.values.reshape(shape), matrix.scale.reshape(shape))
        matrix = matrix.dequantize(dtype)
    return _cast(matrix, dtype, backend).reshape(shape)


def _cast(matrix: jax.Array, dtype: jnp.dtype, backend: Backend) -> jax.Array:
    """Casts a matrix to the dtype of the operands."""
    if backend.platform == "tpu" and matrix.dtype == jnp.float32 and dtype == jnp.bfloat16:
        return _round(matrix)
    return matrix.astype(dtype)


@jax.custom_jvp
def _round(matrix: jax.Array) -> jax.Array:
    """Rounds a matrix to bfloat16.

    XLA's TPU backend fuses two operations into a loop with large blocks, which takes half the time
    of a lone conversion.
    """
    info = jnp.finfo(jnp.bfloat16)
    return jax.lax.reduce_precision(matrix, info.nexp, info.nmant).astype(jnp.bfloat16)


@_round.defjvp
def _round_tangent(primals, tangents):
    """Converts tangents only: the gradient of a matrix stays float32."""
    return _round(*primals), tangents[0].astype(jnp.bfloat16)


def _values(matrix: MaybeQuantized) -> jax.Array:
    return matrix.values if isinstance(matrix, QuantizedMatrix) else matrix


def _scale(sums: jax.Array, matrix: MaybeQuantized) -> jax.Array:
    """Scales `sums`, the product with the values of `matrix`, to the product with `matrix`."""
    return matrix.scaled(sums) if isinstance(matrix, QuantizedMatrix) else sums


def _multiply(rows: jax.Array, matrix: MaybeQuantized, backend: Backend) -> jax.Array:
    """Multiplies `rows` [..., X] by `matrix` [Y, X] with XLA's operations."""
    if rows.shape[:-1] == (1,) and _avoids_one_row(rows, matrix, backend):
        return _multiply(jnp.pad(rows, ((0, 1), (0, 0))), matrix, backend)[:1]
    if backend.has_native and kernels.should_widen(rows, _values(matrix)):
        return _scale(_multiply_wide(rows, _values(matrix)), matrix)
    if isinstance(matrix, QuantizedMatrix):
        # With more rows it pays to write the matrix out in float; a CPU with instructions for bytes
        # reaches that point later. On a mesh, the largest number of a row would take an all-reduce.
        few = math.prod(rows.shape[:-1]) <= (64 if backend.chip == "vnni" else 8)
        return matrix.product(rows, in_integers=few and backend.is_one_cpu)
    return einsum("...X,YX->...Y", rows, matrix)


def _avoids_one_row(rows: jax.Array, matrix: MaybeQuantized, backend: Backend) -> bool:
    """Tells whether XLA multiplies two rows faster than one.

    For one row, its CPU backend converts a whole 16-bit matrix to float32, and its TPU backend
    multiplies on the vector unit. For two rows they do not.
    """
    if backend.platform == "cpu":
        return rows.dtype != jnp.float32 and not isinstance(matrix, QuantizedMatrix)
    return backend.platform == "tpu"


@jax.custom_jvp
def _multiply_wide(rows: jax.Array, matrix: jax.Array) -> jax.Array:
    """Multiplies `rows` [..., X] by `matrix` [Y, X], both widened to float32."""
    return einsum("...X,YX->...Y", rows.astype(jnp.float32), kernels.widen(matrix, rows))


@_multiply_wide.defjvp
def _differentiate(primals, tangents):
    """Differentiates the product without `widen`, so that no wide matrix is kept until then."""

    def narrow(rows, matrix):
        return einsum("...X,YX->...Y", rows, matrix.astype(rows.dtype))

    return _multiply_wide(*primals), jax.jvp(narrow, primals, tangents)[1]
