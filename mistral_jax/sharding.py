"""The layout of a model over devices: a mesh, and rules from logical axes to mesh axes.

Rules come from `configs/sharding/*.toml`; this file alone makes `NamedSharding`s of them. It holds
no weights and starts no computation. The logical axes are those that the model names: vocab, embed,
mlp, heads, kv_heads, head_dim; and, of activations only, batch, length, residual (the width D).
"""

import dataclasses
import difflib
import math
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding

from mistral_jax.config import CONFIG_DIR, ModelConfig, read_toml
from mistral_jax.model.layers import Rules
from mistral_jax.model.transformer import Transformer

LOGICAL_AXES = (
    *("vocab", "embed", "mlp", "heads", "kv_heads", "head_dim"),
    *("batch", "length", "residual"),
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where arrays lie.

    Attributes:
      mesh: devices by mesh axis.
      rules: mesh axes of each logical axis that is split.
    """

    mesh: Mesh
    rules: Rules


def read_layout(
    name: str | Path, config: ModelConfig, devices: list[jax.Device] | None = None
) -> Layout:
    """Reads a sharding file and lays its mesh over the devices.

    Args:
      name: a file of `configs/sharding/` without its ending ("tensor"), or a path to a TOML file.
      config: the model that will be laid out; its sizes must be divisible by the mesh's.
      devices: devices to use; None = all.

    Raises:
      ValueError: there is no such file, or its mesh does not fit the devices or the model.
    """
    path = Path(name) if str(name).endswith(".toml") else CONFIG_DIR / "sharding" / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (CONFIG_DIR / "sharding").glob("*.toml")))
        raise ValueError(
            f"no sharding named {str(name)!r}; expected one of {known}, or a .toml file"
        )
    table = read_toml(path)
    if set(table) != {"mesh", "rules"}:
        raise ValueError(f"{path} has the tables {sorted(table)}; expected [mesh] and [rules]")
    devices = jax.devices() if devices is None else devices
    sizes = _fill(dict(table["mesh"]), len(devices), path)
    rules = {
        axis: (to,) if isinstance(to, str) else tuple(to) for axis, to in table["rules"].items()
    }
    for axis, to in rules.items():
        if axis not in LOGICAL_AXES:
            near = difflib.get_close_matches(axis, LOGICAL_AXES, n=1, cutoff=0)[0]
            raise ValueError(f"{path}: no logical axis {axis!r}; the nearest is {near!r}")
        if unknown := [mesh_axis for mesh_axis in to if mesh_axis not in sizes]:
            raise ValueError(f"{path} maps {axis} to {unknown[0]!r}; its mesh has {list(sizes)}")
    _check_sizes(config, rules, sizes, path)
    rules, sizes = _split_kv_heads(config, rules, sizes)
    used = math.prod(sizes.values())
    mesh = jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices[:used],
    )
    return Layout(mesh, tuple(rules.items()))


def abstract_params(model: Transformer, layout: Layout | None = None) -> dict[str, Any]:
    """Describes a model's parameters without making them.

    Args:
      model: the model.
      layout: where they lie; None = wherever JAX's default is.

    Returns:
      The tree of parameters as float32 `jax.ShapeDtypeStruct`s, with their shardings.
    """
    # One layer is traced and stands for all: they have the same parameters.
    config = dataclasses.replace(model.config, num_layers=1, sliding_window=None)
    token = jnp.zeros((1, 1), jnp.int32)
    init = model.clone(config=config).init
    boxed = jax.eval_shape(init, jax.random.key(0), token, token)["params"]
    layer = boxed.pop("layers_0")
    boxed |= {f"layers_{i}": layer for i in range(model.config.num_layers)}
    shapes = nn.unbox(boxed)
    if layout is None:
        return shapes
    specs = nn.get_partition_spec(boxed)
    shardings = nn.logical_to_mesh_sharding(specs, layout.mesh, layout.rules)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def mesh_of(params: Any) -> Mesh | None:
    """Returns the mesh that `params` lie on, or None if they are not laid out by a mesh."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)  # None of a NumPy array
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def _fill(sizes: dict[str, int], devices: int, path: Path) -> dict[str, int]:
    """Replaces a size of -1 by what the other axes leave of the devices."""
    for axis, size in sizes.items():
        if not isinstance(size, int) or (size < 1 and size != -1):
            raise ValueError(
                f"{path}: mesh axis {axis!r} is {size!r}; expected a count of devices, or -1"
            )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"{path}: the mesh axes {open_axes} are all -1; at most one may be")
    if fixed > devices or (open_axes and devices % fixed):
        raise ValueError(f"{path} asks for a multiple of {fixed} devices; there are {devices}")
    return {axis: devices // fixed if size == -1 else size for axis, size in sizes.items()}


def _check_sizes(config: ModelConfig, rules: dict, sizes: dict[str, int], path: Path) -> None:
    """Refuses a mesh that does not divide the model, before anything is allocated."""
    lengths = {
        "vocab": ("vocab_size", config.vocab_size),
        "embed": ("embed_dim", config.embed_dim),
        "mlp": ("mlp_dim", config.mlp_dim),
        "heads": ("num_heads", config.num_heads),
        "head_dim": ("head_dim", config.head_dim),
    }
    for axis, (field, length) in lengths.items():
        mesh_axes = rules.get(axis, ())
        ways = math.prod(sizes[mesh_axis] for mesh_axis in mesh_axes)
        if length % ways:
            fits = math.gcd(length, ways)
            raise ValueError(
                f"{path} maps {axis} ({field} = {length}) to mesh axis {'+'.join(mesh_axes)} "
                f"({ways} devices), which does not divide it: use {fits} or leave {axis} unsharded"
            )


def _split_kv_heads(config: ModelConfig, rules: dict, sizes: dict[str, int]) -> tuple[dict, dict]:
    """Splits the mesh axis of kv_heads where it is larger than the heads that it can share out.

    Of t devices, gcd(t, K) hold different key-value heads; the query heads of each lie on the rest.
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
