"""Rows of tables: look them up, write them and pick them, in the way that suits the backend."""

import functools

import jax
import jax.numpy as jnp

from mistral_jax.ops import kernels
from mistral_jax.ops.backend import PLAIN, Backend
from mistral_jax.ops.quantized import MaybeQuantized, QuantizedMatrix


def look_up(table: MaybeQuantized, tokens: jax.Array, backend: Backend = PLAIN) -> jax.Array:
    """Returns row `tokens[b, t]` of `table` [V, D] for each of `tokens` [B, T]: [B, T, D]."""
    if isinstance(table, QuantizedMatrix):
        values, scale = (look_up(x, tokens, backend) for x in (table.values, table.scale))
        return values.astype(table.dtype) * scale
    if table.dtype.itemsize == 2 and backend.has_native:
        return kernels.take(table, tokens)
    return jnp.take(table, tokens, axis=0, mode="clip")


def put(table: jax.Array, rows: jax.Array, slots: jax.Array, backend: Backend = PLAIN) -> jax.Array:
    """Writes T rows into each of B tables.

    Args:
      table: the tables, [B, S, ...].
      rows: the rows of each table, [B, T, ...], of the same dtype.
      slots: the index at which to write each row, [B, T] int32, without repetition in a table; a
        row with index S is not written.
      backend: the backend that this is traced for.

    Returns:
      The new tables.
    """
    if slots.shape[1] == 1 and backend.has_native:
        return kernels.put(table, rows, slots)
    return _as_bits(_scatter, table, rows, slots)


# vmap keeps B out of the scatter's indices. With B among them XLA must assume that a row may go to
# any table, and gathers the tables of all devices.
@jax.vmap
def _scatter(table, rows, slots):
    return table.at[slots].set(rows, mode="drop")


def pick(table: jax.Array, rows: jax.Array, index: jax.Array) -> jax.Array:
    """Picks entries from the concatenation of each of B tables with its rows.

    Args:
      table: the tables, [B, S, ...].
      rows: the rows of each table, [B, T, ...], of the same dtype.
      index: indices into [table | rows], from 0 to S + T - 1, [B, n] int32.

    Returns:
      [B, n, ...].
    """
    return _as_bits(_gather, table, rows, index)


@jax.vmap
def _gather(table, rows, index):
    return jnp.concatenate([table, rows])[index]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _as_bits(move, old, new, index):
    """Calls `move` on the bits of 16-bit numbers.

    Otherwise XLA's CPU backend converts the whole table to float32 and back. It does not when it
    writes a single row, and then would copy the table to see it as bits.
    """
    if old.dtype.itemsize != 2 or index.size == 1:
        return move(old, new, index)
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (old, new))
    return jax.lax.bitcast_convert_type(move(*bits, index), old.dtype)


@_as_bits.defjvp
def _differentiate(move, given, tangents):
    """Differentiates `move` on the numbers themselves, for bits have no gradient."""
    return jax.jvp(move, given, tangents)


def once(x: jax.Array, backend: Backend = PLAIN) -> jax.Array:
    """Returns `x`, computed once where XLA's CPU backend would compute it for each use."""
    return kernels.once(x) if backend.has_native else x


def stored(x: jax.Array, backend: Backend = PLAIN) -> jax.Array:
    """Returns `x` [B, T, ...], which a TPU writes to memory before it is used.

    XLA's TPU backend fuses elementwise operations and sums of rows into the products before and
    after them, and computes operands again for each block of a product. With silu or a norm inside
    it, a product takes up to twice the time.
    """
    return _stored(x) if _pays(x, backend) else x


def stored_gradient(x: jax.Array, backend: Backend = PLAIN) -> jax.Array:
    """Returns `x` [B, T, ...] unchanged; its gradient is written to memory as by `stored`."""
    return _stored_gradient(x) if _pays(x, backend) else x


def _pays(x: jax.Array, backend: Backend) -> bool:
    """Tells whether a product reads `x` [B, T, ...] so often that a TPU should store it first."""
    return backend.platform == "tpu" and x.shape[0] * x.shape[1] >= 128


def operand_gradient(x: jax.Array, dtype: jnp.dtype, backend: Backend = PLAIN) -> jax.Array:
    """Returns `x`, a product, unchanged; its gradient is written to memory in `dtype`.

    The products that use the gradient round it to the dtype of their operands in any case.
    """
    return _rounded_gradient(x, dtype) if _pays(x, backend) else x


@jax.custom_jvp
def _stored(x):
    return jax.lax.optimization_barrier(x)


@_stored.defjvp
def _differentiate_stored(primals, tangents):
    """Leaves tangents as they are, because XLA can compute gradients at the end of a product."""
    return _stored(*primals), tangents[0]


@jax.custom_vjp
def _stored_gradient(x):
    return x


def _store_gradient(_, grad):
    return (jax.lax.optimization_barrier(grad),)


_stored_gradient.defvjp(lambda x: (x, None), _store_gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _rounded_gradient(x, dtype):
    return x


def _round_gradient(dtype, _, grad):
    return (jax.lax.optimization_barrier(grad.astype(dtype)).astype(grad.dtype),)


_rounded_gradient.defvjp(lambda x, dtype: (x, None), _round_gradient)


def as_bits(x: jax.Array) -> jax.Array:
    """Reinterprets 16-bit floats as integers; XLA's CPU backend would copy them as float32."""
    if x.dtype.itemsize != 2:
        return x
    return jax.lax.optimization_barrier(jax.lax.bitcast_convert_type(x, jnp.uint16))


def from_bits(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Undoes `as_bits`."""
    if x.dtype == dtype:
        return x
    return jax.lax.bitcast_convert_type(jax.lax.optimization_barrier(x), dtype)
