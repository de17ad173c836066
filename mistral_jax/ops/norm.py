"""Root mean square normalisation: a Pallas kernel for prompts on a TPU, else XLA's operations.

XLA's TPU backend reads the activations twice, for the mean and for the product, and both passes
take longer than their memory traffic. The kernel holds a block of rows, and reads each number once.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mistral_jax.ops import partition
from mistral_jax.ops.backend import PLAIN, Backend
from mistral_jax.ops.partition import Rules, mesh_axes

# Rows of activations that the kernel copies at a time, and that it normalises at a time.
ROWS, PART = 128, 16
LANES = 128
# Bytes of the chip's vector memory that the kernel may use.
MEMORY = 64 * 2**20
# The kernel's name in compiled programs.
NAME = "normalize_rows"


def normalize(
    x: jax.Array,
    scale: jax.Array,
    eps: float,
    dtype: jnp.dtype,
    backend: Backend = PLAIN,
    rules: Rules = (),
) -> jax.Array:
    """Divides each row of `x` by its root mean square, and multiplies by `scale`.

    The mean is computed in float32, and the scale is applied after the cast to `dtype`.

    Args:
      x: [B, T, D].
      scale: [D].
      eps: added to the mean of squares.
      dtype: dtype of the result.
      backend: the backend that this is traced for.
      rules: mesh axes of the logical axes, by which the kernel is partitioned.
    """
    if fits(x, rules, backend):
        return _normalize_rows(x, scale.astype(dtype), eps, rules, False)
    return _normalize(x, scale, eps, dtype)


def fits(x: jax.Array, rules: Rules, backend: Backend) -> bool:
    """Tells whether the kernel can take activations [B, T, D]; each device must hold whole rows."""
    rows, length, width = x.shape
    if "flash" not in backend.kernels or length % ROWS or width % LANES:
        return False
    if x.dtype.name not in ("float32", "bfloat16"):
        return False
    if jax.sharding.get_abstract_mesh().empty:
        return backend.alone
    whole = not (mesh_axes(rules, "length") or mesh_axes(rules, "residual"))
    return whole and partition.divides(rules, {"batch": rows})


def _normalize(x, scale, eps, dtype):
    wide = x.astype(jnp.float32)
    normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return normal.astype(dtype) * scale.astype(dtype)[None, None]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _normalize_rows(x, scale, eps, rules, interpret):
    run = functools.partial(_run_kernel, eps=eps, interpret=interpret)
    if not jax.sharding.get_abstract_mesh().empty:
        rows = PartitionSpec(mesh_axes(rules, "batch") or None)
        run = jax.shard_map(run, in_specs=(rows, PartitionSpec()), out_specs=rows, check_vma=False)
    return run(x, scale)


@_normalize_rows.defjvp
def _differentiate(eps, rules, interpret, primals, tangents):
    """Differentiates XLA's operations, into which XLA fuses parts of the gradient."""
    return jax.jvp(lambda x, scale: _normalize(x, scale, eps, scale.dtype), primals, tangents)


def _run_kernel(x, scale, *, eps, interpret):
    # The imports take a tenth of a second, so other backends skip them.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    rows, length, width = x.shape

    def kernel(x, scale, out):
        factors = scale[...]

        @functools.partial(jax.lax.fori_loop, 0, ROWS // PART, init_val=None)
        def _(i, _):
            part = pl.ds(pl.multiple_of(i * PART, PART), PART)
            wide = x[part].astype(jnp.float32)
            mean = jnp.sum(wide * wide, axis=1, keepdims=True) / width
            normal = x[part].astype(jnp.float32) * jax.lax.rsqrt(mean + eps)
            out[part] = normal.astype(out.dtype) * factors

    block = pl.BlockSpec((None, ROWS, width), lambda b, i: (b, i, 0))
    return pl.pallas_call(
        kernel,
        grid=(rows, length // ROWS),
        in_specs=[block, pl.BlockSpec((1, width), lambda b, i: (0, 0))],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x.shape, scale.dtype),
        cost_estimate=pl.CostEstimate(
            flops=0,
            transcendentals=0,
            bytes_accessed=x.nbytes + x.size * scale.dtype.itemsize,
        ),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=MEMORY),
        name=NAME,
        interpret=interpret,
    )(x, scale[None])
