"""Rotary position embedding (RoFormer, arXiv 2104.09864).

Each pair of a head's elements is rotated by an angle that grows with the token's position, so that
the score of a query and a key depends only on the distance between them. Element i is paired with
element i + H/2, as in Hugging Face's files. Official files pair elements 2i and 2i + 1; conversion
permutes the rows of wq and wk.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mistral_jax.ops.backend import PLAIN, Backend
from mistral_jax.ops.products import rotate_halves
from mistral_jax.ops.rows import once


def rotary_angles(
    positions: jax.Array, head_dim: int, theta: float, backend: Backend = PLAIN
) -> tuple[jax.Array, jax.Array]:
    """Computes the cosine and sine of each rotation, in float32.

    Pair i at position p is rotated by `p * theta ** (-2i / H)` radians (RoFormer, arXiv
    2104.09864, section 3.2.2).

    Args:
      positions: position of each token in its text, [B, T] int32; -1 = padding.
      head_dim: width of a head (H).
      theta: base of the geometric sequence of wavelengths.
      backend: the backend that this is traced for.

    Returns:
      The cosines and the sines, each [B, T, H/2] float32.
    """
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    frequencies = jnp.asarray(frequencies, jnp.float32)[None, None]
    angles = positions[:, :, None].astype(jnp.float32) * frequencies
    # Without `once`, some backends compute them again in each layer, for each head.
    return once(jnp.cos(angles), backend), once(jnp.sin(angles), backend)


def rotate(
    x: jax.Array, angles: tuple[jax.Array, jax.Array], backend: Backend = PLAIN
) -> jax.Array:
    """Rotates every head of `x` [B, T, heads, H] by the angles from `rotary_angles`."""
    cos, sin = (a[:, :, None, :] for a in angles)
    return rotate_halves(x, cos, sin, backend)
