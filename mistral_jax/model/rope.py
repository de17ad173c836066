"""Rotary position embedding (RoFormer, arXiv 2104.09864).

Each pair of a head's elements is rotated by an angle that grows with the token's position, so that
the score of a query and a key depends only on the distance between them. Element i is paired with
element i + H/2, as in Hugging Face's files. Official files pair elements 2i and 2i + 1; conversion
permutes the rows of wq and wk.

Some models change the frequencies to read longer texts (`RopeScaling`), and some multiply queries
by a factor that grows with their position (`QueryScaling`).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mistral_jax.config import QueryScaling, RopeScaling
from mistral_jax.ops.backend import PLAIN, Backend
from mistral_jax.ops.partition import Rules
from mistral_jax.ops.rotation import rotate_halves
from mistral_jax.ops.rows import once


def rotary_angles(
    positions: jax.Array,
    head_dim: int,
    theta: float,
    backend: Backend = PLAIN,
    scaling: RopeScaling | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes the cosine and sine of each rotation, in float32.

    Args:
      positions: position of each token in its text, [B, T] int32; -1 = padding.
      head_dim: width of a head (H).
      theta: base of the geometric sequence of wavelengths.
      backend: the backend that this is traced for.
      scaling: change of the frequencies; None = none.

    Returns:
      The cosines and the sines, each [B, T, H/2] float32, times the attention factor of `scaling`.
    """
    turns = jnp.asarray(frequencies(head_dim, theta, scaling), jnp.float32)[None, None]
    angles = positions[:, :, None].astype(jnp.float32) * turns
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if scaling and scaling.attention_factor not in (None, 1):
        cos, sin = cos * scaling.attention_factor, sin * scaling.attention_factor
    # Without `once`, some backends compute them again in each layer, for each head.
    return once(cos, backend), once(sin, backend)


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Returns the angle between neighbouring positions of each pair, [H/2] float64, in radians.

    Pair i turns by `theta ** (-2i / H)` (RoFormer, arXiv 2104.09864, section 3.2.2). A scaling
    divides the frequencies that make few turns within the original length.

    Args:
      head_dim: width of a head (H).
      theta: base of the geometric sequence of wavelengths.
      scaling: change of the frequencies; None = none.
    """
    plain = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "yarn":
        divided = _yarn_ramp(head_dim, theta, scaling)
    else:
        turns = scaling.original_positions * plain / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        divided = 1 - np.clip((turns - low) / (high - low), 0, 1)
    return plain * (1 - divided) + plain / scaling.factor * divided


def _yarn_ramp(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Returns how much of the division each pair gets, [H/2]: 0 = none, 1 = all of it.

    The ramp is linear in the number of the pair (arXiv 2309.00071, section 3.2), between whole
    numbers, as in the implementations that the models were trained with.
    """

    def pair_with(turns: float) -> float:  # The pair that makes this many turns.
        period = scaling.original_positions / (turns * 2 * math.pi)
        return head_dim * math.log(period) / (2 * math.log(theta))

    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with(scaling.beta_slow)), head_dim - 1)
    width = high - low or 0.001  # A step, where both are the same pair.
    return np.clip((np.arange(head_dim // 2, dtype=np.float64) - low) / width, 0, 1)


def scale_queries(q: jax.Array, positions: jax.Array, scaling: QueryScaling | None) -> jax.Array:
    """Multiplies rotated queries by the factor of their positions, in float32.

    Args:
      q: queries, [B, T, N, H].
      positions: position of each token in its text, [B, T] int32; -1 = padding.
      scaling: the factor; None = 1.

    Returns:
      The scaled queries in the dtype of `q`.
    """
    if scaling is None:
        return q
    spans = jnp.maximum(positions, 0) // scaling.original_positions
    factor = 1 + scaling.beta * jnp.log1p(spans.astype(jnp.float32))
    return (q.astype(jnp.float32) * factor[:, :, None, None]).astype(q.dtype)


def rotate(
    x: jax.Array,
    angles: tuple[jax.Array, jax.Array],
    backend: Backend = PLAIN,
    rules: Rules = (),
    axis: str = "heads",
    factor: float = 1.0,
) -> jax.Array:
    """Rotates every head of `x` [B, T, heads, H] by the angles from `rotary_angles`.

    The other arguments are those of `rotate_halves`.
    """
    return rotate_halves(x, angles, backend, rules, axis, factor)
