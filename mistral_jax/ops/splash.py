"""Attention on a TPU with the splash kernel of `jax.experimental.pallas`.

`attention.attend` calls it if keys are in the order of their queries and `fits` is True. Its speed
has not been measured: tests interpret the kernel on a CPU, and lower it for a TPU without running
it.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mistral_jax.ops import partition
from mistral_jax.ops.partition import Rules
from mistral_jax.ops.pieces import fill

# The most queries, and keys, that the kernel reads at a time. Blocks are multiples of a TPU's
# lanes, because the kernel compares the texts of a block lane by lane.
BLOCK = 512
LANES = 128
# The name of the kernel's output and statistics for a policy of `jax.checkpoint`, which can save
# them instead of running the kernel again.
SAVED = "attention"
# The text number of padding, which no text has.
NO_TEXT = jnp.iinfo(jnp.int32).min


def fits(q: jax.Array, k: jax.Array, v: jax.Array, rules: Rules, alone: bool) -> bool:
    """Tells whether `attend` can take these arrays.

    The arrays must be all float32 or all bfloat16, with at least `LANES` queries. XLA cannot
    partition a kernel: with several devices, a mesh must be in use (`jax.set_mesh`), and the rules
    must give each device the keys of its queries.

    Args:
      q: queries, [B, T, N, H].
      k: keys, [B, S, K, H].
      v: values, [B, S, K, H].
      rules: mesh axes of the logical axes.
      alone: whether the program runs on one device, without a mesh.
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
    """Attends from every query to the keys that it sees; key S - T + i is the key of query i.

    Scores and sums are float32, and float32 operands are not rounded. bfloat16 queries are rounded
    once more than in `attention.attend`, after they are scaled by H ** -0.5. The kernel needs no
    memory for T x S scores, and has a gradient.

    The arguments are those of `attention.attend`. With `interpret`, Pallas interprets the kernel,
    which works on any device.
    """
    # The kernel's window counts indices of the array, and it keeps texts apart by number. All
    # tokens of a text have the same (index - position), which serves as the number.
    kv_texts = _texts(kv_positions, 0)
    q_texts = _texts(q_positions, k.shape[1] - q.shape[1])
    run = functools.partial(_attend_rows, window=window, interpret=interpret)
    return partition.by_device(run, rules, of_rows=2)(q, k, v, q_texts, kv_texts)


def _texts(positions: jax.Array, offset: int) -> jax.Array:
    texts = jnp.arange(offset, offset + positions.shape[1], dtype=jnp.int32)[None] - positions
    return jnp.where(positions >= 0, texts, NO_TEXT)


def _attend_rows(q, k, v, q_texts, kv_texts, window, interpret):
    """Attends on one device, with T and S padded to whole blocks."""
    length, keys = q.shape[1], k.shape[1]
    blocks = _block(length), _block(keys)
    run = functools.partial(
        _run_kernel, window=window, offset=keys - length, blocks=blocks, interpret=interpret
    )
    scaled = (q.astype(jnp.float32) * q.shape[3] ** -0.5).astype(q.dtype)
    # By default a TPU multiplies float32 in bfloat16. The kernel takes "highest" for float32 only.
    mixed = _at_precision(run, "highest" if q.dtype == jnp.float32 else "default")(
        _head_major(scaled, blocks[0]),
        _head_major(k, blocks[1]),
        _head_major(v, blocks[1]),
        fill(q_texts, blocks[0], NO_TEXT),
        fill(kv_texts, blocks[1], NO_TEXT),
    )
    return jnp.swapaxes(mixed, 1, 2)[:, :length]


def _block(length: int) -> int:
    """Returns the size of a block: the length in as few blocks of at most `BLOCK` as possible."""
    size = -(-length // -(-length // BLOCK))
    return size + -size % LANES


def _at_precision(run: Callable, precision: str) -> Callable:
    """Sets the precision of products in `run` and in its gradient, which JAX traces later."""

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
    """Attends from q [B, N, T, H] to k and v [B, K, S, H], where T and S are whole blocks."""
    # The import takes a tenth of a second, so other backends skip it.
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
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
    return jax.vmap(kernel)(q, k, v, splash_attention.SegmentIds(q_texts, kv_texts))


def _head_major(x: jax.Array, block: int) -> jax.Array:
    """Pads [B, T, N, H] to whole blocks along T, and transposes it to [B, N, T, H]."""
    return jnp.swapaxes(fill(x, block, 0), 1, 2)
