"""The rolling-buffer key-value cache (Mistral 7B, arXiv 2310.06825, section 2).

The token at position p of a row is stored in cache slot p mod S, over the token that is S positions
older. A layer with a window of W tokens needs only W slots (a dilated window: as many as it spans),
so the memory of a windowed model does not grow with the length of its text. The cache is a pytree
of arrays; `write` and `line_up` are pure functions of it.

Keys and values are [B, S, K, H], or by heads, [B, K, S, H], as the kernels of accelerators read
them. A cache knows its order, and every function takes both.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from mistral_jax.config import ModelConfig
from mistral_jax.ops import ring
from mistral_jax.ops.backend import PLAIN, Backend
from mistral_jax.ops.partition import Rules
from mistral_jax.ops.quantized import MaybeQuantized, QuantizedMatrix, to_int8
from mistral_jax.ops.rows import pick, put, swap_heads


@flax.struct.dataclass
class LayerCache:
    """The cached keys and values of one layer.

    Attributes:
      k: rotated keys, [B, S, K, H]; an int8 cache has a float32 scale for each token and head too,
        [B, S, K, 1].
      v: values, in the same form.
      positions: position in its text of the token in each slot, [B, S] int32; -1 = empty slot.
      by_heads: whether keys and values are [B, K, S, H] instead, and scales [B, K, S].
    """

    k: MaybeQuantized
    v: MaybeQuantized
    positions: jax.Array
    by_heads: bool = flax.struct.field(pytree_node=False, default=False)

    def ordered(self, k: MaybeQuantized, v: MaybeQuantized, positions: jax.Array) -> "LayerCache":
        """Returns keys and values [B, T, K, H] and their positions in the order of this cache."""
        if self.by_heads:
            k, v = swap_heads(k), swap_heads(v)
        return LayerCache(k, v, positions, self.by_heads)

    def map(self, function: Callable[..., jax.Array], *others: "LayerCache") -> "LayerCache":
        """Calls `function(axis, x, *rest)` for each array of this and other caches of a layer.

        Args:
          function: gets the axis of cache slots, which is 2 in arrays by heads and otherwise 1, and
            the arrays; returns an array in the same order of axes.
          others: caches in the same order of axes.
        """
        return jax.tree.map(
            lambda x, *rest: function(2 if self.by_heads and x.ndim > 2 else 1, x, *rest),
            self,
            *others,
        )

    def logical_axes(self) -> "LayerCache":
        """Returns the logical axes of each array, as tuples of names."""
        heads = ("kv_heads", None) if self.by_heads else (None, "kv_heads")

        def axes(x):
            if x.ndim == 2:
                return ("batch", None)
            return ("batch", *heads, *["head_dim" if size > 1 else None for size in x.shape[3:]])

        return jax.tree.map(axes, self)


Cache = tuple[LayerCache, ...]


def init_cache(
    config: ModelConfig,
    batch_size: int,
    length: int,
    dtype: jnp.dtype = jnp.float32,
    by_heads: bool = False,
) -> Cache:
    """Makes an empty cache.

    Args:
      config: the model's architecture.
      batch_size: number of rows (B); each row advances on its own.
      length: number of tokens of the longest row, prompt and continuation together. Past it, a
        layer without a window forgets a row's first tokens.
      dtype: dtype of keys and values: the model's compute dtype, or int8 to quantise them.
      by_heads: whether keys and values are [B, K, S, H], which suits accelerators.

    Returns:
      One `LayerCache` for each layer, with S = min(W, length) slots. With a dilated window,
      S = min((W - 1) * dilation + 1, length).
    """

    def empty(span):
        slots = length if span is None else min(span, length)
        heads = config.num_kv_heads
        places = (heads, slots) if by_heads else (slots, heads)
        shape = (batch_size, *places, config.head_dim)

        def nothing():
            values = jnp.zeros(shape, dtype)
            if dtype == jnp.int8:
                scale = shape[:-1] if by_heads else (*shape[:-1], 1)
                return QuantizedMatrix(values, jnp.zeros(scale, jnp.float32))
            return values

        # Called once for k and once for v: JAX cannot donate a buffer that they share.
        positions = jnp.full((batch_size, slots), -1, jnp.int32)
        return LayerCache(nothing(), nothing(), positions, by_heads)

    return tuple(empty(span) for span in config.spans)


def round_for(cache: LayerCache, x: jax.Array) -> MaybeQuantized:
    """Quantises keys or values [B, T, K, H] to int8 if the cache does.

    The layer calls it before attention, so that a token sees the same rounded keys whether they
    are in its own chunk or in the cache. The result then does not depend on the chunk size.
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
    rules: Rules = (),
) -> LayerCache:
    """Stores the last S tokens of a chunk in each row, over the oldest tokens.

    Args:
      cache: the layer's cache, with S slots.
      k: rotated keys of the chunk, [B, T, K, H], as `round_for` returns them.
      v: values of the chunk, in the same form.
      positions: positions of the chunk's tokens, [B, T] int32, rising by 1 along a row; -1 =
        padding, which is not stored.
      backend: the backend that this is traced for.
      rules: mesh axes of the logical axes, by which kernels are partitioned.

    Returns:
      The new cache. It is the same however the text is cut into chunks.
    """
    chunk = jax.tree.map(
        lambda old, new: new.astype(old.dtype), cache, cache.ordered(k, v, positions)
    )
    if cache.by_heads and positions.shape[1] > 1:
        tables, tree = jax.tree.flatten((cache.k, cache.v))
        if ring.fits(tables, rules, backend):
            rows = jax.tree.leaves((chunk.k, chunk.v))
            k, v = jax.tree.unflatten(tree, ring.write(tables, rows, positions, rules))
            return cache.replace(k=k, v=v, positions=ring.held(positions, cache.positions))
    slots = cache.positions.shape[1]
    # A chunk longer than S has several tokens for one slot. Only the last one may be written, for
    # the order of writes in a scatter is undefined.
    last = jnp.max(positions, axis=1, keepdims=True)
    stored = (positions >= 0) & (positions > last - slots)
    # Slot S does not exist, so the scatter drops the tokens that are sent there.
    slot = jnp.where(stored, positions % slots, slots)

    def store(axis, old, new):
        return put(old, new, slot, axis, backend, rules)

    return cache.map(store, chunk)


def line_up(
    cache: LayerCache,
    k: MaybeQuantized,
    v: MaybeQuantized,
    positions: jax.Array,
    backend: Backend = PLAIN,
) -> tuple[LayerCache, jax.Array]:
    """Joins the cached tokens and a chunk, in the order of their positions.

    The chunk's queries attend to the result. It still has the keys that `write` will overwrite, and
    its order lets each block of queries read only the keys that its window reaches.

    Args:
      cache: the layer's cache before the chunk, with S slots.
      k: rotated keys of the chunk, [B, T, K, H], as for `write`.
      v: values of the chunk, in the same form.
      positions: positions of the chunk's tokens, as for `write`.
      backend: the backend that this is traced for.

    Returns:
      S + T entries in the cache's order of axes, of which entry S + i is token i of the chunk; and
      the position of entry 0 of each row, [B] int32. Entry i has position origin + i, or is empty.
    """
    slots = cache.positions.shape[1]
    entries = jnp.arange(slots + k.shape[1], dtype=jnp.int32)[None]
    # A row's tokens begin after its padding. All entries before them come from the cache.
    column = jax.lax.argmax(positions >= 0, 1, jnp.int32)[:, None]
    origin = jnp.take_along_axis(positions, column, axis=1) - column - slots
    old, place = entries < slots + column, origin + entries
    index = jnp.where(old, place % slots, entries)

    def choose(axis, held, new):
        return pick(held, new.astype(held.dtype), index, axis, backend)

    found = cache.map(choose, cache.ordered(k, v, positions))
    places = jnp.where(old & (found.positions != place), -1, found.positions)
    return found.replace(positions=places), origin[:, 0]
