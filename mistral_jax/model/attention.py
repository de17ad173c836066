"""Attention: the one mask function, grouped-query attention, and the one place that picks a kernel.

It holds no parameters, applies no rotation, and does not know where keys are kept.
"""

import functools

import jax
import jax.numpy as jnp

# Queries attended at a time: larger blocks spill a CPU's caches, smaller ones starve it.
BLOCK = 128
# Up to here every block has its own exact range of keys; beyond, one compiled body serves all.
UNROLLED_BLOCKS = 8


@functools.partial(jax.jit, static_argnames="window")
def visible(q_positions: jax.Array, kv_positions: jax.Array, window: int | None) -> jax.Array:
    """Says which keys each query may look at: those not after it, and among them the last `window`.

    The window counts the query's own key, as in Mistral's own engine (arXiv 2310.06825, section 2).

    Args:
      q_positions: place of each query in its text, [B, T] int32; -1 = padding, which sees nothing.
      kv_positions: place of each key, [B, S] int32; -1 = no key there, which nobody sees.
      window: keys visible, the query's own included (W); None = all.

    Returns:
      [B, T, S] bool, True = may look.
    """
    distance = q_positions[:, :, None] - kv_positions[:, None, :]
    mask = (kv_positions[:, None, :] >= 0) & (distance >= 0)
    return mask if window is None else mask & (distance < window)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    window: int | None,
    *,
    aligned: bool = False,
    sections: int = 1,
) -> jax.Array:
    """Attends from every query to the keys that it may see.

    Never builds T x S scores: queries go in blocks of `BLOCK`. Where keys stand in the order of the
    queries (`aligned`), a block reads only the keys that its window can reach.

    Args:
      q: queries, [B, T, N, H].
      k: keys, [B, S, K, H]; each serves G = N / K query heads.
      v: values, [B, S, K, H].
      q_positions: place of each query, [B, T] int32; -1 = padding, whose output is finite.
      kv_positions: place of each key, [B, S] int32; -1 = no key there.
      window: keys visible (W), the query's own included; None = all.
      aligned: key i is the key of query i, positions rise by 1 along a row, and padding stands only
        before or after a row's tokens: nobody sees a key W or more places before its own, or after.
      sections: equal parts of T that are worked on side by side, each on the devices that hold it.

    Returns:
      [B, T, N, H] in the dtype of `q`.
    """
    length, keys = q.shape[1], k.shape[1]
    if sections > 1 and length % sections == 0:
        arguments = q, k, v, q_positions, kv_positions, window
        return _attend_sections(*arguments, aligned, sections)
    if length <= BLOCK:
        return _attend_block(q, k, v, q_positions, kv_positions, window)
    # How many keys before its own a block's first query may see.
    before = window - 1 if aligned and window is not None else keys

    if length <= BLOCK * UNROLLED_BLOCKS:
        blocks = []
        for start in range(0, length, BLOCK):
            stop = min(start + BLOCK, length)
            seen = slice(max(0, start - before), stop if aligned else keys)
            block = q[:, start:stop], k[:, seen], v[:, seen]
            places = q_positions[:, start:stop], kv_positions[:, seen]
            blocks.append(_attend_block(*block, *places, window))
        return jnp.concatenate(blocks, axis=1)

    def attend_from(start):
        def take(x, first, count):
            return jax.lax.dynamic_slice_in_dim(x, first, count, axis=1)

        first = jnp.clip(start - before, 0, keys - reach)
        block = take(padded_q, start, BLOCK), take(k, first, reach), take(v, first, reach)
        places = take(padded_positions, start, BLOCK), take(kv_positions, first, reach)
        return _attend_block(*block, *places, window)

    reach = min(keys, before + BLOCK)
    extra = -length % BLOCK
    padded_q = jnp.pad(q, ((0, 0), (0, extra), (0, 0), (0, 0)))
    padded_positions = jnp.pad(q_positions, ((0, 0), (0, extra)), constant_values=-1)
    blocks = jax.lax.map(attend_from, jnp.arange(0, length, BLOCK))
    return jnp.moveaxis(blocks, 0, 1).reshape(padded_q.shape)[:, :length]


def _attend_sections(q, k, v, q_positions, kv_positions, window, aligned, sections):
    """Attends from each section to the keys that it can reach: as many for one as for another."""
    batch, length = q_positions.shape
    keys, size = k.shape[1], length // sections
    before = window - 1 if aligned and window is not None else keys
    reach = min(keys, before + size)

    def attend_from(start, q, q_positions):
        first = jnp.clip(start - before, 0, keys - reach)
        near = (jax.lax.dynamic_slice_in_dim(x, first, reach, axis=1) for x in (k, v, kv_positions))
        near_k, near_v, near_positions = near if reach < keys else (k, v, kv_positions)
        return attend(q, near_k, near_v, q_positions, near_positions, window)

    parts = (x.reshape(batch, sections, size, *x.shape[2:]) for x in (q, q_positions))
    starts = jnp.arange(0, length, size)
    mixed = jax.vmap(attend_from, in_axes=(0, 1, 1), out_axes=1)(starts, *parts)
    return mixed.reshape(q.shape)


@functools.partial(jax.checkpoint, static_argnums=5)  # A gradient computes the scores again.
def _attend_block(q, k, v, q_positions, kv_positions, window):
    """Attends with all scores [B, K, G, T, S] at once, in float32."""
    batch, length, heads, head_dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], -1, head_dim)
    scores = einsum("BTKGH,BSKH->BKGTS", grouped, k)
    mask = visible(q_positions, kv_positions, window)[:, None, None]
    # A large negative instead of -inf: a query that sees nothing gets equal weights, not NaN.
    scores = jnp.where(mask, scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    # Dividing after the product touches T x H numbers instead of T x S.
    total = jnp.moveaxis(jnp.sum(weights, axis=-1), 3, 1)[..., None]
    mixed = einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v)
    return (mixed / total).astype(q.dtype).reshape(batch, length, heads, head_dim)


def einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiplies with float32 sums; float32 operands are not rounded, as GPU and TPU would."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)
