"""Attention in XLA's operations: all keys at once, or piece by piece with an online softmax.

The online softmax (arXiv 1805.02867) keeps for each query the largest score so far, the sum of its
weights and the weighted values, and rescales them when a piece has a larger score.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mistral_jax.ops.quantized import MaybeQuantized, QuantizedMatrix, einsum

# Queries of a block, and keys of a piece. Their scores fit in a CPU's caches, and are enough work
# for all of its threads.
PIECE = 256

Weighed = tuple[jax.Array, jax.Array, jax.Array]


def weigh(q: jax.Array, k: MaybeQuantized, v: MaybeQuantized, mask: jax.Array) -> Weighed:
    """Computes attention before its division by the sum of the weights.

    Scores are q k / sqrt(H) (arXiv 1706.03762, section 3.2.1), and the weight of a key is
    exp(score - largest score of the query). Scores and sums are float32.

    Args:
      q: queries, [B, T, N, H].
      k: keys, [B, S, K, H]. The scales of int8 keys multiply the scores, so that the keys are never
        written out in a wider dtype.
      v: values, [B, S, K, H]. Their scales multiply the weights.
      mask: True where a query sees a key, [B, T, S]. A query that sees no key gets equal weights.

    Returns:
      The largest scores, [B, K, G, T], the sums of the weights, [B, K, G, T], and the weighted sums
      of the values, [B, K, G, T, H]; all float32.
    """
    batch, length, _, head_dim = q.shape
    (k, k_scale), (v, v_scale) = _apart(k, q.dtype), _apart(v, q.dtype)
    grouped = q.reshape(batch, length, k.shape[2], -1, head_dim)
    if length == 1:
        scores = einsum("BTKGH,BSKH->BKGTS", grouped, k)
    else:  # With the equation above, XLA's CPU backend would read the scores with a stride.
        scores = einsum("BKGTH,BSKH->BKGTS", jnp.moveaxis(grouped, 1, 3), k)
    # The lowest finite number instead of -inf: a query that sees no key gets equal weights, not
    # NaN.
    lowest = jnp.finfo(jnp.float32).min
    scores = jnp.where(mask[:, None, None], scores * (k_scale * head_dim**-0.5), lowest)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - top[..., None])
    # Dividing after the product touches T x H numbers instead of T x S.
    mixed = einsum("BKGTS,BSKH->BKGTH", (weights * v_scale).astype(v.dtype), v)
    return top, jnp.sum(weights, axis=-1), mixed


def _apart(x: MaybeQuantized, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | float]:
    """Returns the values [B, S, K, H] to multiply, and the scales of the product."""
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
    """Attends to the keys that are present and within reach of the window, and reads no others.

    It processes one row and one block of queries at a time, and the keys in pieces. The number of
    pieces is known only at run time, so there is no gradient.

    Args:
      weigh: a function of queries [1, T, N, H], keys, values and the positions of both, which
        returns what `weigh` of this module does.
      q: queries, [B, T, N, H].
      k: keys, [B, S, K, H].
      v: values, [B, S, K, H].
      q_positions: position of each query in its text, [B, T] int32; -1 = padding, whose output is
        finite and has no meaning.
      kv_positions: position of each key in its text, [B, S] int32; -1 = no key.
      before: the most positions that a query sees before its own.
      origin: position of each row's key 0, [B] int32: key i has position origin + i, or is absent.

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
        # The range of keys that some query of the block may see; any range if all are padding.
        own, padding = places - origin[row], places < 0
        stop = jnp.clip(jnp.max(jnp.where(padding, 0, own + 1)), 1, keys)
        reach = jnp.maximum(own - before, -origin[row])
        first = jnp.clip(jnp.min(jnp.where(padding, keys, reach)), 0, stop - 1)

        def add_piece(i, found):
            start = first + i * count
            at = jnp.minimum(start, keys - count)
            near_k, near_v, near = _cut((k, v, kv_positions), row, at, count)
            # The last piece may overlap the one before it; mask the keys that were already seen.
            near = jnp.where(at + jnp.arange(count, dtype=jnp.int32)[None] < start, -1, near)
            return _join(found, weigh(queries, near_k, near_v, places, near))

        pieces = (stop - first + count - 1) // count
        _, total, mixed = jax.lax.fori_loop(0, pieces, add_piece, _nothing(*shape, head_dim))
        return jnp.moveaxis(mixed / total[..., None], 3, 1).astype(q.dtype)

    mixed = jax.lax.map(attend_from, jnp.arange(rows * blocks, dtype=jnp.int32))
    return mixed.reshape(q.shape)[:, :length]


def weigh_pieces(weigh: Callable[..., Weighed], keys: Any, size: int) -> Weighed:
    """Computes `weigh` of all keys, at most `size` at a time; it has a gradient.

    Args:
      weigh: a function of a piece of `keys`, which returns what `weigh` of this module does.
      keys: the arguments of `weigh` for all keys, arrays [B, S, ...]. They are padded to whole
        pieces, integer arrays with -1.
      size: the most keys of a piece.

    Returns:
      The result of `weigh` for all keys together.
    """
    length = jax.tree.leaves(keys)[0].shape[1]
    count = -(-length // size)
    size = -(-length // count)  # Pieces of equal size need the least padding.

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
    """Returns the result of `weigh` for no keys, with weighted values of shape `shape`."""
    lowest = jnp.full(shape[:-1], jnp.finfo(jnp.float32).min)
    return lowest, jnp.zeros(shape[:-1], jnp.float32), jnp.zeros(shape, jnp.float32)


def _join(one: Weighed, other: Weighed) -> Weighed:
    top = jnp.maximum(one[0], other[0])
    a, b = jnp.exp(one[0] - top), jnp.exp(other[0] - top)
    return top, a * one[1] + b * other[1], a[..., None] * one[2] + b[..., None] * other[2]


def take(tree: Any, first: jax.Array, count: int) -> Any:
    """Slices `count` entries of each array along its second axis."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, count, axis=1), tree)


def _cut(tree, row, first, count):
    """Slices one row of each array, and `count` entries along its second axis."""

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
