"""Batches over devices: which rows of one lie where. It makes none, and reads no files."""

import jax
import numpy as np

from mistral_jax.parallel.sharding import Layout
from mistral_jax.training.loss import IGNORED
from mistral_jax.training.step import Batch


def spread(batch: Batch, layout: Layout, microbatches: int = 1) -> Batch:
    """Lays a batch over devices, filled up with padding to what they share evenly."""

    def place(x, value):
        axes = ("batch", *[None] * (x.ndim - 2), "length")
        parts = [layout.parts(axis) if axis else 1 for axis in axes]
        parts[0] *= microbatches
        extra = [(0, -size % part) for size, part in zip(x.shape, parts, strict=True)]
        filled = np.pad(x, extra, constant_values=value)
        sharding = layout.sharding(*axes)
        return jax.make_array_from_callback(filled.shape, sharding, lambda index: filled[index])

    return Batch(
        place(batch.tokens, 0),
        place(batch.positions, -1),
        place(batch.targets, IGNORED),
        None if batch.weights is None else place(batch.weights, 0),
    )


def own_rows(layout: Layout, rows: int, microbatches: int = 1) -> list[int]:
    """Returns which rows of a batch lie on devices of this process: `spread` looks at no others."""
    filled = rows + -rows % (layout.parts("batch") * microbatches)
    parts = layout.sharding("batch").addressable_devices_indices_map((filled,)).values()
    return sorted({row for (part,) in parts for row in range(filled)[part] if row < rows})
