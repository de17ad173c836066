"""The attention layer, and the mask that decides which keys each query sees.

The layer projects, rotates, updates the cache and calls `attend`. `ops/attention.py` computes the
attention itself, and gets the mask function from here: to change what a token sees, change
`visible`.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mistral_jax.config import ModelConfig
from mistral_jax.model.cache import LayerCache, line_up, round_for, write
from mistral_jax.model.layers import Projection, project
from mistral_jax.model.rope import rotate, scale_queries
from mistral_jax.ops import attention
from mistral_jax.ops.backend import PLAIN, Backend
from mistral_jax.ops.partition import Rules, length_parts
from mistral_jax.ops.rotation import lay_out
from mistral_jax.ops.rows import stored_gradient


@functools.partial(jax.jit, static_argnames=("window", "dilation"))
def visible(
    q_positions: jax.Array,
    kv_positions: jax.Array,
    window: int | None,
    dilation: int = 1,
    q_texts: jax.Array | None = None,
    kv_texts: jax.Array | None = None,
) -> jax.Array:
    """Returns the attention mask: each query sees the last `window` keys up to its own position.

    The window counts the query's own key, as Mistral's reference implementation does (arXiv
    2310.06825, section 2). A dilated window skips keys, and so reaches further back with the same
    number of keys (Longformer, arXiv 2004.05150, section 3.1). Every mask is made by this function,
    except in kernels that take only the window's size (see `ops/attention.py`).

    Args:
      q_positions: position of each query in its text, [B, T] int32; -1 = padding, which sees no
        key.
      kv_positions: position of each key in its text, [B, S] int32; -1 = no key, seen by no query.
      window: number of visible keys (W), the query's own included; None = no limit.
      dilation: distance between visible keys: 1 = every key, 2 = every second key.
      q_texts: number of the text that each query belongs to, [B, T] int32, for rows that hold
        several texts; None = each row holds one text.
      kv_texts: number of the text that each key belongs to, [B, S] int32.

    Returns:
      [B, T, S] bool; True where the query sees the key.
    """
    distance = q_positions[:, :, None] - kv_positions[:, None, :]
    mask = (kv_positions[:, None, :] >= 0) & (distance >= 0)
    if window is not None:
        mask &= distance < window * dilation
    if dilation > 1:
        # In a kernel, `%` could be lowered only on a machine that has the accelerator.
        mask &= jax.lax.rem(distance, jnp.int32(dilation)) == 0
    return mask if q_texts is None else mask & (q_texts[:, :, None] == kv_texts[:, None, :])


# Attention with the mask of this module.
attend = functools.partial(attention.attend, visible)


class Attention(nn.Module):
    """Multi-head attention with grouped key-value heads (GQA, arXiv 2305.13245).

    Attributes:
      config: the architecture.
      window: number of keys that each query sees (W), its own included; None = no limit.
      dtype: dtype of the activations.
      rules: mesh axes of each logical axis.
      backend: the backend that the layer is traced for.
      dropout: dropout rate of the adapters' inputs.
      dilation: distance between visible keys.
    """

    config: ModelConfig
    window: int | None
    dtype: jnp.dtype
    rules: Rules
    backend: Backend
    dropout: float = 0.0
    dilation: int = 1

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        cache: LayerCache | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Applies attention to a chunk of tokens, and adds the chunk to the cache.

        Args:
          x: normalised activations, [B, T, D].
          positions: position of each token in its text, [B, T] int32; -1 = padding.
          angles: cosines and sines from `rotary_angles`.
          cache: this layer's cache of earlier tokens; None = there are no earlier tokens.

        Returns:
          The output, [B, T, D], and the updated cache.
        """
        projection = functools.partial(
            Projection, self.config, self.dtype, self.backend, dropout=self.dropout
        )

        def place(y, axis):  # Tells XLA how to partition `y` over the devices of a mesh.
            axes = ("batch", "length", axis, "head_dim")
            return nn.with_logical_constraint(y, axes, rules=self.rules)

        q, k, v = project(x, [projection(name=name) for name in ("q_proj", "k_proj", "v_proj")])
        q, k, v = place(q, "heads"), place(k, "kv_heads"), place(v, "kv_heads")
        # A step of decoding has few numbers to rotate.
        rotation = PLAIN if x.shape[1] == 1 else self.backend
        sections = length_parts(self.rules)
        # Whether a kernel reads a prompt's chunk beside the old cache.
        by_chunk = cache is not None and x.shape[1] > 1
        by_chunk = by_chunk and attention.takes_chunks(
            q, cache, self.dilation, sections, self.rules, self.backend
        )
        factor = attention.chunk_factor(self.config.head_dim) if by_chunk else 1.0
        q = rotate(q, angles, rotation, self.rules, factor=factor)
        k = rotate(k, angles, rotation, self.rules, "kv_heads")
        v = lay_out(v, rotation, self.rules)
        q = scale_queries(q, positions, self.config.query_scaling)
        q, k, v = checkpoint_name((q, k, v), "heads")
        if sections > 1:
            # The sequence is partitioned over devices. Queries stay where they are; keys and
            # values, which have fewer heads, are gathered.
            axes = ("batch", None, "kv_heads", "head_dim")
            k, v = (nn.with_logical_constraint(x, axes, rules=self.rules) for x in (k, v))
        look = functools.partial(
            attend,
            window=self.window,
            dilation=self.dilation,
            sections=sections,
            rules=self.rules,
            backend=self.backend,
        )
        store = functools.partial(write, backend=self.backend, rules=self.rules)

        def look_in(held, **order):
            keys = held.k, held.v, positions, held.positions
            return look(q, *keys, by_heads=held.by_heads, **order)

        if cache is not None:
            k, v = round_for(cache, k), round_for(cache, v)
        if cache is None:  # Training, or scoring a whole text.
            mixed = look(q, k, v, positions, positions, aligned=True)
        elif x.shape[1] == 1:
            # Decoding. Any key that the token overwrites has just left its window. So the cache is
            # written first, and then holds every key that the token sees.
            cache = store(cache, k, v, positions)
            mixed = look_in(cache)
        elif by_chunk:
            chunk = cache.ordered(k, v, positions)
            mixed = attention.attend_chunk(q, chunk, cache, self.window, self.rules)
            mixed, cache = jax.lax.optimization_barrier((mixed, cache))
            cache = store(cache, k, v, positions)
        elif self.window and (self.window - 1) * self.dilation < cache.positions.shape[1]:
            # A chunk of a prompt, in a cache with a slot for each token of the window: the chunk's
            # last tokens overwrite keys that its first tokens still see. So attention reads the old
            # cache and the chunk side by side, and the cache is written afterwards.
            seen, origin = line_up(cache, k, v, positions, self.backend)
            # The barrier orders the two: otherwise XLA copies the cache, to have the old and the
            # new one at the same time.
            seen, cache = jax.lax.optimization_barrier((seen, cache))
            mixed = look_in(seen, aligned=True, origin=origin)
            cache = store(cache, k, v, positions)
        else:
            # A chunk of a prompt, with a slot for every token of the text: nothing is overwritten.
            cache = store(cache, k, v, positions)
            mixed = look_in(cache, origin=jnp.zeros(len(x), jnp.int32))

        return projection(name="o_proj")(stored_gradient(mixed, self.backend)), cache
