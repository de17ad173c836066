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


@functools.partial(jax.jit, static_argnames=("window", "dilation"))
def visible(
    q_positions: jax.Array,
    kv_positions: jax.Array,
    window: int | None,
    dilation: int = 1,
    q_texts: jax.Array | None = None,
    kv_texts: jax.Array | None = None,
) -> jax.Array:
    """Says which keys each query may look at: those not after it, and among them the last `window`.

    The window counts the query's own key, as in Mistral's own engine (arXiv 2310.06825, section 2).
    Dilated, it reaches further back over gaps (Longformer, arXiv 2004.05150, section 3.1).

    Args:
      q_positions: place of each query in its text, [B, T] int32; -1 = padding, which sees nothing.
      kv_positions: place of each key, [B, S] int32; -1 = no key there, which nobody sees.
      window: keys visible, the query's own included (W); None = all.
      dilation: distance between neighbouring keys that are visible: at 2, every other one.
      q_texts: which of a row's texts each query is of, [B, T] int32; None = rows hold one text.
      kv_texts: the same of each key, [B, S] int32.

    Returns:
      [B, T, S] bool, True = may look.
    """
    distance = q_positions[:, :, None] - kv_positions[:, None, :]
    mask = (kv_positions[:, None, :] >= 0) & (distance >= 0)
    if window is not None:
        mask &= distance < window * dilation
    if dilation > 1:
        mask &= distance % dilation == 0
    return mask if q_texts is None else mask & (q_texts[:, :, None] == kv_texts[:, None, :])


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    window: int | None,
    dilation: int = 1,
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
      dilation: distance between neighbouring keys that are visible.
      aligned: key i is the key of query i. A row may then hold several texts, one after another,
        with padding between them; the positions of each rise by 1, and none sees another.
      sections: equal parts of T that are worked on side by side, each on the devices that hold it.

    Returns:
      [B, T, N, H] in the dtype of `q`.
    """
    q_places, kv_places = (q_positions, None), (kv_positions, None)
    before = k.shape[1]
    if aligned:
        # A text is known by where its position 0 stands, or would stand.
        texts = jnp.arange(q.shape[1])[None] - q_positions
        q_places, kv_places = (q_positions, texts), (kv_positions, texts)
        before = before if window is None else (window - 1) * dilation
    pattern = window, dilation
    if sections > 1 and q.shape[1] % sections == 0:
        return _attend_sections(q, k, v, q_places, kv_places, pattern, before, sections)
    return _attend_blocks(q, k, v, q_places, kv_places, pattern, before, aligned)


def _attend_blocks(q, k, v, q_places, kv_places, pattern, before, aligned=False):
    """Attends block by block; a block's first query sees at most `before` keys before its own."""
    length, keys = q.shape[1], k.shape[1]
    if length <= BLOCK:
        return _attend_block(q, k, v, q_places, kv_places, pattern)

    if length <= BLOCK * UNROLLED_BLOCKS:
        blocks = []
        for start in range(0, length, BLOCK):
            stop = min(start + BLOCK, length)
            seen = slice(max(0, start - before), stop if aligned else keys)
            queries = jax.tree.map(lambda x, a=start, b=stop: x[:, a:b], (q, q_places))
            near = jax.tree.map(lambda x, seen=seen: x[:, seen], (k, v, kv_places))
            blocks.append(_attend_block(queries[0], *near[:2], queries[1], near[2], pattern))
        return jnp.concatenate(blocks, axis=1)

    def attend_from(start):
        first = jnp.clip(start - before, 0, keys - reach)
        queries, places = _take((padded_q, padded_places), start, BLOCK)
        near_k, near_v, near_places = _take((k, v, kv_places), first, reach)
        return _attend_block(queries, near_k, near_v, places, near_places, pattern)

    def pad(x, value):
        return jnp.pad(
            x,
            [(0, 0), (0, -length % BLOCK)] + [(0, 0)] * (x.ndim - 2),
            "constant",
            constant_values=value,
        )

    reach = min(keys, before + BLOCK)
    padded_q, padded_places = pad(q, 0), jax.tree.map(lambda x: pad(x, -1), q_places)
    blocks = jax.lax.map(attend_from, jnp.arange(0, length, BLOCK))
    return jnp.moveaxis(blocks, 0, 1).reshape(padded_q.shape)[:, :length]


def _attend_sections(q, k, v, q_places, kv_places, pattern, before, sections):
    """Attends from each section to the keys that it can reach: as many for one as for another."""
    length, keys = q.shape[1], k.shape[1]
    size = length // sections
    reach = min(keys, before + size)

    def attend_from(start, q, q_places):
        near = k, v, kv_places
        if reach < keys:
            near = _take(near, jnp.clip(start - before, 0, keys - reach), reach)
        return _attend_blocks(q, *near[:2], q_places, near[2], pattern, reach)

    def split(x):
        return x.reshape(x.shape[0], sections, size, *x.shape[2:])

    starts = jnp.arange(0, length, size)
    mixed = jax.vmap(attend_from, in_axes=(0, 1, 1), out_axes=1)(
        starts, *jax.tree.map(split, (q, q_places))
    )
    return mixed.reshape(q.shape)


def _take(tree, first, count):
    """Slices arrays along their second axis."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, count, axis=1), tree)


@functools.partial(jax.checkpoint, static_argnums=5)  # A gradient computes the scores again.
def _attend_block(q, k, v, q_places, kv_places, pattern):
    """Attends with all scores [B, K, G, T, S] at once, in float32."""
    batch, length, heads, head_dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], -1, head_dim)
    scores = einsum("BTKGH,BSKH->BKGTS", grouped, k)
    (q_positions, q_texts), (kv_positions, kv_texts) = q_places, kv_places
    mask = visible(q_positions, kv_positions, *pattern, q_texts, kv_texts)[:, None, None]
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
