"""Kernels in 8 or 4 bits in place of float ones: to run a model in less memory, or to train beside.

What a quantised matrix is, and how it multiplies, is in `ops/quantized.py`. On disk it is two
arrays, `values` and `scale`, where else the matrix would be.
"""

import functools
import importlib.util
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from mistral_jax.checkpoint.lora import HEAD, PROJECTIONS
from mistral_jax.model.layers import MATRICES
from mistral_jax.ops.quantized import QuantizedMatrix, to_int8

Params = Mapping[str, Any]
Path = tuple[str, ...]

KINDS = ("int8", "nf4")

# Values that share a scale in nf4, at most: the paper's block.
_BLOCK = 64


def check(kind: str | None) -> None:
    """Refuses what no checkpoint is loaded or stored as.

    Raises:
      ValueError: `kind` is neither None nor "int8".
    """
    if kind not in (None, "int8"):
        raise ValueError(f"quantize is {kind!r}; expected None or 'int8'")


def matrices(params: Params, output: bool = False) -> dict[Path, int]:
    """Returns which matrices are quantised as a rule, each with the number of its output axes.

    Args:
      params: the model's parameters, with one entry a layer, or a tree like them.
      output: whether the output's is one of them, or the embedding, where that is the output, too;
        else only the projections of layers are.
    """
    names = {*PROJECTIONS, HEAD if HEAD in params else "embed"} if output else {*PROJECTIONS}
    return {
        path: len(MATRICES[path[-2]].divide(array.shape)[0])
        for path, array in flatten_dict(params).items()
        if path[-1] in ("kernel", "embedding") and path[-2] in names
    }


def quantize(params: Params, kind: str, which: Mapping[Path, int] | None = None) -> dict[str, Any]:
    """Quantises matrices, one after another.

    Args:
      params: the model's parameters, with one entry a layer. They are consumed: the memory of each
        matrix is given back as soon as there is its small copy.
      kind: "int8", with a scale for each output; or "nf4", with one for 64 values next to each
        other (or the largest divisor of the last axis below), which takes 4.5 bits a value.
      which: as `matrices` returns them; None = those of all layers' projections.

    Raises:
      ValueError: `kind` is another, or qwix is not installed, which makes "nf4".
    """
    if kind not in KINDS:
        raise ValueError(f"quantize is {kind!r}; expected {' or '.join(KINDS)}")
    if kind == "nf4" and importlib.util.find_spec("qwix") is None:
        raise ValueError("nf4 is made by qwix: pip install 'mistral-jax-flax[qlora]'")
    flat = flatten_dict(params)
    for path, outputs in (matrices(params) if which is None else which).items():
        if path in flat:
            matrix = flat[path]
            if isinstance(matrix, QuantizedMatrix):
                raise ValueError(f"{'/'.join(path)} is quantised already: leave quantize out")
            made = _quantize(matrix, kind, outputs, matrix.sharding)
            flat[path] = jax.block_until_ready(made)
            matrix.delete()
    return unflatten_dict(flat)


@functools.partial(jax.jit, static_argnames=("kind", "outputs", "sharding"))
def _quantize(matrix, kind, outputs, sharding):
    wide = matrix.astype(jnp.float32)
    made = _nf4(wide) if kind == "nf4" else QuantizedMatrix(*to_int8(wide, outputs, jnp))
    if not isinstance(sharding, NamedSharding):
        return made
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, _fit(sharding, x)), made)


def _nf4(matrix):
    import qwix

    last = matrix.ndim - 1
    block = max(n for n in range(1, _BLOCK + 1) if matrix.shape[-1] % n == 0)
    tiles = {"channelwise_axes": range(last), "tiled_axes": {last: block}}
    made = qwix.quantize(matrix, qtype="nf4", **tiles)
    return QuantizedMatrix(made.qvalue, made.scale)


def _fit(sharding: NamedSharding, array: jax.Array) -> NamedSharding:
    """Returns a matrix's sharding for its values or scale: whole along axes that it can't split."""
    sizes, axes = sharding.mesh.shape, []
    for axis, size in zip(sharding.spec, array.shape, strict=False):
        names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
        parts = math.prod(sizes[name] for name in names)
        axes.append(None if size % parts else axis)
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))


def abstract(shapes: Params, which: Mapping[Path, int]) -> dict[str, Any]:
    """Returns what shapes and shardings of parameters become where matrices are in int8."""

    def small(matrix, outputs):
        ones = (1 for _ in matrix.shape[outputs:])
        scale = matrix.update(shape=(*matrix.shape[:outputs], *ones), dtype=jnp.float32)
        if isinstance(matrix.sharding, NamedSharding):
            scale = scale.update(sharding=_fit(matrix.sharding, scale))
        return QuantizedMatrix(matrix.update(dtype=jnp.int8), scale)

    flat = flatten_dict(shapes)
    return unflatten_dict(flat | {path: small(flat[path], n) for path, n in which.items()})


def split(params: Params) -> dict[str, Any]:
    """Returns a tree in which each quantised matrix is a dict of its arrays, as on disk."""
    return jax.tree.map(
        lambda x: {"values": x.values, "scale": x.scale} if isinstance(x, QuantizedMatrix) else x,
        params,
        is_leaf=lambda x: isinstance(x, QuantizedMatrix),
    )


def join(params: Params) -> dict[str, Any]:
    """Undoes `split`."""
    flat = flatten_dict(params)
    for path in {path[:-1] for path in flat if path[-1] == "values"}:
        flat[path] = QuantizedMatrix(*(flat.pop((*path, name)) for name in ("values", "scale")))
    return unflatten_dict(flat)
