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


def put(
    table: jax.Array,
    rows: jax.Array,
    slots: jax.Array,
    axis: int = 1,
    backend: Backend = PLAIN,
) -> jax.Array:
    """Writes T rows into each of B tables.

    Args:
      table: the tables, [B, S, ...]; S may be a later axis.
      rows: the rows of each table, [B, T, ...], of the same dtype; T is the axis where S is.
      slots: the index at which to write each row, [B, T] int32, without repetition in a table; a
        row with index S is not written.
      axis: index of the axis S.
      backend: the backend that this is traced for.

    Returns:
      The new tables.
    """
    if axis == 1 and slots.shape[1] == 1 and backend.has_native:
        return kernels.put(table, rows, slots)
    by = _scatter_each if backend.platform == "gpu" else _scatter
    return _as_bits(functools.partial(by, axis), table, rows, slots)


def _scatter_each(axis, table, rows, slots):
    """Scatters in each entry of the axes before S by itself: else a GPU transposes the tables."""

    def write(table, rows, slots):
        return table.at[slots].set(rows, mode="drop")

    for size in table.shape[1:axis]:
        write = jax.vmap(write)
        slots = jnp.broadcast_to(slots[:, None], (len(slots), size, *slots.shape[1:]))
    return jax.vmap(write)(table, rows, slots)


def _scatter(axis, table, rows, slots):
    before = (slice(None),) * (axis - 1)

    def write(table, rows, slots):
        return table.at[*before, slots].set(rows, mode="drop")

    # vmap keeps B out of the scatter's indices. With B among them XLA must assume that a row may go
    # to any table, and gathers the tables of all devices.
    return jax.vmap(write)(table, rows, slots)


def pick(table: jax.Array, rows: jax.Array, index: jax.Array, axis: int = 1) -> jax.Array:
    """Picks entries from the concatenation of each of B tables with its rows.

    Args:
      table: the tables, [B, S, ...]; S may be a later axis.
      rows: the rows of each table, [B, T, ...], of the same dtype; T is the axis where S is.
      index: indices into [table | rows], from 0 to S + T - 1, [B, n] int32.
      axis: index of the axis S.

    Returns:
      [B, n, ...], where n is the axis where S is.
    """
    return _as_bits(functools.partial(_gather, axis), table, rows, index)


def _gather(axis, table, rows, index):
    before = (slice(None),) * (axis - 1)
    whole = jnp.concatenate([table, rows], axis)
    return jax.vmap(lambda whole, index: whole[*before, index])(whole, index)


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
