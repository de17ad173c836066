"""Grouped-query attention, and the choice of its implementation.

`attend` picks a kernel (C++, splash, ragged, cuDNN or Triton) that the backend has and that takes
the arrays, or else computes attention with XLA's operations, in blocks of queries and of keys.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mistral_jax.ops import cudnn, flash, kernels, ragged, splash, triton
from mistral_jax.ops.backend import PLAIN, Backend
from mistral_jax.ops.partition import Rules
from mistral_jax.ops.pieces import attend_present, fill, take, weigh, weigh_pieces
from mistral_jax.ops.quantized import MaybeQuantized, QuantizedMatrix
from mistral_jax.ops.rows import swap_heads

# Queries of a block. Larger blocks do not fit in a CPU's caches; smaller ones give it too little
# work at a time.
BLOCK = 128
# Keys that a block of queries attends to at a time. It bounds the memory of long texts without a
# window.
KEYS = 8192
# Up to this many blocks are unrolled, each with its own exact range of keys. More blocks share one
# compiled loop body.
UNROLLED_BLOCKS = 8


class _Pattern(NamedTuple):
    """Which keys are visible. A tuple compares by value, so equal patterns share a program."""

    visible: Callable[..., jax.Array]
    window: int | None
    dilation: int

    def mask(self, q_positions, kv_positions, q_texts=None, kv_texts=None):
        """Returns the mask of a block, [B, T, S] bool."""
        return self.visible(
            q_positions, kv_positions, self.window, self.dilation, q_texts, kv_texts
        )


def attend(
    visible: Callable[..., jax.Array],
    q: jax.Array,
    k: MaybeQuantized,
    v: MaybeQuantized,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    window: int | None,
    dilation: int = 1,
    *,
    aligned: bool = False,
    origin: jax.Array | None = None,
    by_heads: bool = False,
    sections: int = 1,
    rules: Rules = (),
    backend: Backend = PLAIN,
) -> jax.Array:
    """Attends from every query to the keys that it sees.

    The T x S scores never exist as a whole: queries are processed in blocks, and each block meets
    `KEYS` keys at a time. With `aligned` keys, a block reads only the keys that its window reaches.
    With a known `origin`, a CPU also skips keys that are absent, which it decides at run time.

    Args:
      visible: the mask function, called with the arguments of `model.attention.visible`. It must
        show no key beyond the window. The splash kernel does not call it: it builds its mask from
        the window.
      q: queries, [B, T, N, H].
      k: keys, [B, S, K, H], each shared by G = N / K query heads; int8 keys have scales
        [B, S, K, 1].
      v: values, in the same form.
      q_positions: position of each query in its text, [B, T] int32; -1 = padding, whose output is
        finite and has no meaning.
      kv_positions: position of each key in its text, [B, S] int32; -1 = no key. With one query a
        row and keys that are not aligned, the key of position p must be in slot p mod S, as in a
        cache.
      window: number of visible keys (W), the query's own included; None = no limit.
      dilation: distance between visible keys.
      aligned: whether key S - T + i is the key of query i. Without a cache (S = T) a row may then
        hold several texts, one after another, with padding between them. The positions of each
        text rise by 1, and queries see only keys of their own text.
      origin: position of each row's key 0, [B] int32: key i has position origin + i, or is absent.
        None = keys are in any order. Attention with an origin has no gradient.
      by_heads: whether keys and values are by heads, [B, K, S, H], and scales [B, K, S], as a cache
        holds them: a single query at position p then sees no key beyond the first min(p + 1, S).
      sections: number of equal parts of T that are computed side by side, each on the devices that
        hold it.
      rules: mesh axes of the logical axes, by which kernels are partitioned.
      backend: the backend that this is traced for.

    Returns:
      [B, T, N, H] in the dtype of `q`.
    """
    pattern = _Pattern(visible, window, dilation)
    if by_heads:
        streams = "ragged" in backend.kernels and ragged.fits(q, k, v, rules, backend.alone)
        if streams and sections == 1:
            return ragged.attend(pattern.mask, q, k, v, q_positions, kv_positions, rules)
        k, v = swap_heads(k), swap_heads(v)
    kept = k.values.dtype if isinstance(k, QuantizedMatrix) else k.dtype
    if q.shape[1] == 1 and kept.name in kernels.DTYPES and backend.has_native:
        return _attend_once(q, k, v, pattern.mask(q_positions, kv_positions))
    if not aligned and "triton" in backend.kernels and triton.fits(q, k, rules):
        return _attend_filled(pattern, rules, q, k, v, q_positions, kv_positions)
    alone = aligned and dilation == 1 and sections == 1
    if alone and "splash" in backend.kernels:
        wide = _widen(k, q.dtype), _widen(v, q.dtype)
        if splash.fits(q, *wide, rules, backend.alone):
            return splash.attend(q, *wide, q_positions, kv_positions, window, rules)
    length, keys = q.shape[1], k.shape[1]
    q_places, kv_places = (q_positions, None), (kv_positions, None)
    before = keys if window is None else min(keys, (window - 1) * dilation)
    if aligned and length == keys:
        # All tokens of a text have the same (index - position), and tokens of different texts have
        # different ones: it serves as the text's number.
        texts = jnp.arange(length, dtype=jnp.int32)[None] - q_positions
        q_places, kv_places = (q_positions, texts), (kv_positions, texts)
    offset = keys - length if aligned else None
    if sections > 1 and length % sections == 0:
        return _attend_sections(q, k, v, q_places, kv_places, pattern, before, offset, sections)
    # Only on one CPU: a GPU would wait for the host before each piece, and the devices of a mesh
    # would have to agree on the number of pieces.
    if origin is not None and length > 1 and backend.is_one_cpu:

        def weigh_seen(q, k, v, q_positions, kv_positions):
            return weigh(q, k, v, pattern.mask(q_positions, kv_positions))

        return attend_present(weigh_seen, q, k, v, q_positions, kv_positions, before, origin)
    arguments = q_places, kv_places, pattern, before, offset
    # Attention with an origin has no gradient; without one it may be training.
    name = "cudnn" if origin is not None else "cudnn-training"
    if length > 1 and name in backend.kernels:
        wide = _widen(k, q.dtype), _widen(v, q.dtype)
        if cudnn.fits(q, *wide, rules):
            mixed = _attend_by_cudnn(q, *wide, *arguments, rules)
            return checkpoint_name(mixed, splash.SAVED)
    mixed = _attend_blocks(q, k, v, *arguments, _attend_block, BLOCK)
    return checkpoint_name(mixed, splash.SAVED)


def takes_chunks(
    q: jax.Array,
    cache: flash.Keys,
    dilation: int,
    sections: int,
    rules: Rules,
    backend: Backend,
) -> bool:
    """Tells whether the backend has `attend_chunk` for these arguments, which are as for `attend`.

    Args:
      q: queries, [B, T, N, H].
      cache: a layer's cache.
      dilation: distance between visible keys.
      sections: number of parts of T that are computed side by side.
      rules: mesh axes of the logical axes.
      backend: the backend that this is traced for.
    """
    return (cache.by_heads and dilation == 1 and sections == 1) and flash.fits(
        q, cache.k, rules, backend
    )


# The factor of the queries of `attend_chunk`: rotation applies it before it rounds them.
chunk_factor = flash.factor


def attend_chunk(
    q: jax.Array, chunk: flash.Keys, cache: flash.Keys, window: int | None, rules: Rules = ()
) -> jax.Array:
    """Attends from every query of a prompt's chunk to the keys before the chunk, and to its own.

    Args:
      q: queries, [B, T, N, H], multiplied by `chunk_factor(H)`.
      chunk: keys, values and positions of the chunk's tokens, by heads.
      cache: the layer's cache before the chunk, by heads.
      window: number of visible keys (W), the query's own included; None = no limit.
      rules: mesh axes of the logical axes, by which the kernel is partitioned.

    Returns:
      [B, T, N, H] in the dtype of `q`.
    """
    return flash.attend(q, chunk, cache, window, rules, scaled=True)


def _widen(x, dtype):
    return x.dequantize(dtype) if isinstance(x, QuantizedMatrix) else x


@jax.custom_jvp
def _attend_once(q, k, v, mask):
    """Attends from one token of each row, with the C++ kernel."""
    numbers, scales = (k, v), ()
    if isinstance(k, QuantizedMatrix):
        numbers, scales = (k.values, v.values), (k.scale[..., 0], v.scale[..., 0])
    return kernels.attend(q[:, 0], *numbers, mask[:, 0], *scales)[:, None].astype(q.dtype)


@_attend_once.defjvp
def _differentiate_once(primals, tangents):
    """Differentiates the same function in XLA's operations, for the kernel has no gradient."""
    plain = functools.partial(_attend_plainly, primals[3])
    return _attend_once(*primals), jax.jvp(plain, primals[:3], tangents[:3])[1]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attend_filled(pattern, rules, q, k, v, q_positions, kv_positions):
    """Attends from one token of each row to the filled slots of a cache, with the Triton kernel."""
    return triton.attend(pattern.mask, q, k, v, q_positions, kv_positions, rules)


@_attend_filled.defjvp
def _differentiate_filled(pattern, rules, primals, tangents):
    """Differentiates the same function in XLA's operations, for the kernel has no gradient."""
    plain = functools.partial(_attend_plainly, pattern.mask(*primals[3:]))
    found = _attend_filled(pattern, rules, *primals)
    return found, jax.jvp(plain, primals[:3], tangents[:3])[1]


def _attend_plainly(mask, q, k, v):
    """Attends from one token of each row in XLA's operations."""
    _, total, mixed = weigh(q, k, v, mask)
    return (mixed / total[..., None]).reshape(q.shape).astype(q.dtype)


@functools.partial(jax.checkpoint, static_argnums=(5, 6, 7, 8))
def _attend_by_cudnn(q, k, v, q_places, kv_places, pattern, before, offset, rules):
    """Attends block by block with cuDNN. The backward pass makes masks and outputs again."""

    def one(q, k, v, q_places, kv_places, pattern):
        (q_positions, q_texts), (kv_positions, kv_texts) = q_places, kv_places
        mask = pattern.mask(q_positions, kv_positions, q_texts, kv_texts)
        return cudnn.attend(q, k, v, mask, rules)

    return _attend_blocks(q, k, v, q_places, kv_places, pattern, before, offset, one, cudnn.BLOCK)


def _attend_blocks(q, k, v, q_places, kv_places, pattern, before, offset, one, size):
    """Attends block by block.

    Query i sees at most the `before` keys in front of key `offset` + i. Without an offset keys are
    in any order, and each block reads all of them. `one` computes a block of at most `size`
    queries.
    """
    length, keys = q.shape[1], k.shape[1]
    if length <= size and (offset is None or offset <= before):
        return one(q, k, v, q_places, kv_places, pattern)

    if length <= size * UNROLLED_BLOCKS:
        blocks = []
        for start in range(0, length, size):
            stop = min(start + size, length)
            seen = slice(0, keys)
            if offset is not None:
                # The range begins at a multiple of 8: kernels copy keys that are not so aligned.
                first = max(0, offset + start - before) // 8 * 8
                seen = slice(first, offset + stop)
            queries = jax.tree.map(lambda x, a=start, b=stop: x[:, a:b], (q, q_places))
            near = jax.tree.map(lambda x, seen=seen: x[:, seen], (k, v, kv_places))
            blocks.append(one(queries[0], *near[:2], queries[1], near[2], pattern))
        return jnp.concatenate(blocks, axis=1)

    def attend_from(start):
        first = jnp.clip((offset or 0) + start - before, 0, keys - reach)
        queries, places = take((padded_q, padded_places), start, size)
        near_k, near_v, near_places = take((k, v, kv_places), first, reach)
        return one(queries, near_k, near_v, places, near_places, pattern)

    reach = keys if offset is None else min(keys, before + size)
    padded_q = fill(q, size, 0)
    padded_places = jax.tree.map(lambda x: fill(x, size, -1), q_places)
    blocks = jax.lax.map(attend_from, jnp.arange(0, length, size, dtype=jnp.int32))
    return jnp.moveaxis(blocks, 0, 1).reshape(padded_q.shape)[:, :length]


def _attend_sections(q, k, v, q_places, kv_places, pattern, before, offset, sections):
    """Attends from each section to the keys that it can reach, the same number for each section.

    `jax.vmap` runs the sections side by side, so that XLA can partition them over devices.
    """
    length, keys = q.shape[1], k.shape[1]
    size = length // sections
    reach = keys if offset is None else min(keys, before + size)

    def attend_from(start, q, q_places):
        near = k, v, kv_places
        if reach < keys:
            near = take(near, jnp.clip(offset + start - before, 0, keys - reach), reach)
        return _attend_blocks(
            q, *near[:2], q_places, near[2], pattern, reach, None, _attend_block, BLOCK
        )

    def split(x):
        return x.reshape(x.shape[0], sections, size, *x.shape[2:])

    starts = jnp.arange(0, length, size, dtype=jnp.int32)
    mixed = jax.vmap(attend_from, in_axes=(0, 1, 1), out_axes=1)(
        starts, *jax.tree.map(split, (q, q_places))
    )
    return mixed.reshape(q.shape)


@functools.partial(jax.checkpoint, static_argnums=5)  # The backward pass computes scores again.
def _attend_block(q, k, v, q_places, kv_places, pattern):
    """Attends from one block of queries to all keys, at most `KEYS` of them at a time."""

    def weigh_seen(k, v, kv_places):
        (q_positions, q_texts), (kv_positions, kv_texts) = q_places, kv_places
        return weigh(q, k, v, pattern.mask(q_positions, kv_positions, q_texts, kv_texts))

    keys = k, v, kv_places
    alone = q.shape[1] == 1 or k.shape[1] <= KEYS
    _, total, mixed = weigh_seen(*keys) if alone else weigh_pieces(weigh_seen, keys, KEYS)
    return jnp.moveaxis(mixed / total[..., None], 3, 1).astype(q.dtype).reshape(q.shape)
