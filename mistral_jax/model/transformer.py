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

import dataclasses
from collections.abc import Mapping
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from mistral_jax.config import ModelConfig
from mistral_jax.model.attention import Attention
from mistral_jax.model.cache import Cache, LayerCache
from mistral_jax.model.layers import MLP, Embedding, Projection, RMSNorm
from mistral_jax.model.rope import rotary_angles
from mistral_jax.ops import backend
from mistral_jax.ops.backend import Backend
from mistral_jax.ops.partition import Rules

Params = Mapping[str, Any]


class Block(nn.Module):
    """One layer: attention and MLP, each on the normalised residual stream and added to it."""

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
        config, dtype, rules = self.config, self.dtype, self.rules
        of = {"backend": self.backend, "dropout": self.dropout}
        normal = RMSNorm(config.norm_eps, dtype, name="attn_norm")(x)
        attention = Attention(
            config, self.window, dtype, rules, dilation=self.dilation, **of, name="attn"
        )
        mixed, cache = attention(normal, positions, angles, cache)
        x = x + mixed
        normal = RMSNorm(config.norm_eps, dtype, name="mlp_norm")(x)
        x = x + MLP(config, dtype, rules, **of, name="mlp")(normal)
        return nn.with_logical_constraint(x, ("batch", "length", "residual"), rules=rules), cache


class Transformer(nn.Module):
    """Mistral: a pure function of (params, tokens, positions, cache).

    Attributes:
      config: the architecture.
      dtype: of activations and of products' operands; norms' statistics, rotations, softmax and
        logits are float32 whatever it is.
      rules: which mesh axes each logical axis of an activation lies on (see `sharding.py`); empty =
        left to the compiler.
      remat: what a gradient keeps of the inside of each block, the rest of which it computes again
        (arXiv 1604.06174): name of a policy of `jax.checkpoint_policies`. "nothing_saveable" is a
        third more work, for a small part of the memory. None = all is kept.
      scan: whether one compiled block runs over all layers' parameters, stacked as `stack_layers`
        does it, in place of a program that is as long as the model is deep. It is for training:
        without a cache, and with the same window and dilation in all layers.
      dropout: share of the inputs of adapters that are dropped where there is an rng "dropout".
      kv_cache_dtype: of the keys and values that a cache keeps; None = `dtype`. To "int8" they are
        rounded with a scale for each token and head.
      backend: what it is traced for; `load` sets it from the devices of the parameters, and without
        it the first device counts when the model is made.
    """

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32
    rules: Rules = ()
    remat: str | None = None
    scan: bool = False
    dropout: float = 0.0
    kv_cache_dtype: jnp.dtype | str | None = None
    backend: Backend = dataclasses.field(default_factory=backend.default)

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
            Without a cache a row may hold several texts, one after another, each from its own
            position 0 on: none of them sees another.
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
        embed = Embedding(config, dtype, self.rules, self.backend, name="embed")
        x = embed(tokens)
        x = nn.with_logical_constraint(x, ("batch", "length", "residual"), rules=self.rules)
        angles = rotary_angles(positions, config.head_dim, config.rope_theta, self.backend)
        x, cache = self._blocks(x, positions, angles, cache)
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[:, None, None], axis=1)
        x = RMSNorm(config.norm_eps, dtype, name="final_norm")(x)
        if config.tie_embeddings:
            logits = embed.attend(x)
        else:
            logits = Projection(config, dtype, self.backend, jnp.float32, name="lm_head")(x)
        logits = nn.with_logical_constraint(logits, ("batch", "length", "vocab"), rules=self.rules)
        return logits, cache

    def _blocks(self, x, positions, angles, cache):
        """Passes `x` [B, T, D] through all layers."""
        config, block_class = self.config, Block
        if self.remat:
            policy = getattr(jax.checkpoint_policies, self.remat)
            block_class = nn.remat(Block, policy=policy, prevent_cse=not self.scan)
        names = ("dtype", "rules", "backend", "dropout")
        fields = {name: getattr(self, name) for name in names}
        windows = [*zip(config.windows, config.dilations, strict=True)]
        if self.scan:
            if cache is not None or len(set(windows)) > 1:
                raise ValueError(
                    "scan is for training with one window in all layers; unstack the layers "
                    "(unstack_layers), and leave scan out"
                )
            scanned = nn.scan(
                block_class,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=config.num_layers,
                metadata_params={nn.PARTITION_NAME: None},
            )
            window, dilation = windows[0]
            return scanned(config, window, dilation=dilation, **fields, name="layers")(
                x, positions, angles, None
            )
        layer_caches = cache or (None,) * config.num_layers
        new_cache = []
        layers = zip(windows, layer_caches, strict=True)
        for i, ((window, dilation), layer_cache) in enumerate(layers):
            block = block_class(config, window, dilation=dilation, **fields, name=f"layers_{i}")
            x, layer_cache = block(x, positions, angles, layer_cache)
            new_cache.append(layer_cache)
        return x, None if cache is None else tuple(new_cache)


def stack_layers(params: Params, consume: bool = False) -> Params:
    """Joins `layers_0`, `layers_1`, ... to one entry, `layers`, of arrays with a first axis L.

    Args:
      params: the parameters, or any tree like them.
      consume: whether to free each array once it is part of another, for the memory of one model.
    """
    rest = {name: part for name, part in params.items() if not name.startswith("layers_")}
    layers = [params[f"layers_{i}"] for i in range(len(params) - len(rest))]

    def stack(*parts):
        stacked = jnp.stack(parts)
        if consume:
            jax.block_until_ready(stacked)
            for part in parts:
                part.delete()
        return stacked

    return {**rest, "layers": jax.tree.map(stack, *layers)}


def unstack_layers(params: Params) -> Params:
    """Undoes `stack_layers`."""
    stacked = params["layers"]
    depth = jax.tree.leaves(stacked)[0].shape[0]
    rest = {name: part for name, part in params.items() if name != "layers"}
    layers = {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(depth)}
    return {**rest, **layers}
