"""Quantise the matrices of a model to 8 or 4 bits, to run it or train adapters in less memory.

`ops/quantized.py` defines a quantised matrix and its products. On disk it is two arrays, `values`
and `scale`, in the place of the matrix.
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

# The most values that share a scale in nf4: the block of the QLoRA paper (arXiv 2305.14314).
_BLOCK = 64


def check(kind: str | None) -> None:
    """Checks a kind of quantisation that checkpoints are loaded or stored in.

    Raises:
      ValueError: `kind` is neither None nor "int8".
    """
    if kind not in (None, "int8"):
        raise ValueError(f"quantize is {kind!r}; expected None or 'int8'")


def matrices(params: Params, output: bool = False) -> dict[Path, int]:
    """Returns the matrices that are quantised by default, with their numbers of output axes.

    Args:
      params: the model's parameters, with one entry for each layer, or a tree of this structure.
      output: whether to include the output matrix, which is the embedding if embeddings are tied;
        else only the projections of layers are returned.
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
      params: the model's parameters, with one entry for each layer. They are consumed: each matrix
        is deleted as soon as it is quantised.
      kind: "int8", with a scale for each output; or "nf4", with a scale for each 64 neighbouring
        values (or the largest smaller number that divides the last axis), 4.5 bits a value.
      which: the matrices to quantise, as `matrices` returns them; None = the projections of all
        layers.

    Raises:
      ValueError: `kind` is unknown, a matrix is quantised already, or "nf4" is requested and qwix,
        which computes it, is not installed.
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
    """Returns a matrix's sharding for its values or scale, without axes that it cannot divide."""
    sizes, axes = sharding.mesh.shape, []
    for axis, size in zip(sharding.spec, array.shape, strict=False):
        names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
        parts = math.prod(sizes[name] for name in names)
        axes.append(None if size % parts else axis)
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))


def abstract(shapes: Params, which: Mapping[Path, int]) -> dict[str, Any]:
    """Describes parameters after int8 quantisation, from their shapes and shardings before it."""

    def small(matrix, outputs):
        ones = (1 for _ in matrix.shape[outputs:])
        scale = matrix.update(shape=(*matrix.shape[:outputs], *ones), dtype=jnp.float32)
        if isinstance(matrix.sharding, NamedSharding):
            scale = scale.update(sharding=_fit(matrix.sharding, scale))
        return QuantizedMatrix(matrix.update(dtype=jnp.int8), scale)

    flat = flatten_dict(shapes)
    return unflatten_dict(flat | {path: small(flat[path], n) for path, n in which.items()})


def split(params: Params) -> dict[str, Any]:
    """Replaces each quantised matrix by a dict of its arrays, which is its form on disk."""
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
