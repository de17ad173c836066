"""The layers that hold parameters: projection, RMSNorm, embedding, gated MLP, attention layer.

They do not know how they are stacked; attention itself and the cache are functions of other files.
Every parameter names its logical axes, which `sharding.py` maps to a mesh.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mistral_jax.config import ModelConfig
from mistral_jax.model.cache import LayerCache, line_up, round_for, write
from mistral_jax.model.rope import rotate
from mistral_jax.ops.attention import attend
from mistral_jax.ops.partition import Rules, length_parts, mesh_axes
from mistral_jax.ops.products import look_up, multiply, multiply_each


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
      out_dtype: of the result; None = dtype.
      dropout: share of an adapter's inputs that are dropped where there is an rng "dropout".
    """

    config: ModelConfig
    dtype: jnp.dtype
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
            product += multiply(multiply(x, a, 1, self.dtype), b, self.outputs, self.dtype)
        return product.astype(self.out_dtype or self.dtype)


def project(x: jax.Array, projections: Sequence[Projection]) -> list[jax.Array]:
    """Projects `x` by each of `projections`, which differ in sizes only, at once."""
    outputs, dtype = projections[0].outputs, projections[0].dtype
    products = multiply_each(x, [one.matrix for one in projections], outputs, dtype)
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

    def setup(self):  # noqa: D102
        axes = MATRICES["embed"]
        init = nn.initializers.normal(1.0)
        init = nn.with_logical_partitioning(init, (*axes.outputs, *axes.inputs))
        shape = axes.shape(self.config)
        self.embedding = self.param("embedding", init, shape, jnp.float32)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns the vectors [B, T, D] of `tokens` [B, T]."""
        x = look_up(self.embedding, tokens).astype(self.dtype)
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
        return multiply(x, self.embedding, 1, self.dtype)


class MLP(nn.Module):
    """The gated MLP: down(silu(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202)."""

    config: ModelConfig
    dtype: jnp.dtype
    rules: Rules
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x` [B, T, D] to [B, T, D]."""
        projection = functools.partial(Projection, self.config, self.dtype, dropout=self.dropout)
        gate, up = projection(name="gate_proj"), projection(name="up_proj")
        down = projection(name="down_proj")
        opened, raised = project(x, [gate, up])
        # Rounded once, as PyTorch does: each of its operations would else be.
        gated = nn.silu(opened.astype(jnp.float32)).astype(self.dtype) * raised
        return down(nn.with_logical_constraint(gated, ("batch", "length", "mlp"), rules=self.rules))


class Attention(nn.Module):
    """The attention layer: projections, rotation, the cache, and `attend`."""

    config: ModelConfig
    window: int | None
    dtype: jnp.dtype
    rules: Rules
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
        projection = functools.partial(Projection, self.config, self.dtype, dropout=self.dropout)

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
        )

        if cache is not None:
            k, v = round_for(cache, k), round_for(cache, v)
        if cache is None:
            mixed = look(q, k, v, positions, positions, aligned=True)
        elif x.shape[1] == 1:
            # One token overwrites nothing that it may still see: the ring holds all its keys.
            cache = write(cache, k, v, positions)
            mixed = look(q, cache.k, cache.v, positions, cache.positions)
        elif self.window and (self.window - 1) * self.dilation < cache.positions.shape[1]:
            # A chunk's early queries still need keys that its late tokens overwrite.
            seen, origin = line_up(cache, k, v, positions)
            # Only then is the ring written: else XLA copies it first, to have it both ways.
            seen, cache = jax.lax.optimization_barrier((seen, cache))
            mixed = look(q, seen.k, seen.v, positions, seen.positions, aligned=True, origin=origin)
            cache = write(cache, k, v, positions)
        else:  # As many slots as the text has tokens, or will have: nothing is overwritten.
            cache = write(cache, k, v, positions)
            origin = jnp.zeros(len(x), jnp.int32)
            mixed = look(q, cache.k, cache.v, positions, cache.positions, origin=origin)

        return projection(name="o_proj")(mixed), cache
