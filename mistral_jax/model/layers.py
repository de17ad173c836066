"""The layers that hold parameters: projections, RMSNorm, the embedding and the gated MLP.

Every parameter declares its logical axes, such as "heads" or "embed". `parallel/sharding.py` maps
these to the axes of a device mesh, so the model itself names no device.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mistral_jax.config import ModelConfig
from mistral_jax.ops.backend import PLAIN, Backend
from mistral_jax.ops.gate import gate as apply_gate
from mistral_jax.ops.norm import normalize
from mistral_jax.ops.partition import Rules, mesh_axes
from mistral_jax.ops.products import multiply, multiply_each
from mistral_jax.ops.rows import apart, look_up, narrowed, rounded, stored, stored_gradient


class Axes(NamedTuple):
    """The logical axes of a matrix: output axes first, as PyTorch stores a linear layer's weight.

    Attributes:
      outputs: axes of the product's result.
      inputs: axes that the product sums over.
    """

    outputs: tuple[str, ...]
    inputs: tuple[str, ...]

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Returns the shape of the matrix in a model with this config."""
        sizes = {
            "vocab": config.vocab_size,
            "embed": config.embed_dim,
            "mlp": config.mlp_dim,
            "heads": config.num_heads,
            "kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "expert": config.num_experts,
            "choice": config.num_experts,
        }
        return tuple(sizes[axis] for axis in (*self.outputs, *self.inputs))

    def divide(self, axes: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Divides a tuple with one entry for each axis, such as a shape, into outputs and inputs.

        Axes in front of the declared ones, such as that of stacked layers, count as outputs.
        """
        count = len(axes) - len(self.inputs)
        return axes[:count], axes[count:]

    def stack(self, axes: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns the entries of the axes in front of the declared ones."""
        return axes[: len(axes) - len(self.outputs) - len(self.inputs)]


# Every matrix of the model, by the name of the module that holds it. Those of experts are stacked
# along an axis "expert" in front. The router's outputs, "choice", are never partitioned.
MATRICES = {
    "embed": Axes(("vocab",), ("embed",)),
    "q_proj": Axes(("heads", "head_dim"), ("embed",)),
    "k_proj": Axes(("kv_heads", "head_dim"), ("embed",)),
    "v_proj": Axes(("kv_heads", "head_dim"), ("embed",)),
    "o_proj": Axes(("embed",), ("heads", "head_dim")),
    "gate_proj": Axes(("mlp",), ("embed",)),
    "up_proj": Axes(("mlp",), ("embed",)),
    "down_proj": Axes(("embed",), ("mlp",)),
    "router": Axes(("choice",), ("embed",)),
    "lm_head": Axes(("vocab",), ("embed",)),
}


class Projection(nn.Module):
    """A linear layer without a bias. `MATRICES` declares its axes under the module's name.

    If the parameters hold an adapter beside the matrix, `lora_a` [R, inputs] and `lora_b`
    [outputs, R], the layer adds the adapter's product to that of the matrix (LoRA, arXiv
    2106.09685).

    Attributes:
      config: the architecture.
      dtype: dtype of the operands; sums are float32.
      backend: the backend that the layer is traced for.
      out_dtype: dtype of the result; None = dtype.
      dropout: dropout rate of the adapter's inputs, used only with an rng named "dropout".
    """

    config: ModelConfig
    dtype: jnp.dtype
    backend: Backend
    out_dtype: jnp.dtype | None = None
    dropout: float = 0.0

    def setup(self):  # noqa: D102
        axes = MATRICES[self.name]
        shape, self.outputs = axes.shape(self.config), len(axes.outputs)
        kept, contracted = range(self.outputs), range(self.outputs, len(shape))
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", contracted, kept)
        init = nn.with_logical_partitioning(init, (*axes.outputs, *axes.inputs))
        self.matrix = self.param("kernel", init, shape, jnp.float32)

    def __call__(self, x: jax.Array, plain: jax.Array | None = None) -> jax.Array:
        """Projects `x` [B, T, ...], whose last axes are the matrix's inputs; see `project`."""
        return project(x, [self], plain)[0]

    def adapter(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array] | None:
        """Returns the adapter's inputs, `lora_a` and `lora_b`; None without an adapter."""
        if not self.has_variable("params", "lora_a"):
            return None
        if self.dropout and self.has_rng("dropout"):
            share = jnp.float32(1 - self.dropout)
            kept = jax.random.bernoulli(self.make_rng("dropout"), share, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)
        return x, self.get_variable("params", "lora_a"), self.get_variable("params", "lora_b")


def project(
    x: jax.Array, projections: Sequence[Projection], plain: jax.Array | None = None
) -> list[jax.Array]:
    """Projects `x` by several projections in one call, which some backends compute faster.

    Args:
      x: [B, T, ...], whose last axes are the matrices' inputs.
      projections: they may differ in the sizes of their axes, but in nothing else.
      plain: `x` before it was `stored`, for adapters: their gradients read each number of `x` once,
        so it can be computed again inside of their products; None = `x`.
    """
    first, matrices = projections[0], [one.matrix for one in projections]
    outputs, dtype, backend = first.outputs, first.dtype, first.backend
    products = multiply_each(x, matrices, outputs, dtype, backend)
    plain = x if plain is None else plain
    found = {i: y for i, one in enumerate(projections) if (y := one.adapter(plain)) is not None}
    # Without dropout, adapters share their inputs, and then one product reads these once.
    groups = [[i] for i in found] if any(y[0] is not plain for y in found.values()) else [[*found]]
    for group in filter(None, groups):
        inputs = stored_gradient(found[group[0]][0], backend)
        inner = multiply_each(inputs, [found[i][1] for i in group], 1, dtype, backend)
        for i, narrow in zip(group, inner, strict=True):
            narrow = checkpoint_name(narrow.astype(dtype), "adapter")
            outer = multiply(narrow, found[i][2], outputs, dtype, backend)
            products[i] += rounded(outer, dtype, backend)
    return [narrowed(product, first.out_dtype or dtype, backend) for product in products]


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv 1910.07467).

    The mean is computed in float32, and the scale is applied after the cast to `dtype`, as in
    Mistral's reference implementation: at half precision another order rounds differently.
    """

    eps: float
    dtype: jnp.dtype
    backend: Backend = PLAIN
    rules: Rules = ()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `x` [B, T, D] over D."""
        x = stored(x, self.backend)
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",))
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        normal = normalize(x, scale, self.eps, self.dtype, self.backend, self.rules)
        return stored_gradient(normal, self.backend)


class Embedding(nn.Module):
    """The table of token vectors; with tied embeddings, also the output matrix."""

    config: ModelConfig
    dtype: jnp.dtype
    rules: Rules
    backend: Backend

    def setup(self):  # noqa: D102
        axes = MATRICES["embed"]
        init = nn.initializers.normal(1.0)
        init = nn.with_logical_partitioning(init, (*axes.outputs, *axes.inputs))
        shape = axes.shape(self.config)
        self.embedding = self.param("embedding", init, shape, jnp.float32)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns the vectors [B, T, D] of `tokens` [B, T]."""
        x = look_up(self.embedding, tokens, self.backend).astype(self.dtype)
        # The result is partitioned as the table is. Where devices hold parts of the width, each
        # looks up its part for the others' tokens, and they exchange the parts. Otherwise XLA may
        # gather all activations in the backward pass.
        width, rules = mesh_axes(self.rules, "embed"), dict(self.rules)
        for axis in ("batch", "length"):
            rules[axis] = tuple(x for x in mesh_axes(self.rules, axis) if x not in width)
        axes, rules = ("batch", "length", "embed"), tuple(rules.items())
        return nn.with_logical_constraint(x, axes, rules=rules)

    def attend(self, x: jax.Array) -> jax.Array:
        """Returns the logits [B, T, V] of `x` [B, T, D], in float32."""
        return multiply(x, self.embedding, 1, self.dtype, self.backend)


class MLP(nn.Module):
    """The gated MLP: down(silu(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202)."""

    config: ModelConfig
    dtype: jnp.dtype
    rules: Rules
    backend: Backend
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x` [B, T, D] to [B, T, D]."""
        projection = functools.partial(
            Projection, self.config, self.dtype, self.backend, dropout=self.dropout
        )
        gate, up = projection(name="gate_proj"), projection(name="up_proj")
        down = projection(name="down_proj")
        products = (stored_gradient(y, self.backend) for y in project(x, [gate, up]))
        # The name comes first: JAX rounds what it saves, which would copy an array in memory.
        opened, raised = (checkpoint_name(y, "mlp") for y in products)
        gated = apply_gate(opened, raised, self.backend)
        gated = nn.with_logical_constraint(gated, ("batch", "length", "mlp"), rules=self.rules)
        gated = apart(gated, self.backend)
        return down(stored(gated, self.backend), gated)
