"""Attention of a prompt's chunk on a TPU: to the cache as it was before, and to the chunk itself.

A Pallas kernel computes an online softmax (arXiv 1805.02867) over blocks of keys, for the query
heads of one key-value head at a time. Keys are masked by position, so they may lie in any order,
such as that of a ring. Blocks of keys that no query of a block sees are neither copied nor
computed, which is decided at run time: attention costs what is filled of the cache, and no more
than the window reaches.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mistral_jax.ops import partition
from mistral_jax.ops.backend import Backend
from mistral_jax.ops.partition import Rules, mesh_axes
from mistral_jax.ops.quantized import MaybeQuantized, QuantizedMatrix

# The most queries of a head, and keys, that the kernel reads at a time.
QUERIES, KEYS = 512, 1024
# Keys whose scores are computed together.
PART = 256
# The most heads that are computed in one block of instructions.
TOGETHER = 4
# Rows below the values that are 1: a tile of 16-bit numbers.
ROWS_OF_ONES = 16
# Share of the peak that the compiler's schedule of the inner loop reaches for bfloat16 keys, by
# JAX's name of the chip. Per head and block, libtpu 0.0.42 plans 2,090 cycles on a v5e, whose
# matrix units need 2,176 with the rows of ones, for 2,048 cycles of products; and 1,038 on a v6e
# for 512. A v5p has the matrix units of a v5e. Those of a v6e are twice as wide as a head.
PEAK_SHARES = {
    **dict.fromkeys(("TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p"), 0.94),
    **dict.fromkeys(("TPU v6 lite", "TPU v6e"), 0.49),
}
# The kernel's name in compiled programs.
NAME = "attend_chunk"
# Blocks of keys and of queries are whole lanes.
LANES = 128
# The position of a key that no query sees.
HIDDEN = jnp.iinfo(jnp.int32).max
# The score of such a key. It is finite, so that no difference of scores is NaN.
LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)
# Bytes of the chip's vector memory that the kernel may use; v5e and v6e have 128 MiB.
MEMORY = 64 * 2**20


class Keys(NamedTuple):
    """Keys and values by heads, as the attributes of a `LayerCache`.

    Attributes:
      k: keys, [B, K, S, H]; int8 keys have scales [B, K, S].
      v: values, in the same form.
      positions: position of each key in its text, [B, S] int32; -1 = no key.
    """

    k: MaybeQuantized
    v: MaybeQuantized
    positions: jax.Array


def fits(q: jax.Array, k: MaybeQuantized, rules: Rules, backend: Backend) -> bool:
    """Tells whether `attend` can take these arrays.

    Queries must be float32 or bfloat16, cached keys of the same dtype or int8. XLA cannot partition
    a kernel: with several devices, a mesh must be in use (`jax.set_mesh`), and the rules must give
    each device the keys of its queries.

    Args:
      q: queries, [B, T, N, H].
      k: keys of the cache, [B, K, S, H].
      rules: mesh axes of the logical axes.
      backend: the backend that this is traced for.
    """
    if "flash" not in backend.kernels:
        return False
    if q.dtype.name not in ("float32", "bfloat16") or q.shape[3] % LANES:
        return False
    if _numbers(k).dtype.name not in (q.dtype.name, "int8"):
        return False
    if jax.sharding.get_abstract_mesh().empty:
        return backend.alone
    return partition.fits(q, k, rules, by_heads=True)


def factor(head_dim: int) -> float:
    """Returns the factor of scores, whose powers of two are the weights."""
    return head_dim**-0.5 / math.log(2)


def attend(
    q: jax.Array,
    chunk: Keys,
    cache: Keys,
    window: int | None,
    rules: Rules = (),
    *,
    scaled: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """Attends from every query of a chunk to the keys of the cache and of the chunk.

    Scores and sums are float32, and float32 operands are not rounded. There is no gradient.

    Args:
      q: queries, [B, T, N, H].
      chunk: keys of the same tokens. Their positions rise by 1 along a row, but for padding (-1)
        before and after them; the output of padding is finite and has no meaning.
      cache: the cache before the chunk: the key at position p is in slot p mod S. Other keys, and
        keys that are not before the chunk, are not seen.
      window: number of visible keys (W), the query's own included; None = no limit.
      rules: mesh axes of the logical axes.
      scaled: whether queries are already multiplied by `factor(H)`, which saves the kernel a
        multiplication of each score.
      interpret: whether Pallas interprets the kernel, which works on any device.

    Returns:
      [B, T, N, H] in the dtype of `q`.
    """
    chunk, cache = (Keys(x.k, x.v, x.positions) for x in (chunk, cache))
    run = functools.partial(_attend_rows, window=window, scaled=scaled, interpret=interpret)
    if not jax.sharding.get_abstract_mesh().empty:
        axes = (mesh_axes(rules, axis) or None for axis in ("batch", "heads", "kv_heads"))
        batch, heads, kv_heads = axes
        by_heads = PartitionSpec(batch, kv_heads)
        keys = Keys(by_heads, by_heads, PartitionSpec(batch))
        queries = PartitionSpec(batch, None, heads)
        run = jax.shard_map(run, in_specs=(queries, keys, keys), out_specs=queries, check_vma=False)
    return run(q, chunk, cache)


def _numbers(x: MaybeQuantized) -> jax.Array:
    return x.values if isinstance(x, QuantizedMatrix) else x


def _attend_rows(q, chunk, cache, window, scaled, interpret):
    """Attends on one device."""
    rows, length = q.shape[:2]
    size = min(QUERIES, length + -length % LANES)
    q = _fill(jnp.swapaxes(q, 1, 2), 2, size, 0)
    column = jax.lax.argmax(chunk.positions >= 0, 1, jnp.int32)[:, None]
    start = jnp.take_along_axis(chunk.positions, column, axis=1)
    queries = _fill(chunk.positions, 1, size, -1).reshape(rows, -1, size)
    # All that follows from the chunk's positions alone, XLA computes once for all layers.
    slots = cache.positions.shape[1]
    places = start - 1 - (start - 1 - jnp.arange(slots, dtype=jnp.int32)[None]) % slots
    expected = _by_block(jnp.where(places >= 0, places, HIDDEN))
    own = _by_block(jnp.where(chunk.positions >= 0, chunk.positions, HIDDEN))
    counts, steps = _schedule(queries, expected, own, window)
    found = _by_block(cache.positions) == expected
    held = jnp.where(found, expected, HIDDEN)
    whole = jnp.all(found, axis=(2, 3)).astype(jnp.int32)
    mixed = _run_kernel(
        ((start - column)[:, 0], counts, steps, whole),
        *(q, _arrays(cache), held, _arrays(chunk), own),
        window=window,
        scaled=scaled,
        interpret=interpret,
    )
    return jnp.swapaxes(mixed, 1, 2)[:, :length]


def _by_block(positions):
    """Divides positions [B, S] into the kernel's blocks of keys, [B, blocks, 1, block]."""
    length = positions.shape[1]
    size = -(-length // -(-length // KEYS))
    filled = _fill(positions, 1, size + -size % LANES, HIDDEN)
    return filled.reshape(len(filled), -1, 1, size + -size % LANES)


def _arrays(keys: Keys) -> list[jax.Array]:
    """Returns keys and values in whole lanes, and the scales of int8 ones, [B, K, 1, S]."""
    arrays = [_fill(_numbers(x), 2, LANES, 0) for x in keys[:2]]
    if isinstance(keys.k, QuantizedMatrix):
        arrays += [_fill(x.scale, 2, LANES, 0)[:, :, None] for x in keys[:2]]
    return arrays


def _fill(x: jax.Array, axis: int, size: int, value: int) -> jax.Array:
    """Pads an axis of `x` to a multiple of `size`."""
    missing = -x.shape[axis] % size
    if not missing:
        return x
    widths = [(0, missing if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)


def _schedule(queries, held, own, window):
    """Lists the blocks of keys that each block of queries needs.

    Args:
      queries: positions of queries by block, [B, blocks, block].
      held: positions of the cache's keys, as `_by_block` returns them.
      own: positions of the chunk's keys.
      window: W.

    Returns:
      The number of needed blocks, [B, query blocks], and the blocks, [B, query blocks, blocks]:
      first those of the cache, then those of the chunk, the last one repeated. Each is twice its
      number, plus 1 if all queries see all of its keys.
    """
    first = jnp.min(jnp.where(queries < 0, HIDDEN, queries), axis=2)[:, :, None]
    last = jnp.max(queries, axis=2)[:, :, None]
    places = [x[:, None, :, 0] for x in (held, own)]
    low = jnp.concatenate([x.min(-1) for x in places], axis=2)
    high = jnp.concatenate([x.max(-1) for x in places], axis=2)
    seen = jnp.concatenate([jnp.where(x == HIDDEN, -1, x).max(-1) for x in places], axis=2)
    needed, whole = (low <= last) & (last >= 0), high <= first
    if window is not None:
        needed &= seen > first - window
        whole &= low > last - window
    count = jnp.sum(needed, axis=2, dtype=jnp.int32)
    step = jnp.arange(needed.shape[2], dtype=jnp.int32)[None, None]
    place = jnp.cumsum(needed, axis=2, dtype=jnp.int32) - 1
    wanted = jnp.minimum(step, jnp.maximum(count - 1, 0)[:, :, None])
    found = needed[:, :, None] & (place[:, :, None] == wanted[..., None])
    steps = jnp.sum(
        jnp.where(found, (2 * step + whole.astype(jnp.int32))[:, :, None], 0),
        axis=3,
        dtype=jnp.int32,
    )
    return count, steps


def _run_kernel(tables, q, held, held_places, own, own_places, *, window, scaled, interpret):
    # The imports take a tenth of a second, so other backends skip them.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    rows, heads, length, head_dim = q.shape
    size = min(QUERIES, length)
    kv_heads, group = held[0].shape[1], heads // held[0].shape[1]
    count, scale, precision = held_places.shape[1], factor(head_dim), None
    together = next(n for n in range(TOGETHER, 0, -1) if group % n == 0)
    if q.dtype == jnp.float32:  # Exact products are six products, and long to compile.
        precision, together = jax.lax.Precision.HIGHEST, 1
    product = functools.partial(
        jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32
    )
    arrays = len(held)

    def kernel(first, counts, steps, whole, q, *refs):
        held_refs, own_refs = refs[: arrays + 1], refs[arrays + 1 : 2 * arrays + 2]
        out, top, total, mixed = refs[2 * arrays + 2 :]
        row, block, step = (pl.program_id(axis) for axis in (0, 2, 3))

        @pl.when(step == 0)
        def _():
            top[...] = jnp.full_like(top, LOWEST)
            total[...] = jnp.zeros_like(total)
            mixed[...] = jnp.zeros_like(mixed)

        def add(places, k, v, k_scale=None, v_scale=None, *, masked):
            # Keys lie along sublanes and queries along lanes, so that maxima and sums over keys are
            # operations of whole vectors.
            keys, values = k[...].astype(q.dtype), v[...].astype(q.dtype)
            if k_scale is not None:
                k_factors = by_key(k_scale[...], size)
                k_factors = k_factors if scaled else k_factors * scale
            v_factors = None if v_scale is None else by_key(v_scale[...], size)
            if masked:
                # Weights of 0 do not hide values that are NaN.
                hidden = by_key(places[...], head_dim) == HIDDEN
                values = jnp.where(hidden, 0.0, values.astype(jnp.float32)).astype(q.dtype)
                places = by_key(places[...], size)
                own = first[row] + block * size
                own += jax.lax.broadcasted_iota(jnp.int32, places.shape, 1)
                mask = places <= own
                if window is not None:
                    mask &= places > own - window
                if v_scale is not None:
                    v_factors = jnp.where(places == HIDDEN, 0.0, v_factors)
            # With rows of ones, the matrix unit adds the weights up, too.
            ones = jnp.ones((ROWS_OF_ONES, len(keys)), values.dtype)
            values = values.T if v_scale is not None else jnp.concatenate([values.T, ones])
            parts = [slice(i, min(i + PART, len(keys))) for i in range(0, len(keys), PART)]

            def score(head, part):
                some = product(keys[part], q[head], (((1,), (1,)), ((), ())))
                if k_scale is not None:
                    some *= k_factors[part]
                elif not scaled:
                    some *= scale
                return jnp.where(mask[part], some, LOWEST) if masked else some

            def weigh(head, scores, ahead):
                """Adds the keys of a head; scores those of the next head, `ahead`, meanwhile."""
                highest, sums, found = top[head], total[head], mixed[head]
                following = []
                for part, some in zip(parts, scores, strict=True):
                    if ahead is not None:
                        following.append(score(ahead, part))
                    before = highest
                    highest = jnp.maximum(before, jnp.max(some, axis=0, keepdims=True))
                    weights, kept = jnp.exp2(some - highest), jnp.exp2(before - highest)
                    found, sums = found * kept, sums * kept
                    if v_factors is not None:
                        sums += jnp.sum(weights, axis=0, keepdims=True)
                        weights *= v_factors[part]
                    weights = weights.astype(q.dtype)
                    more = product(values[:, part], weights, (((1,), (0,)), ((), ())))
                    found += more[:head_dim]
                    if v_factors is None:
                        sums += more[head_dim : head_dim + 1]
                top[head], total[head], mixed[head] = highest, sums, found
                return following

            # The vector unit weighs the keys of a head while the matrix unit multiplies them by the
            # queries of the next head. Both are in one block of instructions, in this order.
            @functools.partial(jax.lax.fori_loop, 0, group // together, init_val=None)
            def _(i, _):
                scores = [score(i * together, part) for part in parts]
                for head in range(together):
                    ahead = i * together + head + 1 if head + 1 < together else None
                    scores = weigh(i * together + head, scores, ahead)

        def by_key(x, width):
            """Turns a number for each key, [1, keys], into [keys, width]."""
            lanes = jnp.broadcast_to(x, (min(width, LANES), x.shape[1])).T
            return jnp.concatenate([lanes] * (width // lanes.shape[1]), axis=1)

        place, seen = steps[row, block, step] >> 1, steps[row, block, step] & 1 == 1
        runs, is_held = step < counts[row, block], place < count
        held_whole = seen & (whole[row, jnp.minimum(place, count - 1)] == 1)
        for refs, mine, open_ in (
            (held_refs, runs & is_held, held_whole),
            (own_refs, runs & ~is_held, seen),
        ):
            run = functools.partial(add, refs[-1], *refs[:-1])
            pl.when(mine & open_)(functools.partial(run, masked=False))
            pl.when(mine & ~open_)(functools.partial(run, masked=True))

        @pl.when(step == pl.num_programs(3) - 1)
        def _():
            @functools.partial(jax.lax.fori_loop, 0, group, init_val=None)
            def _(head, _):
                sums = total[head]
                whole = (mixed[head] / jnp.where(sums == 0.0, 1.0, sums)).T
                out[head] = whole.astype(out.dtype)

    def specs(blocks, number, places):
        size = places.shape[3]

        def at(row, head, block, step, first, counts, steps, whole):
            return row, head, number(steps[row, block, step] >> 1), 0

        def by_lanes(row, head, block, step, *tables):
            row, head, place, _ = at(row, head, block, step, *tables)
            return row, head, 0, place

        def positions(row, head, block, step, *tables):
            return row, at(row, head, block, step, *tables)[2], 0, 0

        return [
            *[pl.BlockSpec((None, None, size, head_dim), at)] * 2,
            *[pl.BlockSpec((None, None, 1, size), by_lanes)] * (len(blocks) - 2),
            pl.BlockSpec((None, None, 1, size), positions),
        ]

    # The cost of all keys, of which most chunks see a part: a block of queries takes the share of
    # this that the blocks of keys that it sees are of all blocks.
    keys = held[0].shape[2] + own[0].shape[2]
    pairs = rows * heads * length * keys
    cost = pl.CostEstimate(
        flops=4 * pairs * head_dim,
        transcendentals=pairs,
        bytes_accessed=2 * q.nbytes + length // size * sum(x.nbytes for x in (*held, *own)),
    )
    queries = pl.BlockSpec((None, group, size, head_dim), lambda b, h, i, *_: (b, h, i, 0))
    lanes = pltpu.VMEM((group, 1, size), jnp.float32)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(rows, kv_heads, length // size, jnp.maximum(jnp.max(tables[1]), 1)),
            in_specs=[
                queries,
                *specs(held, lambda place: jnp.minimum(place, count - 1), held_places),
                *specs(own, lambda place: jnp.maximum(place - count, 0), own_places),
            ],
            out_specs=queries,
            scratch_shapes=[lanes, lanes, pltpu.VMEM((group, head_dim, size), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        cost_estimate=cost,
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=MEMORY),
        name=NAME,
        interpret=interpret,
    )(*tables, q, *held, held_places, *own, own_places)
