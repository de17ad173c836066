"""Attention from one token of each row on an NVIDIA GPU, with a Pallas kernel that Triton compiles.

`attention.attend` calls it in decoding. The kernel reads only the filled slots of a cache. It has
not been run on a GPU yet: tests interpret it, and `benchmarks/gpu.py` compiles it without a GPU.
"""

import functools
import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mistral_jax.ops import partition
from mistral_jax.ops.partition import Rules
from mistral_jax.ops.quantized import MaybeQuantized, QuantizedMatrix

# Slots that a program of the kernel reads at a time.
BLOCK = 64
# Tensor cores multiply at least this many rows and columns.
LEAST = 16
# The slots of a row are divided among programs until there are about this many of them, which is
# several for each multiprocessor.
PROGRAMS = 256
WARPS, STAGES = 4, 3
LOWEST = float(jnp.finfo(jnp.float32).min)

Mask = Callable[[jax.Array, jax.Array], jax.Array]


def fits(q: jax.Array, k: MaybeQuantized, rules: Rules) -> bool:
    """Tells whether `attend` can take these arrays, on a backend with the kernel.

    The keys must be of the queries' dtype or int8, the head width a power of two from 16 to 256,
    and the number of slots a multiple of 16. On a mesh, the rules must give each device the keys of
    its queries.

    Args:
      q: queries, [B, 1, N, H].
      k: keys, [B, S, K, H].
      rules: mesh axes of the logical axes.
    """
    kept = k.values.dtype if isinstance(k, QuantizedMatrix) else k.dtype
    dtypes = ("bfloat16", "float16", "float32")
    if q.dtype.name not in dtypes or kept not in (q.dtype, jnp.int8):
        return False
    if q.shape[1] != 1 or q.shape[3] not in (16, 32, 64, 128, 256) or k.shape[1] % LEAST:
        return False
    return jax.sharding.get_abstract_mesh().empty or partition.fits(q, k, rules)


def attend(
    mask: Mask,
    q: jax.Array,
    k: MaybeQuantized,
    v: MaybeQuantized,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    rules: Rules = (),
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attends from one query of each row to the slots of a cache that it sees.

    Scores and sums are float32. There is no gradient.

    Args:
      mask: returns the mask, [1, 1, s] bool, of positions [1, 1] and [1, s]. The kernel calls it.
      q: queries, [B, 1, N, H].
      k: keys, [B, S, K, H]; int8 keys have scales [B, S, K, 1].
      v: values, in the same form.
      q_positions: position of each query in its text, [B, 1] int32; -1 = padding, whose output is
        finite and has no meaning.
      kv_positions: position of the key in each slot, [B, S] int32; -1 = empty slot. The key of
        position p is in slot p mod S.
      rules: mesh axes of the logical axes.
      interpret: whether Pallas interprets the kernel, which works on any device.

    Returns:
      [B, 1, N, H] in the dtype of `q`.
    """
    run = functools.partial(_attend_rows, mask, interpret)
    return partition.by_device(run, rules, of_rows=2)(q, k, v, q_positions, kv_positions)


def _attend_rows(mask, interpret, q, k, v, q_positions, kv_positions):
    """Attends on one device: each program to some of a row's slots, then all are combined."""
    # The import takes a tenth of a second, so other backends skip it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    batch, _, heads, head_dim = q.shape
    slots, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    block = math.gcd(slots, BLOCK)
    parts = min(slots // block, -(-PROGRAMS // (batch * kv_heads)))
    scaled = isinstance(k, QuantizedMatrix)
    numbers = [x.values if scaled else x for x in (k, v)]
    scales = [x.scale[..., 0] for x in (k, v)] if scaled else []

    def of_row(size):
        return pl.BlockSpec((None, size), lambda p, j, i: (i, 0))

    def of_head(*shape):  # of [B, K, ...]
        return pl.BlockSpec((None, None, *shape), lambda p, j, i: (i, j, *[0] * len(shape)))

    def of_slots(*shape):  # of [B, S, K, ...]
        return pl.BlockSpec(
            (None, slots, None, *shape), lambda p, j, i: (i, 0, j, *[0] * len(shape))
        )

    def of_part(*shape):  # of [B, K, parts, ...]
        return pl.BlockSpec(
            (None, None, None, *shape), lambda p, j, i: (i, j, p, *[0] * len(shape))
        )

    rows = group + -group % LEAST
    shape = (batch, kv_heads, parts, group)
    mixed, total, top = pl.pallas_call(
        functools.partial(_kernel, mask, group, block, parts),
        grid=(parts, kv_heads, batch),
        in_specs=[
            *(of_row(1), of_row(slots), of_head(rows, head_dim)),
            *(of_slots(head_dim), of_slots(head_dim)),
            *(of_slots() for _ in scales),
        ],
        out_specs=[of_part(rows, head_dim), of_part(rows), of_part(rows)],
        out_shape=[
            jax.ShapeDtypeStruct((*shape, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name="attend_filled",
    )(
        *(q_positions, kv_positions, q.reshape(batch, kv_heads, group, head_dim)),
        *(*numbers, *scales),
    )
    weight = jnp.exp(top - jnp.max(top, axis=2, keepdims=True))
    total = jnp.sum(weight * total, axis=2)
    mixed = jnp.sum(weight[..., None] * mixed, axis=2)
    # A row without filled slots has no weights.
    return (mixed / jnp.maximum(total, 1e-30)[..., None]).astype(q.dtype).reshape(q.shape)


def _kernel(mask, group, block, parts, own_ref, places_ref, q_ref, k_ref, v_ref, *rest):
    """Attends from the queries of one key-value head to every `parts`-th block of its slots.

    It keeps for each query the largest score so far, the sum of its weights and the weighted
    values (arXiv 1805.02867).
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    *scale_refs, mixed_ref, total_ref, top_ref = rest
    rows, head_dim = q_ref.shape
    real = jnp.arange(rows, dtype=jnp.int32) < group
    real_wide = jnp.broadcast_to(real[:, None], (rows, head_dim))
    q = triton.load(q_ref.at[:, :], mask=real_wide, other=0)
    own = own_ref[0]
    # Slots are filled from the first on, and a ring is full once it has been filled.
    filled = jnp.minimum(own + 1, k_ref.shape[0])
    blocks = (filled + block - 1) // block
    first = pl.program_id(0)

    # By default a GPU rounds float32 operands to fewer bits.
    exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    dot = functools.partial(triton.dot, precision=exact)

    def numbers(ref, at):
        return ref[at, :].astype(q.dtype)

    def add(i, found):
        top, total, mixed = found
        at = pl.ds((first + i * parts) * block, block)
        scores = dot(q, numbers(k_ref, at), trans_b=True) * head_dim**-0.5
        if scale_refs:
            scores *= scale_refs[0][at][None]
        seen = mask(own[None, None], places_ref[at][None])[0]
        scores = jnp.where(seen, scores, LOWEST)
        higher = jnp.maximum(top, jnp.max(scores, axis=1))
        weights, fade = jnp.exp(scores - higher[:, None]), jnp.exp(top - higher)
        total = fade * total + jnp.sum(weights, axis=1)
        if scale_refs:
            weights *= scale_refs[1][at][None]
        more = dot(weights.astype(q.dtype), numbers(v_ref, at))
        return higher, total, fade[:, None] * mixed + more

    nothing = (
        jnp.full(rows, LOWEST, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((rows, head_dim), jnp.float32),
    )
    count = (blocks - first + parts - 1) // parts
    top, total, mixed = jax.lax.fori_loop(0, count, add, nothing)
    triton.store(mixed_ref.at[:, :], mixed, mask=real_wide)
    triton.store(total_ref.at[:], total, mask=real)
    triton.store(top_ref.at[:], top, mask=real)


@functools.cache
def runs() -> bool:
    """Tells whether the kernel runs here, by trying it once on keys whose result is known."""
    ones = np.ones((1, 2 * BLOCK, 1, 64), jnp.bfloat16)
    places = np.arange(2 * BLOCK, dtype=np.int32)[None]
    arrays = ones[:, :1], ones, ones, places[:, -1:], places
    try:
        # Compiled ahead of the call, it also runs while another program is traced.
        run = jax.jit(functools.partial(attend, _all)).lower(*arrays).compile()
        return bool(np.all(np.asarray(run(*arrays)) == 1))
    except (NotImplementedError, RuntimeError, ValueError) as error:
        logging.getLogger(__name__).debug("no Triton, XLA's operations instead: %s", error)
        return False


def _all(q_positions, kv_positions):
    return q_positions[:, :, None] >= kv_positions[:, None, :]
