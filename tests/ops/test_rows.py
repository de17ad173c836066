"""Rows of tables are moved as bits on a CPU only, and the same rows on every backend."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

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


@pytest.mark.parametrize(
    ("platform", "tokens", "barriers"), [("tpu", 1, 1), ("tpu", 2, 0), ("gpu", 1, 0), ("cpu", 1, 0)]
)
def test_only_a_tpu_keeps_products_of_single_tokens_apart(platform, tokens, barriers):
    run = functools.partial(rows.apart, backend=Backend(platform))
    program = str(jax.make_jaxpr(run)(jnp.zeros((2, tokens, 3))))
    assert program.count("optimization_barrier") == barriers


@pytest.mark.parametrize(("batch", "in_place"), [(4, True), (3, False)])
def test_each_device_writes_its_own_rows_and_heads(batch, in_place):
    rules = (("batch", "data"), ("kv_heads", "kv"))
    table = jnp.arange(batch * 2 * 5 * 3, dtype=jnp.float32).reshape(batch, 2, 5, 3)
    new, slots = -table[:, :, 1:3], jnp.arange(2 * batch).reshape(batch, 2) % 6  # 5 = not written
    expected = table.swapaxes(1, 2)
    expected = rows.put(expected, new.swapaxes(1, 2), slots).swapaxes(1, 2)
    np.testing.assert_array_equal(rows.put(table, new, slots, 2), expected)
    mesh = jax.make_mesh((2, 2), ("data", "kv"), (AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        if in_place:
            table, new = (jax.device_put(x, PartitionSpec("data", "kv")) for x in (table, new))
        run = jax.jit(lambda *given: rows.put(*given, axis=2, rules=rules))
        program = run.lower(table, new, slots).compile()
        np.testing.assert_array_equal(program(table, new, slots), expected)
    assert not in_place or not re.search(r"all-\w+|collective-permute", program.as_text())
