"""Partitioning by hand, for operations that XLA cannot partition, or does not partition well.

Each device of the mesh runs the operation on its own rows and heads.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]


def mesh_axes(rules: Rules, axis: str) -> tuple[str, ...]:
    """Returns the mesh axes that partition a logical axis; an empty tuple if none does."""
    to = dict(rules).get(axis) or ()
    return (to,) if isinstance(to, str) else tuple(to)


def length_parts(rules: Rules) -> int:
    """Returns the number of parts into which the current mesh partitions the axis "length"."""
    no_mesh = jax.sharding.get_abstract_mesh().empty
    return 1 if no_mesh else _parts(mesh_axes(rules, "length"))


def fits(q: jax.Array, k: jax.Array, rules: Rules, by_heads: bool = False) -> bool:
    """Tells whether the rules give each device of the current mesh the keys of its queries.

    Args:
      q: queries, [B, T, N, H].
      k: keys, [B, S, K, H], or [B, K, S, H] by heads.
      rules: mesh axes of the logical axes.
      by_heads: whether keys are by heads.
    """
    count = k.shape[1 if by_heads else 2]
    sizes = {"batch": q.shape[0], "heads": q.shape[2], "kv_heads": count}
    if not divides(rules, sizes):
        return False
    heads, kv_heads = (mesh_axes(rules, axis) for axis in ("heads", "kv_heads"))
    shared, rest = heads[: len(kv_heads)], heads[len(kv_heads) :]
    # Several devices may hold query heads of one key-value head, but then each device may have only
    # one key-value head.
    return shared == kv_heads and (_parts(rest) == 1 or count == _parts(kv_heads))


def divides(rules: Rules, sizes: Mapping[str, int]) -> bool:
    """Tells whether the rules divide axes evenly over devices of the current mesh.

    Args:
      rules: mesh axes of the logical axes.
      sizes: sizes of the logical axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = {axis: mesh_axes(rules, axis) for axis in sizes}
    return (
        bool(rules)
        and set().union(*axes.values()) <= set(mesh.axis_names)
        and all(kind == AxisType.Auto for kind in mesh.axis_types)
        and all(size % _parts(axes[axis]) == 0 for axis, size in sizes.items())
    )


def _parts(axes):
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes)


def by_device(
    attend: Callable[..., jax.Array], rules: Rules, of_rows: int, by_heads: bool = False
) -> Callable:
    """Makes each device of the current mesh attend by itself; without a mesh, changes nothing.

    Args:
      attend: a function of queries, keys and values for which `fits` is True, and of `of_rows` more
        arrays [B, ...]. It returns an array of the shape of the queries.
      rules: mesh axes of the logical axes.
      of_rows: number of arguments after the values.
      by_heads: whether keys and values are [B, K, S, H] instead of [B, S, K, H].
    """
    if jax.sharding.get_abstract_mesh().empty:
        return attend
    batch, *heads = (mesh_axes(rules, axis) or None for axis in ("batch", "heads", "kv_heads"))
    queries, keys = (PartitionSpec(batch, None, axes) for axes in heads)
    keys = PartitionSpec(batch, heads[1]) if by_heads else keys
    rows = (PartitionSpec(batch),) * of_rows
    return jax.shard_map(
        attend, in_specs=(queries, keys, keys, *rows), out_specs=queries, check_vma=False
    )


def by_tables(function: Callable, table: jax.Array, rules: Rules) -> Callable:
    """Makes each device of the current mesh change its own tables; without one, changes nothing.

    It also changes nothing if the mesh does not divide the tables evenly.

    Args:
      function: takes tables [B, K, ...], another array [B, K, ...] and one [B, ...]; returns the
        new tables.
      table: the tables.
      rules: mesh axes of the logical axes.
    """
    sizes = dict(zip(("batch", "kv_heads"), table.shape, strict=False))
    if jax.sharding.get_abstract_mesh().empty or not divides(rules, sizes):
        return function
    axes = [mesh_axes(rules, axis) or None for axis in sizes]
    tables = PartitionSpec(*axes)
    return jax.shard_map(
        function,
        in_specs=(tables, tables, PartitionSpec(axes[0])),
        out_specs=tables,
        check_vma=False,
    )


def by_rows(function: Callable, rules: Rules) -> Callable:
    """Makes each device of the current mesh compute its own rows; without a mesh, changes nothing.

    Args:
      function: takes and returns trees of arrays [B, ...]. B must be divisible by the number of
        parts of the axis "batch".
      rules: mesh axes of the logical axes.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    rows = PartitionSpec(mesh_axes(rules, "batch") or None)
    return jax.shard_map(function, in_specs=rows, out_specs=rows, check_vma=False)


def local_row(row: jax.Array, rows: int, rules: Rules) -> tuple[jax.Array, jax.Array | bool]:
    """Returns a row's index among the `rows` of this device, and whether the device holds it."""
    if not _batch_axes(rules):
        return row, True
    row -= jax.lax.axis_index(_batch_axes(rules)) * rows
    return jnp.clip(row, 0, rows - 1), (row >= 0) & (row < rows)


def from_owner(x: jax.Array, mine: jax.Array | bool, rules: Rules) -> jax.Array:
    """Copies `x` from the device that holds the row to all others."""
    if not _batch_axes(rules):
        return x
    # A sum of floats would lose the sign of a negative zero; a sum of integers keeps all bits.
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    bits = jax.lax.psum(jnp.where(mine, bits, jnp.zeros_like(bits)), _batch_axes(rules))
    return jax.lax.bitcast_convert_type(bits, x.dtype)


def _batch_axes(rules):
    """Returns the mesh axes over which rows are partitioned."""
    no_mesh = jax.sharding.get_abstract_mesh().empty
    return () if no_mesh else mesh_axes(rules, "batch")
