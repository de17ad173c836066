"""The gate of an MLP, silu(opened) * raised, with a gradient that a TPU computes in a product."""

import jax
import jax.numpy as jnp

from mistral_jax.ops.backend import Backend
from mistral_jax.ops.rows import stored


def gate(opened: jax.Array, raised: jax.Array, backend: Backend) -> jax.Array:
    """Returns silu(opened) * raised, in their dtype.

    A TPU computes it where the product `raised` is written, and its gradient where the gradient of
    the result is.

    Args:
      opened: output of `gate_proj`, [B, T, F].
      raised: output of `up_proj`, of the same shape and dtype.
      backend: the backend that this is traced for.
    """
    if backend.platform != "tpu":
        return _gate(opened, raised)
    return _gate_in_products(stored(opened, backend), raised)


def _gate(opened, raised):
    # In float32 silu rounds once, as in PyTorch. In 16 bits each operation inside it would round.
    return jax.nn.silu(opened.astype(jnp.float32)).astype(opened.dtype) * raised


# JAX's own gradient keeps an array besides the two, which a TPU would write and read.
_gate_in_products = jax.custom_vjp(_gate)


def _differentiate(given, grad):
    x, raised, grad = (y.astype(jnp.float32) for y in (*given, grad))
    share, dtype = jax.nn.sigmoid(x), given[0].dtype
    opened = grad * raised * (share * (1 + x * (1 - share)))
    return opened.astype(dtype), (grad * (x * share)).astype(dtype)


_gate_in_products.defvjp(lambda *given: (_gate(*given), given), _differentiate)
