"""How queries weigh keys and values, at once or in pieces whose softmax is joined as they come.

It makes no mask.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mistral_jax.ops.quantized import MaybeQuantized, QuantizedMatrix, einsum

# Queries, and keys, of a piece: its scores stay in a CPU's caches, and are enough to share.
PIECE = 256

Weighed = tuple[jax.Array, jax.Array, jax.Array]


def weigh(q: jax.Array, k: MaybeQuantized, v: MaybeQuantized, mask: jax.Array) -> Weighed:
    """Weighs values by e to the power of a score less the largest.

    Scores are q k / sqrt(H) (arXiv 1706.03762, section 3.2.1), computed and summed in float32.

    Args:
      q: queries, [B, T, N, H].
      k: keys, [B, S, K, H]. Scales of 8 bits multiply scores, and keys are not written out.
      v: values, likewise; their scales multiply weights.
      mask: which keys each query sees, [B, T, S] bool; of none it sees the weights are equal.

    Returns:
      The largest scores, [B, K, G, T], the weights' sums, likewise, and the weighted values,
      [B, K, G, T, H]; all float32.
    """
    batch, length, _, head_dim = q.shape
    (k, k_scale), (v, v_scale) = _apart(k, q.dtype), _apart(v, q.dtype)
    grouped = q.reshape(batch, length, k.shape[2], -1, head_dim)
    if length == 1:
        scores = einsum("BTKGH,BSKH->BKGTS", grouped, k)
    else:  # Else XLA's CPU backend multiplies k by q, and reads scores across their rows.
        scores = einsum("BKGTH,BSKH->BKGTS", jnp.moveaxis(grouped, 1, 3), k)
    # A large negative instead of -inf: a query that sees nothing gets equal weights, not NaN.
    lowest = jnp.finfo(jnp.float32).min
    scores = jnp.where(mask[:, None, None], scores * (k_scale * head_dim**-0.5), lowest)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - top[..., None])
    # Dividing after the product touches T x H numbers instead of T x S.
    mixed = einsum("BKGTS,BSKH->BKGTH", (weights * v_scale).astype(v.dtype), v)
    return top, jnp.sum(weights, axis=-1), mixed


def _apart(x: MaybeQuantized, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | float]:
    """Returns what to multiply, [B, S, K, H], and what to multiply the product by."""
    if not isinstance(x, QuantizedMatrix):
        return x, 1.0
    return x.values.astype(dtype), jnp.moveaxis(x.scale, 1, 3)[:, :, None]


def attend_present(
    weigh: Callable[..., Weighed],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    before: int,
    origin: jax.Array,
) -> jax.Array:
    """Attends to the keys that are there, and that the window can reach, and reads no others.

    Each row by itself, a block of queries at a time, piece by piece of the keys (online softmax,
    arXiv 1805.02867). How many pieces is found at run time, so there is no gradient.

    Args:
      weigh: returns of queries [1, T, N, H], keys, values, and the positions of both: the largest
        score of each query [1, K, G, T], the sum of its weights, e to the power of a score less the
        largest, and its values so weighted, [1, K, G, T, H]; all float32.
      q: queries, [B, T, N, H].
      k: keys, [B, S, K, H].
      v: values, [B, S, K, H].
      q_positions: place of each query, [B, T] int32; -1 = padding, whose output is finite.
      kv_positions: place of each key, [B, S] int32; -1 = no key there.
      before: how many places before its own a query sees at most.
      origin: key i of a row has place origin + i, or is not there, [B] int32.

    Returns:
      [B, T, N, H] in the dtype of `q`.
    """
    rows, length, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    size, count = min(PIECE, length), min(PIECE, keys)
    q, q_positions = fill(q, size, 0), fill(q_positions, size, -1)
    blocks = q.shape[1] // size
    shape = (1, kv_heads, heads // kv_heads, size)

    def attend_from(block):
        row, start = block // blocks, block % blocks * size
        queries, places = _cut((q, q_positions), row, start, size)
        # The indices of keys that somebody may see; for padding alone, any.
        own, padding = places - origin[row], places < 0
        stop = jnp.clip(jnp.max(jnp.where(padding, 0, own + 1)), 1, keys)
        reach = jnp.maximum(own - before, -origin[row])
        first = jnp.clip(jnp.min(jnp.where(padding, keys, reach)), 0, stop - 1)

        def add_piece(i, found):
            start = first + i * count
            at = jnp.minimum(start, keys - count)
            near_k, near_v, near = _cut((k, v, kv_positions), row, at, count)
            # What the piece before has seen does not count twice.
            near = jnp.where(at + jnp.arange(count, dtype=jnp.int32)[None] < start, -1, near)
            return _join(found, weigh(queries, near_k, near_v, places, near))

        pieces = (stop - first + count - 1) // count
        _, total, mixed = jax.lax.fori_loop(0, pieces, add_piece, _nothing(*shape, head_dim))
        return jnp.moveaxis(mixed / total[..., None], 3, 1).astype(q.dtype)

    mixed = jax.lax.map(attend_from, jnp.arange(rows * blocks, dtype=jnp.int32))
    return mixed.reshape(q.shape)[:, :length]


def weigh_pieces(weigh: Callable[..., Weighed], keys: Any, size: int) -> Weighed:
    """Weighs all keys, there or not, `size` of them at a time (online softmax); it has a gradient.

    Args:
      weigh: returns of a piece of `keys` what `attend_present` says, for all rows.
      keys: arguments of `weigh`, arrays [B, S, ...]; whole numbers are filled up with -1.
      size: keys of a piece, at most.

    Returns:
      What `weigh` would return of all.
    """
    length = jax.tree.leaves(keys)[0].shape[1]
    count = -(-length // size)
    size = -(-length // count)  # Pieces as even as can be.

    def cut(x):
        filled = fill(x, size, -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0)
        return jnp.moveaxis(filled.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def add_piece(found, piece):
        return _join(found, weigh(*piece)), None

    pieces = jax.tree.map(cut, keys)
    *_, mixed = jax.eval_shape(weigh, *jax.tree.map(lambda x: x[0], pieces))
    return jax.lax.scan(add_piece, _nothing(*mixed.shape), pieces)[0]


def _nothing(*shape: int) -> Weighed:
    """Returns what no key at all has for a result, where values weighted are of `shape`."""
    lowest = jnp.full(shape[:-1], jnp.finfo(jnp.float32).min)
    return lowest, jnp.zeros(shape[:-1], jnp.float32), jnp.zeros(shape, jnp.float32)


def _join(one: Weighed, other: Weighed) -> Weighed:
    top = jnp.maximum(one[0], other[0])
    a, b = jnp.exp(one[0] - top), jnp.exp(other[0] - top)
    return top, a * one[1] + b * other[1], a[..., None] * one[2] + b[..., None] * other[2]


def take(tree: Any, first: jax.Array, count: int) -> Any:
    """Slices arrays along their second axis."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, count, axis=1), tree)


def _cut(tree, row, first, count):
    """Slices arrays along their second axis, of one row."""

    def cut(x):
        rest = x.shape[2:]
        return jax.lax.dynamic_slice(
            x, (row, first, *[jnp.int32(0)] * len(rest)), (1, count, *rest)
        )

    return jax.tree.map(cut, tree)


def fill(x: jax.Array, size: int, value: int) -> jax.Array:
    """Pads the second axis of `x` to a multiple of `size`."""
    widths = [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths, constant_values=value)
