"""`einsum`: products as the model takes them, with sums in float32."""

import jax
import jax.numpy as jnp


def einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiplies with float32 sums; float32 operands are not rounded, as GPU and TPU would."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)
