"""How queries weigh keys and values: grouped scores, their softmax as yet undivided, the mixture.

It makes no mask, and cuts nothing.
"""

import jax
import jax.numpy as jnp

from mistral_jax.ops.einsum import einsum
from mistral_jax.ops.pieces import Weighed
from mistral_jax.ops.quantized import MaybeQuantized, QuantizedKernel


def weigh(q: jax.Array, k: MaybeQuantized, v: MaybeQuantized, mask: jax.Array) -> Weighed:
    """Weighs values by e to the power of a score less the largest.

    Scores are q k / sqrt(H) (arXiv 1706.03762, section 3.2.1), computed and summed in float32.

    Args:
      q: queries, [B, T, N, H].
      k: keys, [B, S, K, H]. Scales of 8 bits multiply scores, and keys are not written out.
      v: values, likewise; their scales multiply weights.
      mask: which keys each query sees, [B, T, S] bool; of none it sees the weights are equal.

    Returns:
      The largest scores, [B, K, G, T], the weights' sums, likewise, and the weighted values,
      [B, K, G, T, H]; all float32.
    """
    batch, length, _, head_dim = q.shape
    (k, k_scale), (v, v_scale) = _apart(k, q.dtype), _apart(v, q.dtype)
    grouped = q.reshape(batch, length, k.shape[2], -1, head_dim)
    if length == 1:
        scores = einsum("BTKGH,BSKH->BKGTS", grouped, k)
    else:  # Else XLA's CPU backend multiplies k by q, and reads scores across their rows.
        scores = einsum("BKGTH,BSKH->BKGTS", jnp.moveaxis(grouped, 1, 3), k)
    # A large negative instead of -inf: a query that sees nothing gets equal weights, not NaN.
    lowest = jnp.finfo(jnp.float32).min
    scores = jnp.where(mask[:, None, None], scores * (k_scale * head_dim**-0.5), lowest)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - top[..., None])
    # Dividing after the product touches T x H numbers instead of T x S.
    mixed = einsum("BKGTS,BSKH->BKGTH", (weights * v_scale).astype(v.dtype), v)
    return top, jnp.sum(weights, axis=-1), mixed


def _apart(x: MaybeQuantized, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | float]:
    """Returns what to multiply, [B, S, K, H], and what to multiply the product by."""
    if not isinstance(x, QuantizedKernel):
        return x, 1.0
    return x.values.astype(dtype), jnp.moveaxis(x.scale, 1, 3)[:, :, None]
