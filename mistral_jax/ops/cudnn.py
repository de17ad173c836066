"""Attention on an NVIDIA GPU with cuDNN's flash attention kernel, called by `attention.attend`.

It computes prompts and training, one block of queries at a time. It has not been run on a GPU yet:
tests replace the kernel by XLA's operations, and `benchmarks/gpu.py` compiles it without a GPU.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np

from mistral_jax.ops import partition
from mistral_jax.ops.partition import Rules
from mistral_jax.ops.pieces import fill

# Queries of a block, which bounds the size of its mask, [B, T, S].
BLOCK = 512
IMPLEMENTATION = "cudnn"


def fits(q: jax.Array, k: jax.Array, v: jax.Array, rules: Rules) -> bool:
    """Tells whether `attend` can take these arrays, on a backend with the kernel.

    The arrays must be all bfloat16 or all float16, with a head width that is a multiple of 8 and at
    most 128. On a mesh, the rules must give each device the keys of its queries.

    Args:
      q: queries, [B, T, N, H].
      k: keys, [B, S, K, H].
      v: values, [B, S, K, H].
      rules: mesh axes of the logical axes.
    """
    dtypes, head_dim = {x.dtype.name for x in (q, k, v)}, q.shape[-1]
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        return False
    if head_dim > 128 or head_dim % 8:
        return False
    return jax.sharding.get_abstract_mesh().empty or partition.fits(q, k, rules)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, rules: Rules = ()
) -> jax.Array:
    """Attends from every query to the keys that the mask shows, with float32 scores and sums.

    Args:
      q: queries, [B, T, N, H].
      k: keys, [B, S, K, H].
      v: values, [B, S, K, H].
      mask: True where a query sees a key, [B, T, S]. A query that sees no key gets a finite output.
      rules: mesh axes of the logical axes.

    Returns:
      [B, T, N, H] in the dtype of `q`.
    """
    return partition.by_device(_attend_rows, rules, of_rows=1)(q, k, v, mask)


def _attend_rows(q, k, v, mask):
    k, v = fill(k, 8, 0), fill(v, 8, 0)
    mask = jnp.pad(mask, [(0, 0), (0, 0), (0, k.shape[1] - mask.shape[2])])
    # The kernel does not read past the last key that any query of the row sees.
    seen, places = jnp.any(mask, axis=1), jnp.arange(1, k.shape[1] + 1, dtype=jnp.int32)[None]
    lengths = jnp.max(jnp.where(seen, places, 1), axis=1)
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask[:, None], key_value_seq_lengths=lengths, implementation=IMPLEMENTATION
    )


@functools.cache
def runs() -> bool:
    """Tells whether the kernel runs here, by trying it once: cuDNN may be missing or too old."""
    return _runs(_attend_rows)


@functools.cache
def trains() -> bool:
    """Tells whether the kernel has a gradient here, by trying it once."""

    def pull(*arrays):
        out, back = jax.vjp(_attend_rows, *arrays)
        return back(out)[2]  # Queries that see one another alike give each value one weight in all.

    return _runs(pull)


def _runs(attend):
    """Tells whether `attend` gives ones for ones."""
    few = np.ones((1, 16, 1, 64), jnp.bfloat16)
    arrays = few, few, few, np.ones((1, 16, 16), bool)
    try:
        # Compiled ahead of the call, it also runs while another program is traced.
        found = jax.jit(lambda *x: attend(*x)).lower(*arrays).compile()(*arrays)
        return bool(np.all(np.asarray(found) == 1))
    except (NotImplementedError, RuntimeError, ValueError) as error:
        logging.getLogger(__name__).debug("no cuDNN, XLA's operations instead: %s", error)
        return False
