"""Rotation of the pairs of numbers in queries and keys, in the way that suits the backend.

The kernels of a TPU read heads as the first axis. If a product writes this order, XLA's TPU backend
computes it head by head, which takes twice the time on a v6e, whose matrix unit is as wide as two
heads. So a Pallas kernel rotates prompts, and writes heads in their order.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mistral_jax.ops import partition
from mistral_jax.ops.backend import PLAIN, Backend
from mistral_jax.ops.partition import Rules, mesh_axes
from mistral_jax.ops.quantized import einsum

# The most tokens and numbers of a token that the kernel reads at a time.
TOKENS, WIDTH = 512, 1024
LANES = 128
# The kernel's name in compiled programs.
NAME = "rotate_heads"

Angles = tuple[jax.Array, jax.Array]


def rotate_halves(
    x: jax.Array,
    angles: Angles,
    backend: Backend = PLAIN,
    rules: Rules = (),
    axis: str = "heads",
    factor: float = 1.0,
) -> jax.Array:
    """Rotates the pairs of numbers in the two halves of each head.

    Args:
      x: [B, T, heads, H].
      angles: cosine and sine of each pair's angle, each [B, T, H/2] float32.
      backend: the backend that this is traced for.
      rules: mesh axes of the logical axes, by which the kernel is partitioned.
      axis: the logical axis of the heads.
      factor: multiplies the result before it is rounded.

    Returns:
      The rotated `x`, computed in float32 and rounded to its dtype.
    """
    if factor != 1:
        angles = tuple(angle * factor for angle in angles)
    if fits(x, backend, rules, axis):
        return _rotate_heads(x, angles, rules, axis, False)
    cos, sin = (angle[:, :, None] for angle in angles)
    if backend.platform == "tpu" and x.dtype == jnp.bfloat16:
        return _rotate_by_product(x, cos, sin)
    return _rotate(x, cos, sin)


def lay_out(x: jax.Array, backend: Backend, rules: Rules = (), axis: str = "kv_heads") -> jax.Array:
    """Returns `x` [B, T, heads, H] unchanged, laid out in memory as rotated heads are."""
    return _rotate_heads(x, None, rules, axis, False) if fits(x, backend, rules, axis) else x


def fits(x: jax.Array, backend: Backend, rules: Rules, axis: str) -> bool:
    """Tells whether the kernel can take heads [B, T, heads, H]; the arguments are as above."""
    rows, length, heads, head_dim = x.shape
    if "flash" not in backend.kernels or length % LANES or head_dim % LANES:
        return False
    if x.dtype.name not in ("float32", "bfloat16"):
        return False
    if jax.sharding.get_abstract_mesh().empty:
        return backend.alone
    whole = not mesh_axes(rules, "length")
    return whole and partition.divides(rules, {"batch": rows, axis: heads})


def _rotate(x, cos, sin):
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


@jax.custom_vjp
def _rotate_by_product(x, cos, sin):
    """Exchanges the halves by an exact product; a TPU is slow at moving parts of its lanes."""
    width = x.shape[-1]
    exchange = jnp.roll(jnp.eye(width, dtype=x.dtype), width // 2, axis=0)
    other = einsum("...h,hg->...g", x, exchange)
    cos, sin = _whole(cos, sin)
    return (x.astype(jnp.float32) * cos + other * sin).astype(x.dtype)


def _rotate_back(angles, grad):
    # The transpose of a rotation is the rotation by the opposite angle. Angles are constants.
    cos, sin = angles
    return _rotate_by_product(grad, cos, -sin), jnp.zeros_like(cos), jnp.zeros_like(sin)


_rotate_by_product.defvjp(
    lambda x, cos, sin: (_rotate_by_product(x, cos, sin), (cos, sin)), _rotate_back
)


def _whole(cos, sin):
    """Returns the factors of each number and of its partner."""
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _rotate_heads(x, angles, rules, axis, interpret):
    """Rotates heads with the kernel, or only lays them out if there are no angles."""
    run = functools.partial(_run_kernel, interpret=interpret)
    if not jax.sharding.get_abstract_mesh().empty:
        batch, heads = (mesh_axes(rules, name) or None for name in ("batch", axis))
        of = PartitionSpec(batch, None, heads)
        run = jax.shard_map(run, in_specs=(of, PartitionSpec(batch)), out_specs=of, check_vma=False)
    return run(x, () if angles is None else _whole(*angles))


@_rotate_heads.defjvp
def _differentiate(rules, axis, interpret, primals, tangents):
    """Differentiates XLA's operations, for the kernel has no gradient."""
    x, angles = primals
    if angles is None:
        return x, tangents[0]
    rotate = _rotate_by_product if x.dtype == jnp.bfloat16 else _rotate
    cos, sin = (angle[:, :, None] for angle in angles)  # These are constants.
    return jax.jvp(lambda x: rotate(x, cos, sin), (x,), tangents[:1])


def _run_kernel(x, factors, *, interpret):
    # The imports take a tenth of a second, so other backends skip them.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    rows, length, heads, head_dim = x.shape
    size = next(n for n in (TOKENS, 256, LANES) if length % n == 0)
    count = next(n for n in range(max(WIDTH // head_dim, 1), 0, -1) if heads % n == 0)

    def kernel(x, *refs):
        *factors, out = refs
        for head in range(count):
            part = x[:, head * head_dim : (head + 1) * head_dim]
            if factors:
                wide, (cos, sin) = part.astype(jnp.float32), factors
                other = pltpu.roll(wide, head_dim // 2, 1)
                part = wide * cos[...] + other * sin[...]
            out[head] = part.astype(out.dtype)

    # Heads are the grid's last axis: a block of factors is then copied once for all heads.
    moved = pl.pallas_call(
        kernel,
        grid=(rows, length // size, heads // count),
        in_specs=[
            pl.BlockSpec((None, size, count * head_dim), lambda b, i, n: (b, i, n)),
            *[pl.BlockSpec((None, size, head_dim), lambda b, i, n: (b, i, 0))] * len(factors),
        ],
        out_specs=pl.BlockSpec((None, count, size, head_dim), lambda b, i, n: (b, n, i, 0)),
        out_shape=jax.ShapeDtypeStruct((rows, heads, length, head_dim), x.dtype),
        cost_estimate=pl.CostEstimate(
            flops=0,
            transcendentals=0,
            bytes_accessed=2 * x.nbytes + sum(factor.nbytes for factor in factors),
        ),
        name=NAME,
        interpret=interpret,
    )(x.reshape(rows, length, -1), *factors)
    return jnp.swapaxes(moved, 1, 2)
