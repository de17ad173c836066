"""The layout of a model over devices: a mesh, and rules from logical axes to mesh axes.

The rules come from `configs/sharding/*.toml`; only this file turns them into a `NamedSharding` for
each array. The logical axes are those that the model names: vocab, embed, mlp, expert, heads,
kv_heads, head_dim; and, for activations only, batch, length and residual (the width D).
"""

import contextlib
import dataclasses
import difflib
import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from mistral_jax.base.fields import integer
from mistral_jax.base.files import read_toml
from mistral_jax.config import ModelConfig, find
from mistral_jax.model.transformer import Transformer
from mistral_jax.ops.backend import PLAIN, Backend
from mistral_jax.ops.partition import Rules, mesh_axes
from mistral_jax.parallel import distributed
from mistral_jax.parallel.rules import LOGICAL_AXES, check_rules, split_kv_heads


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh of devices, and the rules that partition arrays over it.

    Attributes:
      mesh: devices by mesh axis.
      rules: mesh axes of each logical axis that is partitioned.
    """

    mesh: Mesh
    rules: Rules

    def backend(self, planned: bool = False) -> Backend:
        """Returns what programs on its devices may use; see `Backend.of`."""
        return Backend.of(self.mesh.devices.ravel(), planned)

    def parts(self, axis: str) -> int:
        """Returns the number of parts that a logical axis is partitioned into."""
        return math.prod(self.mesh.shape[name] for name in mesh_axes(self.rules, axis))

    def sharding(self, *axes: str) -> NamedSharding:
        """Returns the sharding of an array with these logical axes; replicated if there is none."""
        return NamedSharding(self.mesh, nn.logical_to_mesh_axes(axes, self.rules))


def read_layout(
    name: str | Path | None,
    config: ModelConfig,
    devices: list[jax.Device] | None = None,
    mesh: Mapping[str, int] | None = None,
) -> Layout | None:
    """Reads a sharding file and builds its layout over the devices, without allocating arrays.

    Args:
      name: a file of `configs/sharding/` without its ending ("tensor"), or a path to a TOML file;
        None = one device holds everything.
      config: the model; the mesh must divide its sizes.
      devices: devices to use; None = all.
      mesh: sizes of mesh axes, which replace those in the file.

    Returns:
      The layout, or None if one device holds everything.

    Raises:
      ValueError: there is no such file, its mesh does not fit the devices or the model, it
        partitions two axes of one array over one mesh axis, or it leaves devices unused in a
        program of several processes.
    """
    if name is None:
        if mesh:
            raise ValueError(f"mesh is {dict(mesh)} without a sharding; name one, such as 'tensor'")
        if distributed.count() > 1:
            raise ValueError(
                f"there are {distributed.count()} processes and no sharding that spreads the model "
                "over their devices; name one, such as 'tensor'"
            )
        return None
    path = find("sharding", name, "sharding")
    table = read_toml(path)
    if set(table) != {"mesh", "rules"}:
        raise ValueError(f"{path} has the tables {sorted(table)}; expected [mesh] and [rules]")
    for part, value in table.items():
        if not isinstance(value, dict):
            raise ValueError(f"{path} has {value!r} as {part}; expected a table, [{part}]")
    for axis, to in table["rules"].items():
        if not all(isinstance(name, str) for name in (to if isinstance(to, list) else [to])):
            raise ValueError(
                f"{path} maps {axis} to {to!r}; expected a mesh axis, or a list of some"
            )
    devices = jax.devices() if devices is None else devices
    for axis in mesh or {}:
        if axis not in table["mesh"]:
            raise ValueError(f"{path} has no mesh axis {axis!r}; it has {list(table['mesh'])}")
    sizes = _fill({**table["mesh"], **(mesh or {})}, len(devices), path)
    rules = {
        axis: (to,) if isinstance(to, str) else tuple(to) for axis, to in table["rules"].items()
    }
    for axis, to in rules.items():
        if axis not in LOGICAL_AXES:
            near = difflib.get_close_matches(axis, LOGICAL_AXES, n=1, cutoff=0)[0]
            raise ValueError(f"{path}: no logical axis {axis!r}; the nearest is {near!r}")
        if unknown := [mesh_axis for mesh_axis in to if mesh_axis not in sizes]:
            raise ValueError(f"{path} maps {axis} to {unknown[0]!r}; its mesh has {list(sizes)}")
    check_rules(_parameters(config), rules, sizes, path)
    rules, sizes = split_kv_heads(config, rules, sizes)
    used = math.prod(sizes.values())
    # JAX drops a mesh of one device from some results, and then compiles programs for both forms.
    if used == 1 and distributed.count() == 1:
        return None
    if used < len(devices) and distributed.count() > 1:
        raise ValueError(
            f"{path} lays a mesh over {used} of {len(devices)} devices, which leaves some of the "
            f"{distributed.count()} processes without work: use all devices, or fewer processes"
        )
    return Layout(_lay(sizes, devices[:used]), tuple(rules.items()))


def abstract_params(model: Transformer, layout: Layout | None = None) -> dict[str, Any]:
    """Returns the shapes and shardings of a model's parameters, without allocating them.

    Args:
      model: the model.
      layout: partition over devices; None = JAX's default device.

    Returns:
      The tree of parameters, each a float32 `jax.ShapeDtypeStruct` with its sharding.
    """
    boxed = _trace(model.config)
    rest = {name: part for name, part in boxed.items() if name != "layers_0"}
    boxed = rest | {f"layers_{i}": boxed["layers_0"] for i in range(model.config.num_layers)}
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
    """Returns the mesh of the parameters' shardings, or None if they have none."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)  # NumPy arrays have none
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def on_mesh(params: Any) -> contextlib.AbstractContextManager:
    """Returns a context in which jitted code knows the mesh of `params`, if they have one."""
    mesh = mesh_of(params)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def _lay(sizes: Mapping[str, int], devices: list[jax.Device]) -> Mesh:
    """Builds a mesh whose axes follow those of the devices' network where possible."""
    types = (AxisType.Auto,) * len(sizes)
    shape, names = tuple(sizes.values()), tuple(sizes)
    try:
        return jax.make_mesh(shape, names, axis_types=types, devices=devices)
    except NotImplementedError:  # For example 2 x 8 on a 4 x 4 torus: mesh axes must share one.
        laid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(laid, names, axis_types=types)


def _fill(sizes: dict[str, int], devices: int, path: Path) -> dict[str, int]:
    """Replaces a size of -1 by the number of devices that the other axes leave."""
    for axis, size in sizes.items():
        if size != -1 and not integer(1).accepts(size):
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


def _trace(config: ModelConfig) -> dict[str, Any]:
    """Returns the boxed parameters of the model with one layer, which stands for all layers."""
    return _trace_layer(dataclasses.replace(config, num_layers=1, sliding_window=None, dilation=1))


@functools.lru_cache(maxsize=4)
def _trace_layer(config: ModelConfig) -> dict[str, Any]:
    token = jnp.zeros((1, 1), jnp.int32)
    model = Transformer(config, backend=PLAIN)
    return jax.eval_shape(model.init, jax.random.key(0), token, token)["params"]


def _parameters(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """Yields the name, logical axes and shape of each parameter; one layer stands for all."""
    leaves = jax.tree.leaves_with_path(_trace(config), is_leaf=nn.meta.is_axis_metadata)
    for key, box in leaves:
        name = jax.tree_util.keystr(key, simple=True, separator="/")
        yield name.replace("layers_0", "layers_*"), box.names, box.value.shape
