"""Writing a chunk's keys and values into caches held by heads on a TPU.

XLA's scatter transposes a whole cache to write rows of all heads, and back. This Pallas kernel
reads and writes only the blocks of slots that the chunk reaches, in place.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mistral_jax.ops import partition
from mistral_jax.ops.backend import Backend
from mistral_jax.ops.partition import Rules, mesh_axes

# The most slots that the kernel writes at a time: whole lanes, and whole tiles of any dtype.
SLOTS = 512
LANES = 128


def fits(tables: Sequence[jax.Array], rules: Rules, backend: Backend) -> bool:
    """Tells whether `write` can take these tables.

    Slots and heads must be whole lanes. With several devices, a mesh must be in use, whose devices
    the rules give equal parts of the rows and heads.

    Args:
      tables: the arguments of `write`.
      rules: mesh axes of the logical axes.
      backend: the backend that this is traced for.
    """
    rows, heads, slots, head_dim = tables[0].shape
    if "flash" not in backend.kernels or slots % LANES or head_dim % LANES:
        return False
    if jax.sharding.get_abstract_mesh().empty:
        return backend.alone
    return partition.divides(rules, {"batch": rows, "kv_heads": heads})


def held(positions: jax.Array, old: jax.Array) -> jax.Array:
    """Returns the position of the token in each slot after a chunk, [B, S] int32.

    Args:
      positions: positions of the chunk's tokens, as for `write`.
      old: positions before the chunk, [B, S] int32.
    """
    slots = old.shape[1]
    last = jnp.max(positions, axis=1, keepdims=True)
    first = jnp.min(jnp.where(positions < 0, last + 1, positions), axis=1, keepdims=True)
    new = last - (last - jnp.arange(slots, dtype=jnp.int32)[None]) % slots
    return jnp.where(new >= first, new, old)


def write(
    tables: Sequence[jax.Array],
    rows: Sequence[jax.Array],
    positions: jax.Array,
    rules: Rules = (),
    *,
    interpret: bool = False,
) -> list[jax.Array]:
    """Stores the last S tokens of a chunk in each row, over the oldest tokens.

    Args:
      tables: arrays of the cache, [B, K, S, H] or [B, K, S].
      rows: what to write into each of them, [B, K, T, H] or [B, K, T], of the same dtype.
      positions: positions of the chunk's tokens, [B, T] int32, rising by 1 along a row; -1 =
        padding, which is not stored.
      rules: mesh axes of the logical axes.
      interpret: whether Pallas interprets the kernel, which works on any device.

    Returns:
      The new tables.
    """
    run = functools.partial(_write, interpret=interpret)
    if not jax.sharding.get_abstract_mesh().empty:
        batch, heads = (mesh_axes(rules, axis) or None for axis in ("batch", "kv_heads"))
        of = [PartitionSpec(batch, heads)] * len(tables)
        run = jax.shard_map(
            run, in_specs=(of, of, PartitionSpec(batch)), out_specs=of, check_vma=False
        )
    return run(list(tables), list(rows), positions)


def _write(tables, rows, positions, interpret):
    # The imports take a tenth of a second, so other backends skip them.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (batch, length), (heads, slots) = positions.shape, tables[0].shape[1:3]
    shapes = [x.shape for x in tables]
    size = next(n for n in (SLOTS, 256, LANES) if slots % n == 0)
    blocks = slots // size
    extent = max(length + -length % LANES, size)
    # A chunk that begins inside a block reaches one block more.
    steps = min(blocks, extent // size + -(-(extent % size) // size) + 1)
    pads = [(0, 0), (0, 0), (0, extent - length), (0, 0)]
    rows = [jnp.pad(x, pads[: x.ndim]) if length < extent else x for x in rows]
    # Scales lie along lanes.
    rows, tables = ([x if x.ndim == 4 else x[:, :, None] for x in each] for each in (rows, tables))
    column = jax.lax.argmax(positions >= 0, 1, jnp.int32)
    last = jnp.max(positions, axis=1)
    count = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
    end = column + count - 1  # The index of the row's last token; the row may have none.
    newest = last % slots
    oldest = (last - count + 1) % slots

    def kernel(column, end, newest, first, *refs):
        row, step = pl.program_id(0), pl.program_id(2)
        block = first[row] + step
        block = jnp.where(block < blocks, block, block - blocks)
        # Token `shift` + r is in slot r of the block, and so is the one S tokens before it.
        shift = block * size - newest[row] + end[row]
        news, olds, outs = (refs[i * len(tables) : (i + 1) * len(tables)] for i in range(3))
        for new, old, out in zip(news, olds, outs, strict=True):
            axis = 1 if old.shape[0] == 1 else 0
            wide = jnp.float32 if old.dtype != jnp.int8 else jnp.int32
            table, moved = old[...].astype(wide), new[...].astype(wide)
            for back in (slots, 0) if slots < extent + size else (None,):
                here = shift
                if back is None:  # A block holds tokens of one lap of the ring only.
                    here = jnp.where(block * size <= newest[row], shift, shift - slots)
                else:
                    here = shift - back
                index = here + jax.lax.broadcasted_iota(jnp.int32, table.shape, axis)
                inside = (index >= column[row]) & (index <= end[row])
                by = jax.lax.rem(extent - jax.lax.rem(here, extent), extent)
                turned = pltpu.roll(moved, by, axis)
                turned = turned[:, :size] if axis else turned[:size]
                table = jnp.where(inside, turned, table)
            out[...] = table.astype(out.dtype)

    def whole(x):
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, i, *_: (b, h, 0, 0))

    def part(x):
        lanes = x.shape[2] == 1
        shape = (1, size) if lanes else (size, x.shape[3])

        def at(row, head, step, column, end, newest, first):
            block = first[row] + step
            block = jnp.where(block < blocks, block, block - blocks)
            return (row, head, 0, block) if lanes else (row, head, block, 0)

        return pl.BlockSpec((None, None, *shape), at)

    written = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(batch, heads, steps),
            in_specs=[*map(whole, rows), *map(part, tables)],
            out_specs=[*map(part, tables)],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in tables],
        input_output_aliases={4 + len(rows) + i: i for i in range(len(tables))},
        cost_estimate=pl.CostEstimate(
            flops=0,
            transcendentals=0,
            bytes_accessed=sum(x.nbytes for x in rows)
            + 2 * sum(x.nbytes // blocks * steps for x in tables),
        ),
        name="write_chunk",
        interpret=interpret,
    )(column, end, newest, oldest // size, *rows, *tables)
    return [x.reshape(shape) for x, shape in zip(written, shapes, strict=True)]
