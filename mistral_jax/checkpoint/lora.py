"""LoRA: low-rank adapters of projections, in a tree of their own (arXiv 2106.09685).

Adapters are made here, attached to the parameters, and merged into them. `adapters.py` reads and
writes their files.
"""

import dataclasses
import functools
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

HEAD, ROUTER = "lm_head", "router"
# The projections of every layer, or of each expert in a layer.
PROJECTIONS = tuple(name for name in MATRICES if name not in ("embed", ROUTER, HEAD))


@dataclasses.dataclass(frozen=True)
class Lora:
    """Describes the adapters of a model.

    Attributes:
      rank: inner width of each adapter (R).
      alpha: adapters are scaled by alpha / R.
      rslora: whether to scale by alpha / sqrt(R) instead, which lets high ranks learn (rsLoRA,
        arXiv 2312.03732).
      dropout: dropout rate of the adapters' inputs in training.
      targets: names of the adapted projections, in every layer, and of all experts; "lm_head" and,
        in a mixture of experts, "router" may be among them.
    """

    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    dropout: float = 0.0
    targets: tuple[str, ...] = PROJECTIONS

    def __post_init__(self):
        check(self, "lora.", {"rank": integer(1, 1 << 16), "alpha": number(0, 1e6)})
        known = (*PROJECTIONS, ROUTER, HEAD)
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
        """The factor of the product of an adapter's two matrices."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def init_adapters(lora: Lora, params: Params, key: jax.Array) -> Params:
    """Initialises adapters, which change nothing until they are trained.

    Args:
      lora: the adapters to make.
      params: the model's parameters, or their shapes.
      key: the random key.

    Returns:
      A tree like `params` with only the adapted projections, float32: `lora_a` [R, inputs], uniform
      within 1 / sqrt(inputs) as in PEFT, and `lora_b` [outputs, R], zeros. Those of experts have an
      axis E in front.

    Raises:
      ValueError: the model has no projection of a target's name.
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
        axes = MATRICES[path[-1]]
        outputs, inputs = axes.divide(matrix.shape)
        bound = 1 / math.sqrt(math.prod(inputs))
        shape = (*axes.stack(matrix.shape), lora.rank, *inputs)
        a = jax.random.uniform(jax.random.fold_in(key, i), shape, jnp.float32, -bound, bound)
        adapters[path] = {"lora_a": a, "lora_b": jnp.zeros((*outputs, lora.rank), jnp.float32)}
    return unflatten_dict(adapters)


def attach(params: Params, adapters: Params, scale: float = 1.0) -> Params:
    """Returns the parameters with adapters beside the matrices, where the model finds them.

    Args:
      params: the model's parameters, which are not changed.
      adapters: a tree as `init_adapters` makes it.
      scale: the factor of `lora_b`, `Lora.scale`.

    Raises:
      ValueError: an adapter is for a projection that the model does not have.
    """
    flat = flatten_dict(params)
    for path, array in flatten_dict(adapters).items():
        if (*path[:-1], "kernel") not in flat:
            raise ValueError(
                f"an adapter is for {'/'.join(path[:-1])}, which the model does not have"
            )
        flat[path] = array * scale if path[-1] == "lora_b" else array
    return unflatten_dict(flat)


def merge(params: Params, adapters: Params, scale: float = 1.0) -> Params:
    """Returns the parameters with the product of each adapter added to its matrix.

    The sum is computed in float32 and rounded to the dtype of the matrix.

    Args:
      params: the model's parameters, which are not changed.
      adapters: a tree as `init_adapters` makes it.
      scale: the factor of `lora_b`, `Lora.scale`.

    Raises:
      ValueError: an adapter is for a projection that the model does not have, or a matrix is
        quantised.
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
        stack = len(MATRICES[path[-1]].stack(flat[place].shape))
        arrays = (flat[*path, name] for name in ("kernel", "lora_a", "lora_b"))
        merged[place] = _merged(stack, *arrays)
    return unflatten_dict(merged)


def apply(params: Params, lora: Lora, adapters: Params, merged: bool = False) -> Params:
    """Attaches or merges adapters from host memory, on the devices of their matrices.

    The adapters are partitioned as their matrices are.

    Args:
      params: the model's parameters; with `merged` they are consumed.
      lora: the adapters' description.
      adapters: the tree of adapters, in NumPy arrays.
      merged: whether to merge the adapters; else they are attached, in the dtype of their matrices.
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
    for name, part in placed.items():  # One layer at a time, to hold one model in memory.
        result |= merge({name: params[name]}, {name: part})
        jax.tree.map(lambda old, new: old is new or old.delete(), params[name], result[name])
    return result


def adapter_shardings(params: Params, adapters: Params) -> Params:
    """Returns the shardings of adapters: partitioned like their matrices, and whole along R.

    Args:
      params: the model's parameters.
      adapters: the adapters, or their shapes.
    """
    matrices = flatten_dict(params)
    found = {}
    for path in flatten_dict(adapters):
        matrix = matrices[*path[:-1], "kernel"]
        if not isinstance(matrix.sharding, NamedSharding):  # On one device.
            found[path] = matrix.sharding
            continue
        spec = [*matrix.sharding.spec, *[None] * (matrix.ndim - len(matrix.sharding.spec))]
        declared = MATRICES[path[-2]]
        outputs, inputs = declared.divide(tuple(spec))
        inner = (*declared.stack(tuple(spec)), None, *inputs)
        axes = inner if path[-1] == "lora_a" else (*outputs, None)
        found[path] = NamedSharding(matrix.sharding.mesh, PartitionSpec(*axes))
    return unflatten_dict(found)


@functools.partial(jax.jit, static_argnums=0)
def _merged(stack, matrix, a, b):
    a, b = (x.astype(jnp.float32) for x in (a, b))

    def multiply(b, a):
        return jnp.tensordot(b, a, axes=1, precision=jax.lax.Precision.HIGHEST)

    for _ in range(stack):
        multiply = jax.vmap(multiply)
    product = multiply(b, a)
    return (matrix.astype(jnp.float32) + product).astype(matrix.dtype)
