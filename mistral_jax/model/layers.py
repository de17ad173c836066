"""The layers that hold parameters: projection, RMSNorm, embedding, gated MLP.

They do not know how they are stacked. Every parameter names its logical axes, which `sharding.py`
maps to a mesh.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mistral_jax.config import ModelConfig
from mistral_jax.ops.backend import Backend
from mistral_jax.ops.partition import Rules, mesh_axes
from mistral_jax.ops.products import multiply, multiply_each
from mistral_jax.ops.rows import look_up


class Axes(NamedTuple):
    """The logical axes of a matrix, output axes first, as PyTorch stores them.

    Attributes:
      outputs: axes of the product's result.
      inputs: axes that the product sums over.
    """

    outputs: tuple[str, ...]
    inputs: tuple[str, ...]

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Returns the sizes of all axes in a model."""
        sizes = {
            "vocab": config.vocab_size,
            "embed": config.embed_dim,
            "mlp": config.mlp_dim,
            "heads": config.num_heads,
            "kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
        }
        return tuple(sizes[axis] for axis in (*self.outputs, *self.inputs))

    def divide(self, axes: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Divides what is known of each axis, such as its size, into outputs and inputs.

        Axes before the named ones, such as one of stacked layers, count as outputs.
        """
        count = len(axes) - len(self.inputs)
        return axes[:count], axes[count:]


# Every matrix of the model, by the name of the module that holds it.
MATRICES = {
    "embed": Axes(("vocab",), ("embed",)),
    "q_proj": Axes(("heads", "head_dim"), ("embed",)),
    "k_proj": Axes(("kv_heads", "head_dim"), ("embed",)),
    "v_proj": Axes(("kv_heads", "head_dim"), ("embed",)),
    "o_proj": Axes(("embed",), ("heads", "head_dim")),
    "gate_proj": Axes(("mlp",), ("embed",)),
    "up_proj": Axes(("mlp",), ("embed",)),
    "down_proj": Axes(("embed",), ("mlp",)),
    "lm_head": Axes(("vocab",), ("embed",)),
}


class Projection(nn.Module):
    """Multiplies by the matrix that `MATRICES` has under the module's name.

    Where its parameters have an adapter beside the matrix, `lora_a` [R, inputs] and `lora_b`
    [outputs, R], the product of the two is added to the matrix's (LoRA, arXiv 2106.09685).

    Attributes:
      config: the architecture.
      dtype: of the product's operands; sums are float32.
      backend: what it is traced for.
      out_dtype: of the result; None = dtype.
      dropout: share of an adapter's inputs that are dropped where there is an rng "dropout".
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

    def __call__(self, x: jax.Array) -> jax.Array:
        """Projects `x` [B, T, ...], whose last axes are the matrix's inputs."""
        return project(x, [self])[0]

    def complete(self, product: jax.Array, x: jax.Array) -> jax.Array:
        """Adds what an adapter makes of `x` to the matrix's product with it."""
        if self.has_variable("params", "lora_a"):
            a, b = (self.get_variable("params", name) for name in ("lora_a", "lora_b"))
            if self.dropout and self.has_rng("dropout"):
                share = jnp.float32(1 - self.dropout)
                kept = jax.random.bernoulli(self.make_rng("dropout"), share, x.shape)
                x = jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)
            inner = multiply(x, a, 1, self.dtype, self.backend)
            product += multiply(inner, b, self.outputs, self.dtype, self.backend)
        return product.astype(self.out_dtype or self.dtype)


def project(x: jax.Array, projections: Sequence[Projection]) -> list[jax.Array]:
    """Projects `x` by each of `projections`, which differ in sizes only, at once."""
    first, matrices = projections[0], [one.matrix for one in projections]
    products = multiply_each(x, matrices, first.outputs, first.dtype, first.backend)
    return [one.complete(product, x) for one, product in zip(projections, products, strict=True)]


class RMSNorm(nn.Module):
    """Divides by the root mean square in float32, then scales in `dtype` (arXiv 1910.07467)."""

    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `x` [B, T, D] over D."""
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",))
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return normal.astype(self.dtype) * scale.astype(self.dtype)[None, None]


class Embedding(nn.Module):
    """Looks tokens up in a table, and scores every token against it where the output is tied."""

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
        # Split as the table is: what devices share by width they look up for each other's tokens,
        # and exchange. Else XLA may gather all activations on the way back.
        width = set(mesh_axes(self.rules, "embed"))
        places = (
            axis if width.isdisjoint(mesh_axes(self.rules, axis)) else None
            for axis in ("batch", "length")
        )
        return nn.with_logical_constraint(x, (*places, "embed"), rules=self.rules)

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
        opened, raised = project(x, [gate, up])
        # Rounded once, as PyTorch does: each of its operations would else be.
        gated = nn.silu(opened.astype(jnp.float32)).astype(self.dtype) * raised
        return down(nn.with_logical_constraint(gated, ("batch", "length", "mlp"), rules=self.rules))
