"""`Transformer` and `Block`: the forward pass, from tokens to logits.

The model is a pure function: `model.apply({"params": params}, tokens, positions, cache)` returns
the logits and the updated cache. Tokens are embedded, pass through L blocks of attention and MLP
(or a mixture of MLPs, see `experts.py`), and are normalised and multiplied by the output matrix.

Positions are data. The position of a token decides its rotation, its attention mask and its cache
slot, and position -1 marks padding. So rows of different lengths and ages share a batch without a
pad token or left padding, and a text may be read in chunks of any size with the same result.

These letters name the axes of arrays here and everywhere else:

  B  batch rows                 D  embed_dim, the residual stream     N  num_heads = K * G
  T  query length               F  mlp_dim                            K  num_kv_heads
  S  key length, cache slots    V  vocab_size                         G  queries per key-value head
  L  num_layers                 W  sliding_window, own key included   H  head_dim
  E  num_experts

The parameters, with output axes first, heads in an axis of their own (which a mesh can partition),
and one entry for each layer:

  embed/embedding [V, D]                        layers_i/attn_norm/scale [D]
  layers_i/attn/q_proj/kernel [N, H, D]         layers_i/mlp_norm/scale [D]
  layers_i/attn/{k,v}_proj/kernel [K, H, D]     layers_i/mlp/{gate,up}_proj/kernel [F, D]
  layers_i/attn/o_proj/kernel [D, N, H]         layers_i/mlp/down_proj/kernel [D, F]
  final_norm/scale [D]                          lm_head/kernel [V, D], unless tied
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mistral_jax.config import ModelConfig
from mistral_jax.model.attention import Attention
from mistral_jax.model.cache import Cache, LayerCache
from mistral_jax.model.experts import BALANCE, Experts
from mistral_jax.model.layers import MLP, Embedding, Projection, RMSNorm
from mistral_jax.model.rope import rotary_angles
from mistral_jax.ops import backend
from mistral_jax.ops.backend import Backend
from mistral_jax.ops.partition import Rules
from mistral_jax.ops.rows import operand_gradient

Params = Mapping[str, Any]

# The arrays of a block that each policy of this module saves, by their `checkpoint_name`.
SAVED = {
    "save_attention": ("attention", "adapter"),
    "save_heads": ("attention", "adapter", "heads", "residual"),
    "save_products": ("attention", "adapter", "heads", "residual", "mlp"),
}


def remat_policy(name: str) -> Callable[..., Any]:
    """Returns the policy of that name, from `SAVED` or `jax.checkpoint_policies`."""
    if name in SAVED:
        return jax.checkpoint_policies.save_only_these_names(*SAVED[name])
    return getattr(jax.checkpoint_policies, name)


class Block(nn.Module):
    """One layer: attention, then the MLP, each applied to the normalised residual stream.

    See `Attention` for the fields.
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
        """Adds the outputs of attention and of the MLP to `x`.

        Args:
          x: the residual stream, [B, T, D].
          positions: position of each token in its text, [B, T] int32; -1 = padding.
          angles: cosines and sines from `rotary_angles`.
          cache: this layer's cache of earlier tokens; None = there are no earlier tokens.

        Returns:
          The residual stream after the layer, [B, T, D], and the updated cache.
        """
        config, dtype, rules = self.config, self.dtype, self.rules
        of = {"backend": self.backend, "dropout": self.dropout}
        normal = RMSNorm(config.norm_eps, dtype, self.backend, self.rules, name="attn_norm")(x)
        attention = Attention(
            config, self.window, dtype, rules, dilation=self.dilation, **of, name="attn"
        )
        mixed, cache = attention(normal, positions, angles, cache)
        x = checkpoint_name(x + mixed, "residual")
        normal = RMSNorm(config.norm_eps, dtype, self.backend, self.rules, name="mlp_norm")(x)
        if config.num_experts:
            x = x + Experts(config, dtype, rules, **of, name="moe")(normal, positions)
        else:
            x = x + MLP(config, dtype, rules, **of, name="mlp")(normal)
        return nn.with_logical_constraint(x, ("batch", "length", "residual"), rules=rules), cache


class Transformer(nn.Module):
    """The language model: a pure function of (params, tokens, positions, cache).

    Attributes:
      config: the architecture.
      dtype: dtype of activations and of the operands of products. The statistics of norms,
        rotations, softmax and logits are always float32.
      rules: the mesh axes that partition each logical axis of an activation (see
        `parallel/sharding.py`); empty = XLA decides.
      remat: name of a policy, of `SAVED` or of `jax.checkpoint_policies`, that says what each block
        saves for the backward pass, which computes the rest again (arXiv 1604.06174).
        "nothing_saveable" costs a third more work, and needs a small part of the memory.
        "save_attention", "save_heads" and "save_products" save the results of more and more
        products. None = save everything.
      scan: whether to compile one block and scan it over the parameters of all layers, stacked by
        `stack_layers`. The program is then small however deep the model is. For training only:
        without a cache, and with the same window and dilation in all layers.
      dropout: dropout rate of the adapters' inputs, used only with an rng named "dropout".
      kv_cache_dtype: dtype of cached keys and values; None = `dtype`. "int8" quantises them, with a
        scale for each token and head.
      backend: the backend that the model is traced for. `load` sets it from the devices that hold
        the parameters; the default is chosen from this process's devices.
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
        """Computes, for each token, the logits of the next token.

        Args:
          tokens: token ids, [B, T] int32.
          positions: position of each token in its text, [B, T] int32, rising by 1 along a row; -1 =
            padding, before or after a row's tokens. No token sees padding, and its logits have no
            meaning. Without a cache a row may hold several texts, one after another, each with
            positions from 0; tokens then see only their own text.
          cache: the cache of earlier tokens, from `init_cache` or an earlier call; None = there are
            no earlier tokens, and these are not cached.
          logits_at: column of each row whose logits to compute, [B] int32; None = all columns.

        Returns:
          The logits, [B, T, V] float32 (with `logits_at`: [B, 1, V]), and the updated cache, or
          None without a cache.
        """
        config, dtype = self.config, self.dtype
        chex.assert_rank([tokens, positions], 2)
        chex.assert_equal_shape([tokens, positions])
        embed = Embedding(config, dtype, self.rules, self.backend, name="embed")
        x = embed(tokens)
        x = nn.with_logical_constraint(x, ("batch", "length", "residual"), rules=self.rules)
        angles = rotary_angles(
            positions, config.head_dim, config.rope_theta, self.backend, config.rope_scaling
        )
        x, cache = self._blocks(x, positions, angles, cache)
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[:, None, None], axis=1)
        x = RMSNorm(config.norm_eps, dtype, self.backend, self.rules, name="final_norm")(x)
        if config.tie_embeddings:
            logits = embed.attend(x)
        else:
            logits = Projection(config, dtype, self.backend, jnp.float32, name="lm_head")(x)
        logits = operand_gradient(logits, dtype, self.backend)
        logits = nn.with_logical_constraint(logits, ("batch", "length", "vocab"), rules=self.rules)
        return logits, cache

    def _blocks(self, x, positions, angles, cache):
        """Applies all layers to `x` [B, T, D]."""
        config, block_class = self.config, Block
        if self.remat:
            policy = remat_policy(self.remat)
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
                variable_axes={"params": 0, BALANCE[0]: 0},
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
    """Stacks `layers_0`, `layers_1`, ... into one entry `layers`, whose arrays have a first axis L.

    Args:
      params: the parameters, or any tree of the same structure.
      consume: whether to delete each array as soon as it is stacked, so that memory never holds two
        copies of the model.
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
