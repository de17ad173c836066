"""The rules of a sharding file: the logical axes, and checks that rules and mesh fit a model.

A model's arrays are given by name and shape; no device is needed.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mistral_jax.config import ModelConfig

LOGICAL_AXES = (
    *("vocab", "embed", "mlp", "expert", "heads", "kv_heads", "head_dim"),
    *("batch", "length", "residual"),
)
# Activations that the model partitions. A batch may have any size, because it is padded.
ACTIVATIONS = {
    "the residual stream": ("batch", "length", "residual"),
    "the MLP's activations": ("batch", "length", "mlp"),
    "the queries": ("batch", "length", "heads", "head_dim"),
    "the keys and values": ("batch", "length", "kv_heads", "head_dim"),
    "the logits": ("batch", "length", "vocab"),
}

Axes = Mapping[str, Sequence[str]]  # mesh axes of each logical axis
Sizes = Mapping[str, int]  # devices along each mesh axis


def check_rules(
    arrays: Iterable[tuple[str, Sequence[str], Sequence[int]]],
    rules: Axes,
    sizes: Sizes,
    path: Path,
) -> None:
    """Checks that a mesh divides a model's arrays, and that no rules collide in an array.

    Args:
      arrays: name, logical axes and shape of each parameter.
      rules: mesh axes of each logical axis.
      sizes: devices along each mesh axis.
      path: the sharding file, for messages.

    Raises:
      ValueError: a mesh axis does not divide an axis of an array, or two axes of an array map to
        one mesh axis.
    """
    dims = []
    for array, axes, shape in arrays:
        named = [f"{axis} ({size})" for axis, size in zip(axes, shape, strict=True)]
        _check_collisions(array, dict(zip(named, axes, strict=True)), rules, sizes, path)
        dims += [(array, *axis) for axis in zip(axes, shape, strict=True)]
    for array, axes in ACTIVATIONS.items():
        _check_collisions(array, dict(zip(axes, axes, strict=True)), rules, sizes, path)
    # `split_kv_heads` splits a mesh axis that is larger than the number of key-value heads.
    if len(rules.get("kv_heads", ())) == 1:
        dims = [part for part in dims if part[1] != "kv_heads"]

    def divides(axis, size, sizes):
        return size % math.prod(sizes[mesh_axis] for mesh_axis in rules.get(axis, ())) == 0

    for array, axis, size in dims:
        if divides(axis, size, sizes):
            continue
        widest = max(rules[axis], key=sizes.get)
        smaller = [
            n
            for n in range(1, sizes[widest])
            if all(divides(*part[1:], {**sizes, widest: n}) for part in dims)
        ]
        remedy = (
            f"use a {widest} axis of {smaller[-1]} (--mesh {widest}={smaller[-1]}) or "
            if smaller
            else ""
        )
        devices = math.prod(sizes[mesh_axis] for mesh_axis in rules[axis])
        raise ValueError(
            f"{path} maps {axis} ({size}) of {array} to mesh axis "
            f"{' x '.join(map(repr, rules[axis]))} ({devices} devices), which does not divide it: "
            f"{remedy}leave {axis} unsharded"
        )


def _check_collisions(
    array: str, axes: Mapping[str, str], rules: Axes, sizes: Sizes, path: Path
) -> None:
    """Raises a ValueError if two axes of an array map to one mesh axis.

    Args:
      array: name of the array.
      axes: logical axis for each name of an axis in messages.
      rules: mesh axes of each logical axis.
      sizes: devices along each mesh axis.
      path: the sharding file, for messages.
    """
    taken: dict[str, str] = {}
    for name, axis in axes.items():
        for mesh_axis in rules.get(axis, ()):
            if mesh_axis in taken:
                raise ValueError(
                    f"{path} maps both {taken[mesh_axis]} and {name} of {array} to mesh axis "
                    f"{mesh_axis!r} ({sizes[mesh_axis]} devices), which can partition only one "
                    "axis of an array: leave one of them unsharded, or give it a mesh axis of its "
                    "own"
                )
            taken[mesh_axis] = name


def split_kv_heads(config: ModelConfig, rules: Axes, sizes: Sizes) -> tuple[Axes, Sizes]:
    """Splits the mesh axis of kv_heads into two if it is larger than the number of these heads.

    Of t devices, gcd(t, K) hold different key-value heads. The query heads of a key-value head
    are partitioned over the other new axis.
    """
    if len(rules.get("kv_heads", ())) != 1:
        return rules, sizes
    (axis,) = rules["kv_heads"]
    shared = math.gcd(sizes[axis], config.num_kv_heads)
    if shared == sizes[axis]:
        return rules, sizes
    parts = {f"{axis}_kv": shared, f"{axis}_group": sizes[axis] // shared}

    def split(mesh_axes):
        return tuple(part for name in mesh_axes for part in (parts if name == axis else (name,)))

    rules = {logical: split(mesh_axes) for logical, mesh_axes in rules.items()}
    rules["kv_heads"] = (f"{axis}_kv",)
    return rules, {name: parts.get(name, sizes.get(name)) for name in split(sizes)}
