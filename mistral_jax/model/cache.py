"""The rolling-buffer key-value cache: a pytree, `write` and `line_up`. It computes no attention.

Token p of a row lies in slot p mod S. A layer with a window of W needs no more than W slots (a
dilated one: what it spans), so the memory of a windowed model does not grow with its text (Mistral
7B, arXiv 2310.06825, section 2).
"""

import flax.struct
import jax
import jax.numpy as jnp

from mistral_jax.config import ModelConfig
from mistral_jax.ops.backend import PLAIN, Backend
from mistral_jax.ops.quantized import MaybeQuantized, QuantizedMatrix, to_int8
from mistral_jax.ops.rows import pick, put


@flax.struct.dataclass
class LayerCache:
    """The keys and values that one layer remembers.

    Attributes:
      k: rotated keys, [B, S, K, H]; in 8 bits with a scale for each token and head, [B, S, K, 1].
      v: values, likewise.
      positions: place in its text of the token in each slot, [B, S] int32; -1 = empty.
    """

    k: MaybeQuantized
    v: MaybeQuantized
    positions: jax.Array


Cache = tuple[LayerCache, ...]


def init_cache(
    config: ModelConfig, batch_size: int, length: int, dtype: jnp.dtype = jnp.float32
) -> Cache:
    """Makes an empty cache.

    Args:
      config: the model's architecture.
      batch_size: rows (B); each advances on its own.
      length: tokens of the longest row, prompt and continuation. A layer without a window would
        forget a row's first tokens past this length.
      dtype: of keys and values: the model's compute dtype, or int8, to which they are rounded.

    Returns:
      One `LayerCache` a layer, with S = min(W, length) slots, or for a dilated window
      S = min((W - 1) * dilation + 1, length).
    """

    def empty(span):
        slots = length if span is None else min(span, length)
        shape = (batch_size, slots, config.num_kv_heads, config.head_dim)

        def nothing():
            values = jnp.zeros(shape, dtype)
            if dtype == jnp.int8:
                return QuantizedMatrix(values, jnp.zeros((*shape[:-1], 1), jnp.float32))
            return values

        # Two calls: a buffer that k and v shared could not be donated.
        return LayerCache(nothing(), nothing(), jnp.full((batch_size, slots), -1, jnp.int32))

    return tuple(empty(span) for span in config.spans)


def round_for(cache: LayerCache, x: jax.Array) -> MaybeQuantized:
    """Rounds keys or values [B, T, K, H] to 8 bits, if the cache keeps them so.

    It is done before any are looked at, so that a token sees others the same, be they in its chunk
    or in an earlier one.
    """
    if isinstance(cache.k, QuantizedMatrix):
        return QuantizedMatrix(*to_int8(x.astype(jnp.float32), 3, jnp))
    return x


def write(
    cache: LayerCache,
    k: MaybeQuantized,
    v: MaybeQuantized,
    positions: jax.Array,
    backend: Backend = PLAIN,
) -> LayerCache:
    """Stores a chunk's last S tokens of each row, over the oldest ones.

    Args:
      cache: the layer's cache; S slots.
      k: rotated keys of the chunk, [B, T, K, H], as `round_for` returns them.
      v: values of the chunk, likewise.
      positions: places of the chunk's tokens, [B, T] int32, rising by 1 along a row; -1 = padding,
        which is not stored.
      backend: what this is traced for.

    Returns:
      The new cache; the same for every way to cut a text into chunks.
    """
    slots = cache.positions.shape[1]
    # Of two tokens for one slot only the later is written: a scatter's order is undefined.
    last = jnp.max(positions, axis=1, keepdims=True)
    stored = (positions >= 0) & (positions > last - slots)
    # Slot S does not exist: what is not stored is dropped there.
    slot = jnp.where(stored, positions % slots, slots)

    return jax.tree.map(
        lambda old, new: put(old, new.astype(old.dtype), slot, backend),
        cache,
        LayerCache(k, v, positions),
    )


def line_up(
    cache: LayerCache, k: MaybeQuantized, v: MaybeQuantized, positions: jax.Array
) -> tuple[LayerCache, jax.Array]:
    """Puts what a ring holds and a chunk brings in the order of their places in the text.

    Args:
      cache: the layer's cache before the chunk; S slots.
      k: rotated keys of the chunk, [B, T, K, H], as for `write`.
      v: values of the chunk, likewise.
      positions: places of the chunk's tokens, likewise.

    Returns:
      S + T entries, of which S + i is the chunk's token i; and the place of each row's first, [B]
      int32: entry i has place origin + i, or is empty.
    """
    slots = cache.positions.shape[1]
    entries = jnp.arange(slots + k.shape[1], dtype=jnp.int32)[None]
    # The chunk's own begin after its padding; before them, all are the ring's.
    column = jax.lax.argmax(positions >= 0, 1, jnp.int32)[:, None]
    origin = jnp.take_along_axis(positions, column, axis=1) - column - slots
    old, place = entries < slots + column, origin + entries
    index = jnp.where(old, place % slots, entries)

    found = jax.tree.map(
        lambda held, new: pick(held, new.astype(held.dtype), index),
        cache,
        LayerCache(k, v, positions),
    )
    places = jnp.where(old & (found.positions != place), -1, found.positions)
    return found.replace(positions=places), origin[:, 0]
