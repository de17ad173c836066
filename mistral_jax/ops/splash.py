"""Attention on a TPU by the splash kernel of `jax.experimental.pallas`, behind `attention.attend`.

It applies where keys stand in the order of their queries; `fits` says what else it takes. Its speed
has not been measured: tests interpret the kernel on a CPU, and lower it for a TPU that is not here.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mistral_jax.ops import partition
from mistral_jax.ops.partition import Rules
from mistral_jax.ops.pieces import fill

# Queries, and keys, that the kernel reads at a time: at most so many, and a multiple of a TPU's
# lanes, for it compares the texts of a block lane by lane.
BLOCK = 512
LANES = 128
# The text of what is no token: a number that no text has.
NO_TEXT = jnp.iinfo(jnp.int32).min


def fits(q: jax.Array, k: jax.Array, v: jax.Array, rules: Rules, alone: bool) -> bool:
    """Whether `attend` can take these arrays; else attention by blocks has to.

    They are all float32 or all bfloat16, with as many queries as the smallest block. XLA cannot
    split a kernel: where there are several devices, a mesh must be in use (`jax.set_mesh`), and its
    rules must give each device the keys of its queries.

    Args:
      q: queries, [B, T, N, H].
      k: keys, [B, S, K, H].
      v: values, [B, S, K, H].
      rules: mesh axes of the logical axes.
      alone: whether there is one device, where no mesh is in use.
    """
    dtypes = {x.dtype.name for x in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= {"float32", "bfloat16"} or q.shape[1] < LANES:
        return False
    if jax.sharding.get_abstract_mesh().empty:
        return alone
    return partition.fits(q, k, rules)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    window: int | None,
    rules: Rules = (),
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attends from every query to the keys that it may see; key (S - T) + i is that of query i.

    Scores and sums are float32, as in `attention.attend`, and float32 operands are not rounded;
    bfloat16 queries are, once more, when they are scaled by H ** -0.5. It holds no T x S numbers,
    and has a gradient.

    Arguments are those of `attention.attend` with `aligned` keys, and `interpret`: whether to run
    the kernel step by step, on any device.
    """
    # The kernel's window is one of places in the array, and it compares texts: a text is known by
    # where its position 0 stands, or would stand.
    kv_texts = _texts(kv_positions, 0)
    q_texts = _texts(q_positions, k.shape[1] - q.shape[1])
    run = functools.partial(_attend_rows, window=window, interpret=interpret)
    return partition.by_device(run, rules, of_rows=2)(q, k, v, q_texts, kv_texts)


def _texts(positions: jax.Array, offset: int) -> jax.Array:
    texts = jnp.arange(offset, offset + positions.shape[1], dtype=jnp.int32)[None] - positions
    return jnp.where(positions >= 0, texts, NO_TEXT)


def _attend_rows(q, k, v, q_texts, kv_texts, window, interpret):
    """Attends on one device, with lengths filled up to whole blocks."""
    length, keys = q.shape[1], k.shape[1]
    blocks = _block(length), _block(keys)
    run = functools.partial(
        _run_kernel, window=window, offset=keys - length, blocks=blocks, interpret=interpret
    )
    scaled = (q.astype(jnp.float32) * q.shape[3] ** -0.5).astype(q.dtype)
    # A TPU multiplies in bfloat16 unless it is told not to. The kernel takes "highest" for float32
    # alone.
    mixed = _at_precision(run, "highest" if q.dtype == jnp.float32 else "default")(
        _head_major(scaled, blocks[0]),
        _head_major(k, blocks[1]),
        _head_major(v, blocks[1]),
        fill(q_texts, blocks[0], NO_TEXT),
        fill(kv_texts, blocks[1], NO_TEXT),
    )
    return jnp.swapaxes(mixed, 1, 2)[:, :length]


def _block(length: int) -> int:
    """Returns the size of the fewest blocks of at most `BLOCK` that cover a length."""
    size = -(-length // -(-length // BLOCK))
    return size + -size % LANES


def _at_precision(run: Callable, precision: str) -> Callable:
    """Sets the precision of products in `run` and in its gradient, which is traced later."""

    @jax.custom_vjp
    def precise(*arrays):
        with jax.default_matmul_precision(precision):
            return run(*arrays)

    def forward(q, k, v, q_texts, kv_texts):
        with jax.default_matmul_precision(precision):
            return jax.vjp(lambda *qkv: run(*qkv, q_texts, kv_texts), q, k, v)

    def backward(pull, gradient):
        with jax.default_matmul_precision(precision):
            return *pull(gradient), None, None

    precise.defvjp(forward, backward)
    return precise


def _run_kernel(q, k, v, q_texts, kv_texts, *, window, offset, blocks, interpret):
    """Attends from q [B, N, T, H] to k and v [B, K, S, H], all of whole blocks."""
    # Imported where it is used: it takes a tenth of a second, which only a TPU needs to spend.
    from jax.experimental.pallas.ops.tpu import splash_attention

    before = None if window is None else window - 1
    shape = (q.shape[2], k.shape[2])
    mask = splash_attention.LocalMask(shape, (before, 0), offset)
    q_block, kv_block = blocks
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([mask] * q.shape[1]),
        block_sizes=splash_attention.BlockSizes(
            block_q=q_block,
            block_kv=kv_block,
            block_q_dkv=q_block,
            block_kv_dkv=kv_block,
            block_q_dq=q_block,
            block_kv_dq=kv_block,
        ),
        interpret=interpret,
    )
    return jax.vmap(kernel)(q, k, v, splash_attention.SegmentIds(q_texts, kv_texts))


def _head_major(x: jax.Array, block: int) -> jax.Array:
    """Fills [B, T, N, H] up to whole blocks, as [B, N, T, H]."""
    return jnp.swapaxes(fill(x, block, 0), 1, 2)
