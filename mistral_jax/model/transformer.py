"""`Block` and `Transformer`: the whole forward pass. They hold no weights and choose no tokens.

The letters of shapes and einsums, here and everywhere else:

  B  batch                      D  embed_dim, the residual stream     N  num_heads = K * G
  T  query length               F  mlp_dim                            K  num_kv_heads
  S  key length, cache slots    V  vocab_size                         G  queries per key-value head
  L  num_layers                 W  sliding_window, own key included   H  head_dim

The parameters, output axes first, heads unfolded, one entry a layer:

  embed/embedding [V, D]                        layers_i/attn_norm/scale [D]
  layers_i/attn/q_proj/kernel [N, H, D]         layers_i/mlp_norm/scale [D]
  layers_i/attn/{k,v}_proj/kernel [K, H, D]     layers_i/mlp/{gate,up}_proj/kernel [F, D]
  layers_i/attn/o_proj/kernel [D, N, H]         layers_i/mlp/down_proj/kernel [D, F]
  final_norm/scale [D]                          lm_head/kernel [V, D], unless tied
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from mistral_jax.config import ModelConfig
from mistral_jax.model.cache import Cache, LayerCache
from mistral_jax.model.layers import MLP, Attention, Embedding, Projection, RMSNorm, Rules
from mistral_jax.model.rope import rotary_angles


class Block(nn.Module):
    """One layer: attention and MLP, each on the normalised residual stream and added to it."""

    config: ModelConfig
    window: int | None
    dtype: jnp.dtype
    rules: Rules

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        cache: LayerCache | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Maps `x` [B, T, D] to [B, T, D], and the cache to the one that has seen `x` too."""
        config, dtype, rules = self.config, self.dtype, self.rules
        normal = RMSNorm(config.norm_eps, dtype, name="attn_norm")(x)
        attention = Attention(config, self.window, dtype, rules, name="attn")
        mixed, cache = attention(normal, positions, angles, cache)
        x = x + mixed
        normal = RMSNorm(config.norm_eps, dtype, name="mlp_norm")(x)
        x = x + MLP(config, dtype, rules, name="mlp")(normal)
        return nn.with_logical_constraint(x, ("batch", "length", "residual"), rules=rules), cache


class Transformer(nn.Module):
    """Mistral: a pure function of (params, tokens, positions, cache).

    Attributes:
      config: the architecture.
      dtype: of activations and of products' operands; norms' statistics, rotations, softmax and
        logits are float32 whatever it is.
      rules: which mesh axes each logical axis of an activation lies on (see `sharding.py`); empty =
        left to the compiler.
      remat: whether a gradient keeps only what goes into each block, and computes its inside again
        (arXiv 1604.06174): a third more work, for a small part of the memory.
    """

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32
    rules: Rules = ()
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: Cache | None = None,
        logits_at: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Computes the logits of the token after each token.

        Args:
          tokens: token ids, [B, T] int32.
          positions: place of each token in its text, [B, T] int32, rising by 1 along a row; -1 =
            padding, before or after a row's tokens, unseen and with logits that mean nothing.
          cache: what came before, as `init_cache` or an earlier call gives it; None = nothing did,
            and nothing is to be remembered.
          logits_at: column whose logits are wanted, [B] int32; None = all.

        Returns:
          The logits, [B, T, V] (with `logits_at`: [B, 1, V]) float32, and the cache that has seen
          `tokens` too, or None.
        """
        config, dtype = self.config, self.dtype
        chex.assert_rank([tokens, positions], 2)
        chex.assert_equal_shape([tokens, positions])
        embed = Embedding(config, dtype, self.rules, name="embed")
        x = embed(tokens)
        x = nn.with_logical_constraint(x, ("batch", "length", "residual"), rules=self.rules)
        angles = rotary_angles(positions, config.head_dim, config.rope_theta)
        layer_caches = cache or (None,) * config.num_layers
        block_class = nn.remat(Block) if self.remat else Block
        new_cache = []
        for i, (window, layer_cache) in enumerate(zip(config.windows, layer_caches, strict=True)):
            block = block_class(config, window, dtype, self.rules, name=f"layers_{i}")
            x, layer_cache = block(x, positions, angles, layer_cache)
            new_cache.append(layer_cache)
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[:, None, None], axis=1)
        x = RMSNorm(config.norm_eps, dtype, name="final_norm")(x)
        if config.tie_embeddings:
            logits = embed.attend(x)
        else:
            shape, axes = (config.vocab_size, config.embed_dim), ("vocab", "embed")
            logits = Projection(shape, axes, 1, dtype, jnp.float32, name="lm_head")(x)
        logits = nn.with_logical_constraint(logits, ("batch", "length", "vocab"), rules=self.rules)
        return logits, None if cache is None else tuple(new_cache)
