"""LoRA: low-rank adapters of projections, as a tree of their own (arXiv 2106.09685).

It makes them, lays them beside the matrices that they adapt, and merges them into these. It reads
and writes no files (see `adapters.py`), and trains nothing.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from mistral_jax.base.fields import check, integer, number
from mistral_jax.model.layers import MATRICES

Params = Mapping[str, Any]

HEAD = "lm_head"
# Those of every layer.
PROJECTIONS = tuple(name for name in MATRICES if name not in ("embed", HEAD))


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which adapters a model gets.

    Attributes:
      rank: inner width of each (R).
      alpha: their product is scaled by alpha / R.
      rslora: whether it is by alpha / sqrt(R), which lets high ranks learn (rsLoRA, arXiv
        2312.03732).
      dropout: share of an adapter's inputs that training drops.
      targets: names of the projections that get one, in every layer; "lm_head" may be among them.
    """

    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    dropout: float = 0.0
    targets: tuple[str, ...] = PROJECTIONS

    def __post_init__(self):
        check(self, "lora.", {"rank": integer(1, 1 << 16), "alpha": number(0, 1e6)})
        known = (*PROJECTIONS, HEAD)
        if unknown := [name for name in self.targets if name not in known]:
            raise ValueError(
                f"lora.targets has {unknown[0]!r}; expected some of {', '.join(known)}"
            )
        if not self.targets:
            raise ValueError("lora.targets is empty; name at least one projection")
        if self.dropout >= 1:
            raise ValueError(f"lora.dropout is {self.dropout}; expected less than 1")
        if not self.alpha:
            raise ValueError(f"lora.alpha is {self.alpha}; expected more than 0")

    @property
    def scale(self) -> float:
        """What the product of an adapter's two matrices is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def init_adapters(lora: Lora, params: Params, key: jax.Array) -> Params:
    """Makes adapters that change nothing yet.

    Args:
      lora: which.
      params: the model's parameters, or their shapes.
      key: of the random numbers.

    Returns:
      A tree like `params` with the adapted projections alone, float32: `lora_a` [R, inputs],
      uniform within 1 / sqrt(inputs) as PEFT has it, and `lora_b` [outputs, R], zero.

    Raises:
      ValueError: the model has no such projection.
    """
    matrices = {
        path[:-1]: matrix
        for path, matrix in flatten_dict(params).items()
        if path[-1] == "kernel" and path[-2] in lora.targets
    }
    if missing := set(lora.targets) - {path[-1] for path in matrices}:
        raise ValueError(f"the model has no projection {min(missing)!r} to adapt")
    adapters = {}
    for i, (path, matrix) in enumerate(sorted(matrices.items())):
        outputs, inputs = MATRICES[path[-1]].divide(matrix.shape)
        bound = 1 / math.sqrt(math.prod(inputs))
        shape = (lora.rank, *inputs)
        a = jax.random.uniform(jax.random.fold_in(key, i), shape, jnp.float32, -bound, bound)
        adapters[path] = {"lora_a": a, "lora_b": jnp.zeros((*outputs, lora.rank), jnp.float32)}
    return unflatten_dict(adapters)


def attach(params: Params, adapters: Params, scale: float = 1.0) -> Params:
    """Lays adapters beside the matrices, where the model adds their product to the matrix's.

    Args:
      params: the model's parameters; they are not changed.
      adapters: as `init_adapters` makes them.
      scale: what `lora_b` is multiplied by: `Lora.scale`.
    """
    flat = flatten_dict(params)
    for path, array in flatten_dict(adapters).items():
        if (*path[:-1], "kernel") not in flat:
            raise ValueError(f"an adapter is for {'/'.join(path[:-1])}, which the model has not")
        flat[path] = array * scale if path[-1] == "lora_b" else array
    return unflatten_dict(flat)


def merge(params: Params, adapters: Params, scale: float = 1.0) -> Params:
    """Adds the product of each adapter to its matrix, in float32, and rounds to its dtype.

    Args are those of `attach`.

    Raises:
      ValueError: as `attach` does; or a matrix is quantised.
    """
    flat = flatten_dict(attach(params, adapters, scale))
    merged = {path: array for path, array in flat.items() if not path[-1].startswith("lora_")}
    for path in {path[:-1] for path in flatten_dict(adapters)}:
        place = (*path, "kernel")
        if hasattr(flat[place], "dequantize"):
            raise ValueError(
                f"{'/'.join(path)} is quantised, and takes no product; merge the adapters into the "
                "model as it was before"
            )
        merged[place] = _merged(flat[place], flat[*path, "lora_a"], flat[*path, "lora_b"])
    return unflatten_dict(merged)


def apply(params: Params, lora: Lora, adapters: Params, merged: bool = False) -> Params:
    """Puts adapters from host memory to use, on the devices of their matrices and split as these.

    Args:
      params: the model's parameters; with `merged` they are consumed.
      lora: what the adapters are.
      adapters: the tree of them, of NumPy arrays.
      merged: whether their products are added to the matrices; else they lie beside these, in the
        same dtype.
    """
    matrices, placed = flatten_dict(params), {}
    places = flatten_dict(adapter_shardings(params, adapters))
    for path, array in flatten_dict(adapters).items():
        array = array * lora.scale if path[-1] == "lora_b" else array
        array = array if merged else array.astype(matrices[*path[:-1], "kernel"].dtype)
        placed[path] = jax.make_array_from_callback(array.shape, places[path], array.__getitem__)
    placed = unflatten_dict(placed)
    if not merged:
        return attach(params, placed)
    result = dict(params)
    for name, part in placed.items():  # A layer at a time: no second model in memory.
        result |= merge({name: params[name]}, {name: part})
        jax.tree.map(lambda old, new: old is new or old.delete(), params[name], result[name])
    return result


def adapter_shardings(params: Params, adapters: Params) -> Params:
    """Returns where adapters lie: split as the axes of their matrices are, and whole along R.

    Args:
      params: the model's parameters.
      adapters: their adapters, or the shapes of these.
    """
    matrices = flatten_dict(params)
    found = {}
    for path in flatten_dict(adapters):
        matrix = matrices[*path[:-1], "kernel"]
        if not isinstance(matrix.sharding, NamedSharding):  # On one device.
            found[path] = matrix.sharding
            continue
        spec = [*matrix.sharding.spec, *[None] * (matrix.ndim - len(matrix.sharding.spec))]
        outputs, inputs = MATRICES[path[-2]].divide(tuple(spec))
        axes = (None, *inputs) if path[-1] == "lora_a" else (*outputs, None)
        found[path] = NamedSharding(matrix.sharding.mesh, PartitionSpec(*axes))
    return unflatten_dict(found)


@jax.jit
def _merged(matrix, a, b):
    a, b = (x.astype(jnp.float32) for x in (a, b))
    product = jnp.tensordot(b, a, axes=1, precision=jax.lax.Precision.HIGHEST)
    return (matrix.astype(jnp.float32) + product).astype(matrix.dtype)
