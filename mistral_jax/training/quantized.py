"""`QuantizedKernel`: a frozen kernel in 8 or 4 bits, for adapters beside it. It trains nothing.

The kernels of all layers' projections are replaced by such; embedding, norms and output stay as
they are. `Projection` asks for `dequantize`, and everything else sees the shape of a kernel.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from mistral_jax.training.lora import PROJECTIONS, split_axes

Params = Mapping[str, Any]

KINDS = ("int8", "nf4")

# Values that share a scale in nf4, at most: the paper's block.
_BLOCK = 64

# Quantiles of a normal distribution, with an exact zero (arXiv 2305.14314, appendix E).
NF4_LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


@flax.struct.dataclass
class QuantizedKernel:
    """A kernel as small numbers and what to multiply them by.

    Attributes:
      values: whole numbers (int8), or places in `NF4_LEVELS` (uint4), of the kernel's shape.
      scale: float32, with as many axes; each of its entries is for as many values next to each
        other along an axis as that is shorter.
    """

    values: jax.Array  # First: Flax compares the first leaf with the kernel's shape.
    scale: jax.Array

    def dequantize(self, dtype: jnp.dtype) -> jax.Array:
        """Returns the kernel, computed in float32 and rounded to `dtype`."""
        # Not by qwix, which flattens an array first: one that is split it gathers.
        if self.values.dtype == jnp.uint4:
            wide = jnp.asarray(NF4_LEVELS)[self.values.astype(jnp.int32)]
        else:
            wide = self.values.astype(jnp.float32)
        wide = wide.reshape(*self.shape[:-1], self.scale.shape[-1], -1) * self.scale[..., None]
        return wide.reshape(self.shape).astype(dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """The number of the kernel's axes."""
        return self.values.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """What the kernel is computed in."""
        return self.scale.dtype

    @property
    def sharding(self) -> jax.sharding.Sharding:
        """Where the kernel lies."""
        return self.values.sharding


def quantize(params: Params, kind: str) -> dict[str, Any]:
    """Quantises the kernels of all layers' projections, one after another.

    Args:
      params: the model's parameters, with one entry a layer. They are consumed: the memory of each
        kernel is given back as soon as there is its small copy.
      kind: "int8", with a scale for each output; or "nf4", with one for 64 values next to each
        other (or the largest divisor of the last axis below), which takes 4.5 bits a value.

    Raises:
      ValueError: `kind` is another, or qwix is not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"quantize is {kind!r}; expected {' or '.join(KINDS)}")
    try:
        import qwix  # noqa: F401
    except ImportError:
        raise ValueError(
            "kernels are quantised by qwix: pip install 'mistral-jax-flax[qlora]'"
        ) from None
    flat = flatten_dict(params)
    for path, kernel in flat.items():
        if path[-1] == "kernel" and path[-2] in PROJECTIONS:
            flat[path] = jax.block_until_ready(
                _quantize(kernel, kind, len(split_axes(path[-2], kernel.shape)[0]), kernel.sharding)
            )
            kernel.delete()
    return unflatten_dict(flat)


@functools.partial(jax.jit, static_argnames=("kind", "outputs", "sharding"))
def _quantize(kernel, kind, outputs, sharding):
    import qwix

    last = kernel.ndim - 1
    if kind == "nf4":
        block = max(n for n in range(1, _BLOCK + 1) if kernel.shape[-1] % n == 0)
        how = {"qtype": "nf4", "channelwise_axes": range(last), "tiled_axes": {last: block}}
    else:
        how = {"qtype": jnp.int8, "channelwise_axes": range(outputs)}
    made = qwix.quantize(kernel.astype(jnp.float32), **how)
    made = QuantizedKernel(made.qvalue, made.scale)
    if not isinstance(sharding, NamedSharding):
        return made
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, _fit(sharding, x)), made)


def _fit(sharding: NamedSharding, array: jax.Array) -> NamedSharding:
    """Returns a kernel's sharding for its values or scale: whole along axes that it can't split."""
    sizes, axes = sharding.mesh.shape, []
    for axis, size in zip(sharding.spec, array.shape, strict=False):
        names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
        parts = math.prod(sizes[name] for name in names)
        axes.append(None if size % parts else axis)
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))
