"""Copies of blocks of tokens, out of a row of a cache and into one.

A block holds the keys and values of some layers: a pair of arrays [block, K, H] for each layer, and
with int8 their scales [block, K, 1]. Rows and positions are arguments of the programs, so each
program is compiled once for each shape of cache. On a mesh, a block is partitioned by heads like
the cache, and replicated over the devices that hold different rows.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mistral_jax.model.cache import Cache, LayerCache
from mistral_jax.ops.backend import Backend
from mistral_jax.ops.partition import Rules, from_owner, local_row
from mistral_jax.ops.rows import as_bits, from_bits

Block = list[tuple[Any, Any]]


class Copier:
    """Copies blocks of tokens out of caches and into them.

    In all methods, `layers` are indices of layers with equally many cache slots.
    """

    def __init__(self, block: int, rules: Rules, mesh: Mesh | None, backend: Backend):
        """Makes a copier for blocks of `block` tokens, on a mesh, if any, by sharding rules."""
        self._block, self._rules, self._mesh, self._backend = block, rules, mesh, backend

    def nbytes(self, cache: Cache, layers: Sequence[int]) -> int:
        """Returns the bytes that a block takes on all devices together."""
        first = cache[layers[0]]
        rows, slots = first.positions.shape
        own_rows = first.positions.sharding.shard_shape((rows, slots))[0]

        def size(x):
            token = math.prod(x.sharding.shard_shape(x.shape)) // (own_rows * slots)
            return self._block * token * x.dtype.itemsize * len(x.sharding.device_set)

        return len(layers) * sum(map(size, jax.tree.leaves((first.k, first.v))))

    def take(self, cache: Cache, layers: Sequence[int], row: int, start: int) -> Block:
        """Copies a block of tokens out of a row, from position `start` on.

        For a token that the row does not hold, the block gets the keys and values of another token.
        """
        chosen, place = [cache[i] for i in layers], np.array([row, start], np.int32)
        with self._on_mesh():
            return _take(chosen, place, self._block, self._rules)

    def merge(self, old: Block, new: Block, first: int, stop: int) -> Block:
        """Returns `new` with the tokens `first` to `stop` - 1 of `old`; `new` is donated."""
        with self._on_mesh():
            return _merge(old, new, np.array([first, stop], np.int32))

    def put(
        self,
        cache: Cache,
        layers: Sequence[int],
        row: int,
        block: Block,
        places: tuple[int, int, int],
    ) -> Cache:
        """Copies tokens of a block into a row of a cache.

        Args:
          cache: the cache; its buffers are donated.
          layers: layers of the block.
          row: the row.
          block: the block.
          places: position of the block's first token, of the first token to copy, and one past the
            last token to copy. A layer has at least as many cache slots as tokens are copied.
        """
        filled = [cache[i] for i in layers]
        slots = filled[0].positions.shape[1]
        size, first = min(self._block, slots), places[1] % slots
        # Tokens that reach the last cache slot continue in cache slot 0.
        ranges = [min(first, slots - size), *[0] * (first + places[2] - places[1] > slots)]
        for begin in ranges:
            place = np.array([row, begin, *places], np.int32)
            with self._on_mesh():
                window = _blend(filled, block, place, self._rules)
                filled = _write(filled, window, place, self._rules, self._backend)
        new = dict(zip(layers, filled, strict=True))
        return tuple(new.get(i, layer) for i, layer in enumerate(cache))

    def clear(self, cache: Cache, row: int) -> Cache:
        """Marks all cache slots of a row as empty; the cache is donated."""
        with self._on_mesh():
            cleared = _clear([layer.positions for layer in cache], np.int32(row))
        pairs = zip(cache, cleared, strict=True)
        return tuple(layer.replace(positions=positions) for layer, positions in pairs)

    def _on_mesh(self):
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)


@functools.partial(jax.jit, static_argnames=("block", "rules"))
def _take(layers, place, block, rules):
    def copy(layers, place):
        rows, slots = layers[0].positions.shape
        row, mine = local_row(place[0], rows, rules)
        slot = (place[1] + jnp.arange(block, dtype=jnp.int32)) % slots

        def pick(axis, x):
            if axis == 1:
                return from_owner(x.at[row, slot].get(mode="clip"), mine, rules)
            found = x.at[row, :, slot].get(mode="clip")
            return from_owner(found.reshape(*found.shape[:2], -1), mine, rules)

        found = [layer.map(pick) for layer in layers]
        return [(layer.k, layer.v) for layer in found]

    like = [
        jax.tree.map(lambda x: x[0].reshape(*x.shape[1:3], -1), (layer.k, layer.v))
        for layer in layers
    ]
    return by_device(copy, rules, (layers, place), like)


@functools.partial(jax.jit, donate_argnames="new")
def _merge(old, new, bounds):
    def choose(old, new):
        index = jax.lax.broadcasted_iota(jnp.int32, old.shape, 0)
        return jnp.where((index >= bounds[0]) & (index < bounds[1]), old, new)

    return jax.tree.map(choose, old, new)


@functools.partial(jax.jit, static_argnames="rules")
def _blend(layers, block, place, rules):
    """Returns the new contents of a range of a row's cache slots, at most one block long.

    This is a program of its own because XLA's CPU backend copies a whole 16-bit cache that one
    program both reads and writes.
    """

    def blend(layers, block, place):
        row, begin, start, first, stop = place
        rows, slots = layers[0].positions.shape
        row, mine = local_row(row, rows, rules)
        size = min(len(jax.tree.leaves(block)[0]), slots)
        slot = begin + jnp.arange(size, dtype=jnp.int32)
        positions = first + (slot - first) % slots
        held = (positions < stop) & mine
        pick = functools.partial(jnp.take, indices=positions - start, axis=0, mode="clip")

        def choose(axis, old, new):
            sizes = [1, *old.shape[1:]]
            sizes[axis] = size
            old = jax.lax.dynamic_slice(old, _index(axis, old, row, begin), sizes)
            own = held.reshape(size, *[1] * (old.ndim - 1 - axis))
            return jnp.where(own, new, old)

        chunk = jax.tree.map(lambda x: pick(x)[None], block)
        pairs = zip(layers, chunk, strict=True)
        return [layer.map(choose, layer.ordered(*new, positions[None])) for layer, new in pairs]

    return by_device(blend, rules, (layers, block, place), layers)


@functools.partial(jax.jit, static_argnames=("rules", "backend"), donate_argnames="layers")
def _write(layers, window, place, rules, backend):
    """Writes the result of `_blend` into a row."""

    def write(layers, window, place):
        row, begin = place[:2]
        row, _ = local_row(row, layers[0].positions.shape[0], rules)

        def update(axis, old, new):
            index = _index(axis, old, row, begin)
            bits = (as_bits(x, backend) for x in (old, new))
            return from_bits(jax.lax.dynamic_update_slice(*bits, index), old.dtype)

        return [old.map(update, new) for old, new in zip(layers, window, strict=True)]

    return by_device(write, rules, (layers, window, place), layers)


def _index(axis, x, row, slot):
    index = [row, *[jnp.int32(0)] * (x.ndim - 1)]
    index[axis] = slot
    return index


@functools.partial(jax.jit, donate_argnames="positions")
def _clear(positions, row):
    def mark(x):
        return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) == row, -1, x)

    return [mark(x) for x in positions]


def by_device(function: Callable, rules: Rules, arguments: Sequence[Any], result: Any) -> Any:
    """Calls a function on each device of the mesh in use, for its own rows and heads.

    The number of a row is known only at run time, so XLA would gather the rows of all devices.

    Args:
      function: the function; it uses `local_row` to find a row.
      rules: mesh axes of the logical axes.
      arguments: its arguments: layers of caches, blocks, and arrays that are replicated.
      result: layers or blocks with as many axes as those that the function returns. Those with one
        row are replicated over the devices that hold different rows.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function(*arguments)

    def spec(x):
        if isinstance(x, LayerCache):
            return jax.tree.map(to_mesh, x, x.logical_axes())
        axes = (None, "kv_heads", "head_dim" if x.shape[2] > 1 else None) if x.ndim == 3 else ()
        return to_mesh(x, axes)

    def to_mesh(x, axes):
        axes = [None if axis == "batch" and x.shape[0] == 1 else axis for axis in axes]
        return nn.logical_to_mesh_axes(axes, rules)

    given, returned = jax.tree.map(
        spec, (tuple(arguments), result), is_leaf=lambda x: isinstance(x, LayerCache)
    )
    return jax.shard_map(function, in_specs=given, out_specs=returned, check_vma=False)(*arguments)
