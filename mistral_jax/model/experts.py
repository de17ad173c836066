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
from mistral_jax.ops.experts import Stack, mix
from mistral_jax.ops.partition import Rules


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
        config, of = self.config, {"dropout": self.dropout}
        scores = Projection(config, self.dtype, self.backend, **of, name="router")(x)
        chances = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
        shares, chosen = jax.lax.top_k(chances, config.experts_per_token)
        shares /= jnp.sum(shares, axis=-1, keepdims=True)
        stacks = [Stacked(config, name=f"{name}_proj")() for name in ("gate", "up", "down")]
        return mix(x, positions, chosen, shares, stacks, self.dtype, self.backend, self.rules)


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
