"""Mixture of experts: a router chooses a few of many gated MLPs for each token (Mixtral, arXiv
2401.04088).

Every token is computed by exactly `experts_per_token` experts, whatever the others choose: no
expert has a capacity, and no token is dropped. So the text of a row does not depend on its
neighbours. `ops/experts.py` computes the products.

The parameters of a layer, with experts in an axis of their own in front (E):

  layers_i/moe/router/kernel [E, D]
  layers_i/moe/{gate,up}_proj/kernel [E, F, D]     layers_i/moe/down_proj/kernel [E, D, F]
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mistral_jax.config import ModelConfig
from mistral_jax.model.layers import MATRICES, Projection
from mistral_jax.ops.backend import Backend
from mistral_jax.ops.experts import Choice, Dropout, Stack, mix
from mistral_jax.ops.partition import Rules

# Collection and name of what `balance` returns, which a model keeps if the collection is mutable.
BALANCE = "router", "balance"


class Experts(nn.Module):
    """The gated MLPs of a layer, and the router that chooses among them.

    Attributes:
      config: the architecture.
      dtype: dtype of the activations.
      rules: mesh axes of each logical axis.
      backend: the backend that the layer is traced for.
      dropout: dropout rate of the adapters' inputs.
    """

    config: ModelConfig
    dtype: jnp.dtype
    rules: Rules
    backend: Backend
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Maps `x` [B, T, D] to the weighted sum of the outputs of its experts, [B, T, D].

        Args:
          x: normalised activations.
          positions: position of each token in its text, [B, T] int32; -1 = padding, which no expert
            computes: its output is 0.
        """
        config = self.config
        router = Projection(config, self.dtype, self.backend, dropout=self.dropout, name="router")
        chances = jax.nn.softmax(router(x).astype(jnp.float32), axis=-1)
        shares, chosen = choose(chances, config.experts_per_token)
        shares /= jnp.sum(shares, axis=-1, keepdims=True)
        self.sow(*BALANCE, balance(chances, chosen, positions))
        stacks = [Stacked(config, name=f"{name}_proj")() for name in ("gate", "up", "down")]
        dropout = None
        if self.dropout and self.has_rng("dropout"):
            dropout = Dropout(self.make_rng("dropout"), self.dropout)
        choice = Choice(chosen, shares, positions)
        return mix(x, choice, stacks, self.dtype, self.backend, self.rules, dropout)


class Stacked(nn.Module):
    """The matrices of all experts for one projection, and their adapters."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Stack:
        """Returns the parameters."""
        axes, experts = MATRICES[self.name], self.config.num_experts
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", 2, 1, 0)
        init = nn.with_logical_partitioning(init, ("expert", *axes.outputs, *axes.inputs))
        matrix = self.param("kernel", init, (experts, *axes.shape(self.config)), jnp.float32)
        adapted = self.has_variable("params", "lora_a")
        names = ("lora_a", "lora_b") if adapted else ()
        return Stack(matrix, *(self.get_variable("params", name) for name in names))


def choose(chances: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns the largest of `chances` [B, T, E] and their indices, both [B, T, count].

    It equals `jax.lax.top_k`, for which XLA would gather the rows of all devices.
    """
    rest, values, indices = chances, [], []
    for _ in range(count):
        index = jnp.argmax(rest, axis=-1).astype(jnp.int32)
        found = jax.nn.one_hot(index, chances.shape[-1], dtype=jnp.bool_)
        values.append(jnp.sum(jnp.where(found, chances, 0), axis=-1))
        indices.append(index)
        rest = jnp.where(found, -jnp.inf, rest)
    return jnp.stack(values, axis=-1), jnp.stack(indices, axis=-1)


def balance(chances: jax.Array, chosen: jax.Array, positions: jax.Array) -> jax.Array:
    """Sums over tokens how often a layer's router chooses each expert, and how likely they are.

    Args:
      chances: probability of each expert, [B, T, E] float32.
      chosen: the chosen experts, [B, T, k] int32.
      positions: position of each token in its text, [B, T] int32; -1 = padding, which is left out.

    Returns:
      [3, E] float32: the number of tokens that chose each expert, the sums of its probabilities,
      and the number of tokens.
    """
    count = chances.shape[-1]
    read = (positions >= 0).astype(jnp.float32)[..., None]
    hits = jnp.sum(jax.nn.one_hot(chosen, count, dtype=jnp.float32), axis=-2)
    total = jnp.broadcast_to(read, chances.shape)
    return jnp.stack([jnp.sum(x * read, axis=(0, 1)) for x in (hits, chances, total)])


def balance_loss(sums: jax.Array) -> jax.Array:
    """Computes the load-balancing loss of all layers (Switch Transformers, arXiv 2101.03961).

    It is the number of experts times the sum, over experts, of the share of tokens that chose the
    expert and its mean probability, as in Transformers' `load_balancing_loss_func`: k if all
    experts are chosen equally often, and more otherwise.

    Args:
      sums: the results of `balance` of the layers, [L, 3, E].
    """
    hits, chances, total = jnp.sum(sums, axis=0)
    total = jnp.maximum(total, 1)
    return hits.shape[0] * jnp.sum(hits / total * (chances / total))
