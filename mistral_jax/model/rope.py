"""Rotary position embedding from positions. It knows no cache and no mask.

The layout is half-split: element i of a head is paired with element i + H/2, as in Hugging Face's
files. Official files pair 2i with 2i + 1; conversion permutes them.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mistral_jax.ops.backend import PLAIN, Backend
from mistral_jax.ops.rows import once


def rotary_angles(
    positions: jax.Array, head_dim: int, theta: float, backend: Backend = PLAIN
) -> tuple[jax.Array, jax.Array]:
    """Computes the rotation of every position, in float32.

    Pair i at position p turns by `p * theta ** (-2i / H)` (RoFormer, arXiv 2104.09864).

    Args:
      positions: place of each token in its text, [B, T] int32; -1 = padding.
      head_dim: width of a head (H).
      theta: base of the geometric sequence of wavelengths.
      backend: what this is traced for.

    Returns:
      The cosines and the sines, each [B, T, H/2] float32.
    """
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    frequencies = jnp.asarray(frequencies, jnp.float32)[None, None]
    angles = positions[:, :, None].astype(jnp.float32) * frequencies
    # Not in each layer, once for each head.
    return once(jnp.cos(angles), backend), once(jnp.sin(angles), backend)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates every head of `x` [B, T, heads, H] by `angles`, as `rotary_angles` gives them."""
    cos, sin = (a[:, :, None, :] for a in angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
