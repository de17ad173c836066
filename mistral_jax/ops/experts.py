"""Products with the matrices of experts, each with the tokens that chose it."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from mistral_jax.ops.backend import PLAIN, Backend
from mistral_jax.ops.partition import Rules
from mistral_jax.ops.quantized import MaybeQuantized, QuantizedMatrix, einsum


@flax.struct.dataclass
class Stack:
    """The matrices of all experts for one projection.

    Attributes:
      matrix: a matrix for each expert, [E, Y, X], output axis first.
      a: inner matrices of adapters, [E, R, X]; None = there are no adapters.
      b: outer matrices of adapters, [E, Y, R].
    """

    matrix: MaybeQuantized
    a: jax.Array | None = None
    b: jax.Array | None = None


def mix(
    x: jax.Array,
    positions: jax.Array,
    chosen: jax.Array,
    shares: jax.Array,
    stacks: Sequence[Stack],
    dtype: jnp.dtype,
    backend: Backend = PLAIN,
    rules: Rules = (),
) -> jax.Array:
    """Sums the outputs of the experts that each token chose: down(silu(gate(x)) * up(x)).

    Args:
      x: activations, [B, T, D].
      positions: position of each token in its text, [B, T] int32; -1 = padding.
      chosen: experts of each token, [B, T, k] int32.
      shares: weight of each of these experts, [B, T, k] float32.
      stacks: the projections gate, up and down of all experts.
      dtype: dtype of the operands; sums are float32.
      backend: the backend that this is traced for.
      rules: mesh axes of the logical axes.

    Returns:
      [B, T, D] in `dtype`; 0 for padding.
    """
    del backend, rules
    return plain(x, positions, chosen, shares, stacks, dtype)


def plain(x, positions, chosen, shares, stacks, dtype):
    """Computes `mix` with every expert for every token, which any device can do.

    The other implementations are tested against it.
    """
    gate, up, down = stacks
    count = gate.matrix.shape[0]
    mine = jax.nn.one_hot(chosen, count, dtype=shares.dtype)
    shares = jnp.where(positions[..., None] >= 0, shares, 0)
    each = jnp.sum(mine * shares[..., None], axis=-2)  # [B, T, E]
    rows = x.astype(dtype)[..., None, :]

    def project(rows, stack):
        product = einsum("...ex,eyx->...ey", rows, _matrix(stack.matrix, dtype))
        if stack.a is not None:
            inner = einsum("...ex,erx->...er", rows, stack.a.astype(dtype)).astype(dtype)
            product += einsum("...er,eyr->...ey", inner, stack.b.astype(dtype))
        return product

    rows = jnp.broadcast_to(rows, (*x.shape[:2], count, x.shape[-1]))
    gated = _gated(project(rows, gate), project(rows, up), dtype)
    outputs = project(gated, down)
    return jnp.sum(outputs * each[..., None], axis=-2).astype(dtype)


def _gated(opened, raised, dtype):
    # Products are rounded to `dtype`, as in `layers.MLP`.
    opened, raised = opened.astype(dtype), raised.astype(dtype)
    return jax.nn.silu(opened.astype(jnp.float32)).astype(dtype) * raised


def _matrix(matrix: MaybeQuantized, dtype: jnp.dtype) -> jax.Array:
    if isinstance(matrix, QuantizedMatrix):
        return matrix.dequantize(dtype)
    return matrix.astype(dtype)
