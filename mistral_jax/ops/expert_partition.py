"""The stacked matrices of experts, and their partition over the devices of a mesh."""

import functools
from typing import Any

import flax.struct
import jax
from jax.sharding import PartitionSpec

from mistral_jax.ops import partition
from mistral_jax.ops.partition import Rules, mesh_axes
from mistral_jax.ops.quantized import MaybeQuantized, QuantizedMatrix


@flax.struct.dataclass
class Stack:
    """The matrices of all experts for one projection.

    Attributes:
      matrix: a matrix for each expert, [E, Y, X], output axis first.
      a: inner matrices of adapters, [E, R, X]; None = there are no adapters.
      b: outer matrices of adapters, [E, Y, R].
    """

    matrix: MaybeQuantized
    a: jax.Array | None = None
    b: jax.Array | None = None


def by_device(local, rules: Rules, tokens, stacks, key) -> jax.Array:
    """Makes each device of the current mesh compute its own part, and sums the parts.

    Devices that share rows' mesh axis with experts gather each other's tokens first.
    """
    x = tokens[0]
    experts, mlp = (mesh_axes(rules, axis) for axis in ("expert", "mlp"))
    places = [
        mesh_axes(rules, axis) if partition.divides(rules, {axis: size}) else ()
        for axis, size in zip(("batch", "length"), x.shape, strict=False)
    ]
    summed = (*experts, *mlp)
    gathered = [(axis, i) for i, axes in enumerate(places) for axis in axes if axis in summed]
    alone = tuple(axis for axis in summed if axis not in dict(gathered))

    def each(tokens, stacks, key):
        for axis, i in reversed(gathered):
            tokens = jax.tree.map(
                lambda x, axis=axis, i=i: jax.lax.all_gather(x, axis, axis=i, tiled=True), tokens
            )
        count = stacks[0].matrix.shape[0]
        first = jax.lax.axis_index(experts) * count if experts else 0
        made = local(tokens, stacks, key, first)
        for axis, i in gathered:
            made = jax.lax.psum_scatter(made, axis, scatter_dimension=i, tiled=True)
        return _sum(made, alone) if alone else made

    rows = PartitionSpec(*(axes or None for axes in places))
    inner, outer = (None, mlp or None), (mlp or None, None)
    described = [
        _describe(stack, experts or None, *axes)
        for stack, axes in zip(stacks, (outer, outer, inner), strict=True)
    ]
    return jax.shard_map(
        each,
        in_specs=(rows, described, PartitionSpec()),
        out_specs=rows,
        check_vma=False,
    )(tokens, stacks, key)


def _describe(stack: Stack, experts: Any, outputs: Any, inputs: Any) -> Stack:
    """Returns the partition of a projection: the mesh axes of its experts, outputs and inputs."""
    matrix = PartitionSpec(experts, outputs, inputs)
    if isinstance(stack.matrix, QuantizedMatrix):
        few = stack.matrix.scale.shape[-1] == 1
        matrix = QuantizedMatrix(matrix, PartitionSpec(experts, outputs, None if few else inputs))
    if stack.a is None:
        return Stack(matrix)
    return Stack(matrix, PartitionSpec(experts, None, inputs), PartitionSpec(experts, outputs))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum(x, axes):
    """Sums `x` over the devices along mesh axes."""
    return jax.lax.psum(x, axes)


def _sum_backward(axes, _, grad):
    # `shard_map` divides the gradient of a replicated result among its copies. All have it whole,
    # so it needs no exchange.
    return (grad * jax.lax.axis_size(axes),)


_sum.defvjp(lambda x, axes: (_sum(x, axes), None), _sum_backward)
