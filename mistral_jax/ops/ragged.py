"""Attention of single tokens on a TPU, which reads only the filled slots of the cache.

`attention.attend` calls it for a step of decoding if `fits` is True. The kernel streams each row's
keys and values from HBM through two buffers, up to the row's last filled slot, and keeps an online
softmax (arXiv 1805.02867). While it attends to one block of slots it copies the next one, which may
be the first of the next row.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mistral_jax.ops import partition
from mistral_jax.ops.partition import Rules
from mistral_jax.ops.quantized import MaybeQuantized, QuantizedMatrix

# The lanes of a TPU, along which the kernel has slots. It copies as many slots at a time.
LANES = 128
# The most slots of a block. The keys and values of a block take longer to copy than to process.
BLOCK = 512
# The most bytes of all buffers together. A program's kernels have 16 MiB on a TPU v5e.
BUFFERS = 8 << 20
# Rows whose queries and positions are in VMEM at a time: the sublanes of a TPU.
ROWS = 8


def fits(q: jax.Array, k: MaybeQuantized, v: MaybeQuantized, rules: Rules, alone: bool) -> bool:
    """Tells whether `attend` can take these arrays.

    Args:
      q: queries, [B, T, N, H].
      k: keys by heads, [B, K, S, H].
      v: values by heads, [B, K, S, H].
      rules: mesh axes of the logical axes.
      alone: whether the program runs on one device, without a mesh.
    """
    wide = q.dtype.name
    kept = {x.values.dtype.name if isinstance(x, QuantizedMatrix) else x.dtype.name for x in (k, v)}
    if wide not in ("float32", "bfloat16") or kept not in ({wide}, {"int8"}):
        return False
    if q.shape[1] != 1 or q.shape[3] % LANES or k.shape[2] % LANES:
        return False
    if jax.sharding.get_abstract_mesh().empty:
        return alone
    return partition.fits(q, k, rules, by_heads=True)


def attend(
    mask: Callable[..., jax.Array],
    q: jax.Array,
    k: MaybeQuantized,
    v: MaybeQuantized,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    rules: Rules = (),
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attends from one token of each row to the keys that it sees.

    The key of position p is in slot p mod S, so the first min(position + 1, S) slots of a row are
    filled, and the kernel reads no others. A row without a token reads none, and gives 0. Scores
    and sums are float32, and float32 operands are not rounded. int8 values are widened in VMEM, and
    their scales multiply scores and weights.

    Args:
      mask: a function of the positions of queries, [B, 1], and keys, [B, S], which returns True
        where a query sees a key, [B, 1, S]. The kernel calls it for a part of a row.
      q: queries, [B, 1, N, H].
      k: keys by heads, [B, K, S, H]; int8 keys have scales [B, K, S].
      v: values, in the same form.
      q_positions: position of each query in its text, [B, 1] int32; -1 = no token.
      kv_positions: position of the key in each slot, [B, S] int32; -1 = empty slot.
      rules: mesh axes of the logical axes, by which the kernel is partitioned.
      interpret: whether Pallas interprets the kernel, which works on any device.

    Returns:
      [B, 1, N, H] in the dtype of `q`.
    """
    run = functools.partial(_attend_rows, mask=mask, interpret=interpret)
    run = partition.by_device(run, rules, of_rows=2, by_heads=True)
    return run(q, k, v, q_positions, kv_positions)


def _attend_rows(q, k, v, q_positions, kv_positions, mask, interpret):
    """Attends on one device."""
    # The import takes a tenth of a second, so other backends skip it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    batch, _, heads, head_dim = q.shape
    kv_heads, slots = k.shape[1:3]
    kept = (k.values, v.values, k.scale, v.scale) if isinstance(k, QuantizedMatrix) else (k, v)
    block = _block(slots, 4 * kept[0].nbytes // (batch * slots))
    rows = ROWS if batch % ROWS == 0 else batch
    grouped = (batch, kv_heads, heads // kv_heads, head_dim)
    queries = pl.BlockSpec((rows, *grouped[1:]), lambda i, *_: (i, 0, 0, 0))
    places = pl.BlockSpec((rows, slots), lambda i, *_: (i, 0))
    mixed = pl.pallas_call(
        functools.partial(_run, mask=mask, block=block),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch // rows,),
            in_specs=[queries, places, *[pl.BlockSpec(memory_space=pl.ANY)] * len(kept)],
            out_specs=queries,
            scratch_shapes=[
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
                *(pltpu.VMEM((2, kv_heads, block, *x.shape[3:]), x.dtype) for x in kept),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(grouped, q.dtype),
        cost_estimate=pl.CostEstimate(
            flops=4 * q.size * slots,
            bytes_accessed=sum(x.nbytes for x in (*kept, kv_positions, q, q)),
            transcendentals=batch * heads * slots,
        ),
        interpret=interpret,
        name="ragged_attention",
    )(
        jnp.minimum(q_positions[:, 0] + 1, slots),
        q_positions[:, 0],
        q.reshape(grouped),
        kv_positions,
        *kept,
    )
    return mixed.reshape(q.shape)


def _block(slots: int, slot_bytes: int) -> int:
    """Returns the slots of a block: a divisor of `slots`, and a multiple of the lanes."""
    most = max(LANES, min(BLOCK, BUFFERS // slot_bytes))
    return max(size for size in range(LANES, most + 1, LANES) if slots % size == 0)


def _run(filled, q_positions, q, kv_positions, *refs, mask, block):
    """Attends for the rows of one step of the grid.

    Args:
      filled: number of filled slots of each row, [B] in SMEM.
      q_positions: position of each query, [B] in SMEM.
      q: queries of the step's rows, [R, K, G, H] in VMEM.
      kv_positions: their keys' positions, [R, S] in VMEM.
      *refs: keys, values and scales of all rows in HBM; the result, [R, K, G, H] in VMEM; the
        buffer that the next row begins with; a semaphore and two buffers of each array in HBM.
      mask: the mask function.
      block: slots of a block.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    sources = refs[: (len(refs) - 3) // 2]
    out, turn, done, *buffers = refs[len(sources) :]
    keys, values, *scales = buffers
    rows, kv_heads, group, head_dim = q.shape
    batch, base = filled.shape[0], pl.program_id(0) * rows
    lowest = jnp.finfo(jnp.float32).min
    product = functools.partial(
        jax.lax.dot_general,
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None,
    )

    def occupied(row):
        """Returns the first row from `row` on that has filled slots."""

        def is_empty(row):
            return (row < batch) & (filled[jnp.minimum(row, batch - 1)] == 0)

        return jax.lax.while_loop(is_empty, lambda row: row + 1, row)

    def copy(row, first, buffer, act):
        """Starts or awaits the copies of the filled slots of a block into a buffer."""
        for start in range(0, block, LANES):

            @pl.when(first + start < filled[row])
            def _(start=start):
                here = pl.ds(pl.multiple_of(first + start, LANES), LANES)
                for source, target in zip(sources, buffers, strict=True):
                    target = target.at[buffer, :, pl.ds(start, LANES)]
                    act(pltpu.make_async_copy(source.at[row, :, here], target, done.at[buffer]))

    def start(row, first, buffer):
        copy(row, first, buffer, lambda one: one.start())

    def attend_row(state):
        row, buffer = state
        stop, following = filled[row], occupied(row + 1)
        queries, position = q[row - base], jnp.full((1, 1), q_positions[row])
        extra = jax.lax.rem(stop, LANES)

        def attend_block(state):
            first, buffer, top, total, mixed = state
            ends = first + block >= stop
            next_row = jnp.where(ends, following, row)
            next_first = jnp.where(ends, 0, first + block)
            pl.when(next_row < batch)(lambda: start(next_row, next_first, 1 - buffer))
            copy(row, first, buffer, lambda one: one.wait())

            # The product of a weight of 0 and NaN is NaN, so the values of empty slots become 0.
            @pl.when(ends & (extra > 0) & (not scales))
            def _():
                part = pl.ds(pl.multiple_of(stop - extra - first, LANES), LANES)
                tail = values[buffer, :, part]
                is_filled = jax.lax.broadcasted_iota(jnp.int32, tail.shape, 1) < extra
                values[buffer, :, part] = jnp.where(is_filled, tail, 0)

            here = pl.ds(pl.multiple_of(first, LANES), block)
            seen = mask(position, kv_positions[pl.ds(row - base, 1), here])
            k, v = (x[buffer].astype(q.dtype) for x in (keys, values))
            k_scale, v_scale = (x[buffer][:, None] for x in scales) if scales else (1.0, 1.0)
            v_scale = jnp.where(seen, v_scale, 0) if scales else v_scale
            scores = product(queries, k, (((2,), (2,)), ((0,), (0,))))
            scores = jnp.where(seen, scores * (k_scale * head_dim**-0.5), lowest)
            highest = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
            weights, kept = jnp.exp(scores - highest), jnp.exp(top - highest)
            more = product((weights * v_scale).astype(v.dtype), v, (((2,), (1,)), ((0,), (0,))))
            total = total * kept + jnp.sum(weights, axis=-1, keepdims=True)
            return first + block, 1 - buffer, highest, total, mixed * kept + more

        mixed = jnp.zeros((kv_heads, group, head_dim), jnp.float32)
        total = mixed[..., :1]
        _, buffer, _, total, mixed = jax.lax.while_loop(
            lambda state: state[0] < stop, attend_block, (0, buffer, total + lowest, total, mixed)
        )
        out[row - base] = (mixed / total).astype(out.dtype)
        return following, buffer

    @pl.when(base == 0)
    def _():
        turn[0] = 0
        values[...] = jnp.zeros_like(values)  # What no copy has written must not be NaN either.
        row = occupied(jnp.int32(0))
        pl.when(row < batch)(lambda: start(row, 0, 0))

    out[...] = jnp.zeros_like(out)
    first = occupied(base), turn[0]
    _, turn[0] = jax.lax.while_loop(lambda state: state[0] < base + rows, attend_row, first)
