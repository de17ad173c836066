"""The mask of attention, and the layer: projections, rotation, the cache, and `attend`.

How attention is computed is in `ops/attention.py`, to which this passes the mask.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from mistral_jax.config import ModelConfig
from mistral_jax.model.cache import LayerCache, line_up, round_for, write
from mistral_jax.model.layers import Projection, project
from mistral_jax.model.rope import rotate
from mistral_jax.ops import attention
from mistral_jax.ops.backend import Backend
from mistral_jax.ops.partition import Rules, length_parts


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
    Dilated, it reaches further back over gaps (Longformer, arXiv 2004.05150, section 3.1). Every
    mask is made here, except by kernels that take the window alone (see `ops/attention.py`).

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


# `ops.attention.attend` with this mask.
attend = functools.partial(attention.attend, visible)


class Attention(nn.Module):
    """The attention layer: projections, rotation, the cache, and `attend`."""

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
        """Maps `x` [B, T, D] to [B, T, D], and the cache to the one that has seen `x` too."""
        projection = functools.partial(
            Projection, self.config, self.dtype, self.backend, dropout=self.dropout
        )

        def place(y, axis):
            axes = ("batch", "length", axis, "head_dim")
            return nn.with_logical_constraint(y, axes, rules=self.rules)

        q, k, v = project(x, [projection(name=name) for name in ("q_proj", "k_proj", "v_proj")])
        q, k, v = place(q, "heads"), place(k, "kv_heads"), place(v, "kv_heads")
        q, k = rotate(q, angles), rotate(k, angles)
        sections = length_parts(self.rules)
        if sections > 1:  # Queries stay apart; keys and values, which are fewer, come together.
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
        store = functools.partial(write, backend=self.backend)

        if cache is not None:
            k, v = round_for(cache, k), round_for(cache, v)
        if cache is None:
            mixed = look(q, k, v, positions, positions, aligned=True)
        elif x.shape[1] == 1:
            # One token overwrites nothing that it may still see: the ring holds all its keys.
            cache = store(cache, k, v, positions)
            mixed = look(q, cache.k, cache.v, positions, cache.positions)
        elif self.window and (self.window - 1) * self.dilation < cache.positions.shape[1]:
            # A chunk's early queries still need keys that its late tokens overwrite.
            seen, origin = line_up(cache, k, v, positions)
            # Only then is the ring written: else XLA copies it first, to have it both ways.
            seen, cache = jax.lax.optimization_barrier((seen, cache))
            mixed = look(q, seen.k, seen.v, positions, seen.positions, aligned=True, origin=origin)
            cache = store(cache, k, v, positions)
        else:  # As many slots as the text has tokens, or will have: nothing is overwritten.
            cache = store(cache, k, v, positions)
            origin = jnp.zeros(len(x), jnp.int32)
            mixed = look(q, cache.k, cache.v, positions, cache.positions, origin=origin)

        return projection(name="o_proj")(mixed), cache
