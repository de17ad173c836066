"""Rules from the logical axes of arrays to the axes of a mesh, as the model asks them.

It reads no layout and makes no sharding: see `rules.py` and `sharding.py`.
"""

import math

import jax

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]


def mesh_axes(rules: Rules, axis: str) -> tuple[str, ...]:
    """Returns the mesh axes that a logical axis lies on; none if it is not split."""
    to = dict(rules).get(axis) or ()
    return (to,) if isinstance(to, str) else tuple(to)


def length_parts(rules: Rules) -> int:
    """Returns in how many parts the devices of the mesh in use hold the length of a text."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = () if mesh.empty else mesh_axes(rules, "length")
    return math.prod(mesh.shape[axis] for axis in axes)
