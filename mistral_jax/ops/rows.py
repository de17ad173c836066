"""Rows of tables: look them up, write them and pick them, in the way that suits the backend."""

import functools

import jax
import jax.numpy as jnp

from mistral_jax.ops import kernels, partition
from mistral_jax.ops.backend import PLAIN, Backend
from mistral_jax.ops.partition import Rules
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
    rules: Rules = (),
) -> jax.Array:
    """Writes T rows into each of B tables.

    Args:
      table: the tables, [B, S, ...], or tables by heads, [B, K, S, ...].
      rows: the rows of each table, [B, T, ...] or [B, K, T, ...], of the same dtype.
      slots: the index at which to write each row, [B, T] int32, without repetition in a table; a
        row with index S is not written.
      axis: index of the axis S, 1 or 2.
      backend: the backend that this is traced for.
      rules: mesh axes of the logical axes, by which tables by heads are partitioned.

    Returns:
      The new tables.
    """
    if axis == 1 and slots.shape[1] == 1 and backend.has_native:
        return kernels.put(table, rows, slots)
    scatter = _scatter if axis == 1 else partition.by_tables(_scatter_by_heads, table, rules)
    return _move(scatter, table, rows, slots, backend)


# vmap keeps B out of the scatter's indices. With B among them XLA must assume that a row may go to
# any table, and gathers the tables of all devices.
@jax.vmap
def _scatter(table, rows, slots):
    return table.at[slots].set(rows, mode="drop")


def _scatter_by_heads(table, rows, slots):
    if slots.size == 1:
        # A TPU would copy the cache of one row to VMEM and back for a scatter.
        at, start = jnp.minimum(slots[0, 0], table.shape[2] - 1), [jnp.int32(0)] * table.ndim
        start[2] = at
        old = jax.lax.dynamic_slice(table, start, rows.shape)
        new = jnp.where(slots[0, 0] == at, rows, old)
        return jax.lax.dynamic_update_slice(table, new, start)
    # Each head is a table of its own. A TPU or GPU would copy the cache before and after a scatter
    # that writes to all heads, into an order in which a slot's heads are neighbours.
    flat = (x.reshape(-1, *x.shape[2:]) for x in (table, rows))
    return _scatter(*flat, jnp.repeat(slots, table.shape[1], axis=0)).reshape(table.shape)


def swap_heads(x: MaybeQuantized) -> MaybeQuantized:
    """Converts keys or values between [B, S, K, H] and [B, K, S, H].

    The scales of int8 numbers are [B, S, K, 1] and [B, K, S]. A TPU would store a last axis of one
    entry in another order than its kernels read, and copy the scales at each step of decoding.
    """
    if not isinstance(x, QuantizedMatrix):
        return jnp.swapaxes(x, 1, 2)
    scale = jnp.swapaxes(x.scale, 1, 2)
    scale = scale[..., 0] if scale.ndim == 4 else scale[..., None]
    return QuantizedMatrix(jnp.swapaxes(x.values, 1, 2), scale)


def pick(
    table: jax.Array,
    rows: jax.Array,
    index: jax.Array,
    axis: int = 1,
    backend: Backend = PLAIN,
) -> jax.Array:
    """Picks entries from the concatenation of each of B tables with its rows.

    Args:
      table: the tables, [B, S, ...]; S may be a later axis.
      rows: the rows of each table, [B, T, ...], of the same dtype; T is the axis where S is.
      index: indices into [table | rows], from 0 to S + T - 1, [B, n] int32.
      axis: index of the axis S.
      backend: the backend that this is traced for.

    Returns:
      [B, n, ...], where n is the axis where S is.
    """
    return _move(functools.partial(_gather, axis), table, rows, index, backend)


def _gather(axis, table, rows, index):
    before = (slice(None),) * (axis - 1)
    whole = jnp.concatenate([table, rows], axis)
    return jax.vmap(lambda whole, index: whole[*before, index])(whole, index)


def _move(move, old, new, index, backend):
    """Calls `move`, on a CPU on the bits of 16-bit numbers.

    Otherwise XLA's CPU backend converts the whole table to float32 and back. It does not when it
    writes a single row, and then would copy the table to see it as bits.
    """
    if _needs_bits(old, backend) and index.size > 1:
        return _move_bits(move, old, new, index)
    return move(old, new, index)


def _needs_bits(x, backend):
    """Tells whether 16-bit numbers are moved as integers: on a TPU a bitcast is a slow copy."""
    return x.dtype.itemsize == 2 and backend.platform == "cpu"


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _move_bits(move, old, new, index):
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (old, new))
    return jax.lax.bitcast_convert_type(move(*bits, index), old.dtype)


@_move_bits.defjvp
def _differentiate(move, given, tangents):
    """Differentiates `move` on the numbers themselves, for bits have no gradient."""
    return jax.jvp(move, given, tangents)


def once(x: jax.Array, backend: Backend = PLAIN) -> jax.Array:
    """Returns `x`, computed once where XLA's CPU backend would compute it for each use."""
    return kernels.once(x) if backend.has_native else x


def apart(x: jax.Array, backend: Backend) -> jax.Array:
    """Returns `x`, computed before the operation that reads it, if it is one token of each row.

    XLA's TPU backend would compute a product inside the next one, which then waits for both
    matrices where it could prefetch the second.
    """
    if backend.platform != "tpu" or x.shape[1] > 1:
        return x
    return jax.lax.optimization_barrier(x)


def stored(x: jax.Array, backend: Backend = PLAIN) -> jax.Array:
    """Returns `x` [B, T, ...], which a TPU writes to memory before it is used.

    XLA's TPU backend fuses elementwise operations and sums of rows into the products before and
    after them, and computes operands again for each block of a product. With silu or a norm inside
    it, a product takes up to twice the time.
    """
    return _stored(x) if _pays(x, backend) else x


def narrowed(x: jax.Array, dtype: jnp.dtype, backend: Backend = PLAIN) -> jax.Array:
    """Returns `x` [B, T, heads, H], a product, in `dtype`.

    Unless it is differentiated, a TPU rounds it as [B, T, heads * H], and then writes this order.
    XLA may write an array with an axis of heads in another order, and copy it afterwards.
    """
    return _narrowed(x, dtype) if x.ndim == 4 and _pays(x, backend) else x.astype(dtype)


def rounded(x: jax.Array, dtype: jnp.dtype, backend: Backend) -> jax.Array:
    """Returns `x`, a product to be added to a larger one, which a TPU writes in `dtype` before.

    The larger product then adds it to each block before it writes the block, in half of the bytes.
    Otherwise XLA adds the larger product to the smaller one, and writes and reads it in float32.
    """
    return _stored(x.astype(dtype)).astype(x.dtype) if _pays(x, backend) else x


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


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _narrowed(x, dtype):
    return x.reshape(*x.shape[:2], -1).astype(dtype).reshape(x.shape)


@_narrowed.defjvp
def _narrow(dtype, primals, tangents):
    return primals[0].astype(dtype), tangents[0].astype(dtype)


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


def as_bits(x: jax.Array, backend: Backend) -> jax.Array:
    """Reinterprets 16-bit floats as integers on a CPU, where XLA would copy them as float32."""
    if not _needs_bits(x, backend):
        return x
    return jax.lax.optimization_barrier(jax.lax.bitcast_convert_type(x, jnp.uint16))


def from_bits(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Undoes `as_bits`."""
    if x.dtype == dtype:
        return x
    return jax.lax.bitcast_convert_type(jax.lax.optimization_barrier(x), dtype)
