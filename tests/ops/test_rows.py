"""Rows of tables are moved as bits on a CPU only, and the same rows on every backend."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mistral_jax.engine.decode import put_rows
from mistral_jax.ops import rows
from mistral_jax.ops.backend import Backend

TABLE = jnp.arange(48, dtype=jnp.bfloat16).reshape(2, 4, 3, 2)
NEW = -TABLE[:, :2]
SLOTS = jnp.array([[3, 1], [4, 0]])  # slot 4 does not exist

MOVES = {
    "put": lambda backend: rows.put(TABLE, NEW, SLOTS, backend=backend),
    "pick": lambda backend: rows.pick(TABLE, NEW, SLOTS, backend=backend),
    "put_rows": lambda backend: put_rows(TABLE, -TABLE[:1], jnp.int32(1), backend),
}


@pytest.mark.parametrize("move", MOVES)
def test_only_a_cpu_moves_bits(move):
    """A bitcast is a pass over the whole cache on a TPU, at a quarter of a copy's speed."""
    found = {}
    for platform in ("cpu", "gpu", "tpu"):
        run = MOVES[move]
        program = str(jax.make_jaxpr(lambda run=run, at=platform: run(Backend(at)))())
        assert bool(re.search("bitcast|barrier", program)) == (platform == "cpu")
        found[platform] = np.asarray(run(Backend(platform)))
    np.testing.assert_array_equal(found["tpu"], found["cpu"])
    np.testing.assert_array_equal(found["gpu"], found["cpu"])
