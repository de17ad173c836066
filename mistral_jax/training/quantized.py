"""Kernels in 8 or 4 bits in place of float ones, for adapters beside them. It trains nothing.

Those of all layers' projections; embedding, norms and output stay as they are.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from mistral_jax.model.quantized import QuantizedKernel
from mistral_jax.training.lora import PROJECTIONS, split_axes

Params = Mapping[str, Any]

KINDS = ("int8", "nf4")

# Values that share a scale in nf4, at most: the paper's block.
_BLOCK = 64


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
