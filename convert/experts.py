"""Separates tensors that hold the matrices of all experts of a layer, as in some files."""

import re
from collections.abc import Iterator, Mapping

import numpy as np

from mistral_jax.config import ModelConfig

from .source import Tensor

# Official files of the first Mixtral 8x7B: [E * F, D], also of w2, which is transposed.
_FIRST = re.compile(r"(layers\.\d+)\.block_sparse_moe\.(w[123])")
_FIRST_ROUTER = re.compile(r"(layers\.\d+)\.block_sparse_moe\.gate\.weight")
# The names that Transformers 5 gives the parameters in memory: [E, 2F, D], w1 first, and [E, D, F].
_FUSED = re.compile(r"(model\.layers\.\d+)\.mlp\.experts\.(gate_up_proj|down_proj)")
_FUSED_ROUTER = re.compile(r"(model\.layers\.\d+)\.mlp\.gate\.weight")


def separate(tensors: Mapping[str, list[Tensor]], config: ModelConfig) -> dict[str, list[Tensor]]:
    """Returns the tensors with one for each expert, under the names of later files.

    They are views: nothing is read.

    Args:
      tensors: the tensors of a source by name.
      config: the model.

    Raises:
      ValueError: a tensor of experts has the wrong shape.
    """
    if not config.num_experts:
        return dict(tensors)
    found: dict[str, list[Tensor]] = {}
    for name, places in tensors.items():
        for new, views in _renamed(name, places, config):
            if new in found or (new != name and new in tensors):
                raise ValueError(
                    f"tensor {new} is in {places[0].file} twice, once as a part of {name}; "
                    "expected one of the two"
                )
            found[new] = views
    return found


def _renamed(
    name: str, places: list[Tensor], config: ModelConfig
) -> Iterator[tuple[str, list[Tensor]]]:
    """Yields the tensors that one tensor of a file stands for."""
    count, inner, width = config.num_experts, config.mlp_dim, config.embed_dim
    if found := _FIRST_ROUTER.fullmatch(name):
        yield f"{found[1]}.feed_forward.gate.weight", places
    elif found := _FUSED_ROUTER.fullmatch(name):
        yield f"{found[1]}.block_sparse_moe.gate.weight", places
    elif found := _FIRST.fullmatch(name):
        array = _one(name, places, (count * inner, width)).reshape(count, inner, width)
        array = array.swapaxes(1, 2) if found[2] == "w2" else array
        yield from _each(f"{found[1]}.feed_forward", found[2], array, places)
    elif found := _FUSED.fullmatch(name):
        module = f"{found[1]}.block_sparse_moe"
        if found[2] == "down_proj":
            yield from _each(module, "w2", _one(name, places, (count, width, inner)), places)
        else:
            array = _one(name, places, (count, 2 * inner, width))
            yield from _each(module, "w1", array[:, :inner], places)
            yield from _each(module, "w3", array[:, inner:], places)
    else:
        yield name, places


def _one(name: str, places: list[Tensor], shape: tuple[int, ...]) -> np.ndarray:
    """Returns the array of a tensor that must be whole, in one file."""
    if len(places) > 1:
        raise ValueError(
            f"tensor {name} is in {len(places)} files, {places[0].file} among them; expected one"
        )
    file, array = places[0].file, places[0].array
    if array.shape != shape:
        raise ValueError(f"tensor {name} in {file} is {array.shape}; expected {shape}")
    return array


def _each(
    module: str, matrix: str, array: np.ndarray, places: list[Tensor]
) -> Iterator[tuple[str, list[Tensor]]]:
    for i, one in enumerate(array):
        yield f"{module}.experts.{i}.{matrix}.weight", [places[0]._replace(array=one)]
