"""Rows of tables: looked up, written, picked, and kept from being computed twice."""

import functools

import jax
import jax.numpy as jnp

from mistral_jax.ops import kernels
from mistral_jax.ops.backend import PLAIN, Backend
from mistral_jax.ops.quantized import MaybeQuantized, QuantizedMatrix


def look_up(table: MaybeQuantized, tokens: jax.Array, backend: Backend = PLAIN) -> jax.Array:
    """Takes the rows of `table` [V, D] that `tokens` [B, T] name: [B, T, D]."""
    if isinstance(table, QuantizedMatrix):
        values, scale = (look_up(x, tokens, backend) for x in (table.values, table.scale))
        return values.astype(table.dtype) * scale
    if table.dtype.itemsize == 2 and backend.has_native:
        return kernels.take(table, tokens)
    return jnp.take(table, tokens, axis=0, mode="clip")


def put(table: jax.Array, rows: jax.Array, slots: jax.Array, backend: Backend = PLAIN) -> jax.Array:
    """Writes rows into each part of a table.

    Args:
      table: [B, S, ...].
      rows: [B, T, ...] of the same dtype.
      slots: where in its part a row goes, [B, T] int32, no two at one; S = nowhere.
      backend: what this is traced for.

    Returns:
      The new table.
    """
    if slots.shape[1] == 1 and backend.has_native:
        return kernels.put(table, rows, slots)
    return _as_bits(_scatter, table, rows, slots)


# Row by row: with the rows' numbers among its indices, a scatter could write into any row, and
# would gather the rows of all devices.
@jax.vmap
def _scatter(table, rows, slots):
    return table.at[slots].set(rows, mode="drop")


def pick(table: jax.Array, rows: jax.Array, index: jax.Array) -> jax.Array:
    """Picks, for each part of a table, from [table | rows] by an index [B, n].

    Args:
      table: [B, S, ...].
      rows: [B, T, ...] of the same dtype.
      index: 0 to S + T - 1, [B, n] int32.

    Returns:
      [B, n, ...].
    """
    return _as_bits(_gather, table, rows, index)


@jax.vmap
def _gather(table, rows, index):
    return jnp.concatenate([table, rows])[index]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _as_bits(move, old, new, index):
    """Moves numbers of 16 bits as bits: XLA's CPU backend else makes float32 of a whole table.

    To write a lone row it does neither, and would copy the table for its bits.
    """
    if old.dtype.itemsize != 2 or index.size == 1:
        return move(old, new, index)
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (old, new))
    return jax.lax.bitcast_convert_type(move(*bits, index), old.dtype)


@_as_bits.defjvp
def _differentiate(move, given, tangents):
    """Differentiates what the bits stand for: by themselves they would have no gradient."""
    return jax.jvp(move, given, tangents)


def once(x: jax.Array, backend: Backend = PLAIN) -> jax.Array:
    """Returns `x`, computed once where XLA's CPU backend would compute it for each use."""
    return kernels.once(x) if backend.has_native else x
