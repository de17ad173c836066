"""The TPU's kernel writes a chunk into a ring as a scatter does: interpreted, and lowered."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from test_splash import RULES, on_mesh

from mistral_jax.ops import ring
from mistral_jax.ops.backend import PLAIN, Backend

TPU = Backend("tpu", alone=True, kernels=("flash",))
HEADS, WIDTH = 2, 128


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(ring, "SLOTS", 128)


def example(length, slots, dtype):
    """Makes tables, rows and positions: a row past its ring, a padded one, a new one, no tokens."""
    rng = np.random.default_rng(length)

    def draw(size, width=WIDTH, dtype=dtype):
        numbers = rng.integers(-100, 100, (4, HEADS, size, width))
        return jnp.asarray(numbers, dtype)

    tables, rows = ([draw(size), draw(size)] for size in (slots, length))
    if dtype == "int8":
        tables.append(draw(slots, 1, "float32")[..., 0])
        rows.append(draw(length, 1, "float32")[..., 0])
    positions = np.full((4, length), -1, np.int32)
    for row, (start, column, count) in enumerate(
        [(1000, 0, length), (90, 2, length - 5), (0, 0, length // 2)]
    ):
        positions[row, column : column + count] = np.arange(start, start + count)
    return tables, rows, jnp.asarray(positions)


@pytest.mark.parametrize(
    ("length", "slots", "dtype"),
    [
        (70, 384, "int8"),
        (300, 256, "float32"),  # more tokens than slots
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (16, 384, "bfloat16"),
                (200, 1024, "bfloat16"),
                (512, 128, "float32"),
                (128, 128, "float32"),
                (129, 512, "int8"),
            )
        ),
    ],
)
def test_it_stores_the_last_tokens_of_each_row(length, slots, dtype):
    tables, rows, positions = example(length, slots, dtype)
    found = jax.jit(functools.partial(ring.write, interpret=True))(tables, rows, positions)
    for table, new, ours in zip(tables, rows, found, strict=True):
        expected, new = np.array(table), np.asarray(new)
        for row, column in np.argwhere(positions >= 0):
            expected[row, :, positions[row, column] % slots] = new[row, :, column]
        np.testing.assert_array_equal(ours, expected)
    old = jnp.broadcast_to(5000 + jnp.arange(slots, dtype=jnp.int32)[None], (4, slots))
    expected = np.array(old)
    for row, column in np.argwhere(positions >= 0):
        expected[row, positions[row, column] % slots] = positions[row, column]
    np.testing.assert_array_equal(ring.held(positions, old), expected)


def test_on_a_mesh_each_device_writes_its_rows_and_heads():
    tables, rows, positions = example(16, 128, "float32")
    expected = jax.jit(functools.partial(ring.write, interpret=True))(tables, rows, positions)
    run = jax.jit(functools.partial(ring.write, rules=RULES, interpret=True))
    with on_mesh(2, 2, 2):
        place = functools.partial(jax.device_put, device=PartitionSpec("data", "kv"))
        split = [place(x) for x in tables], [place(x) for x in rows], positions
        found, program = run(*split), run.lower(*split).compile().as_text()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not re.findall(r"all-\w+|collective-permute|reduce-scatter", program)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float32"])
def test_it_lowers_for_a_tpu(monkeypatch, dtype):
    monkeypatch.setattr(ring, "SLOTS", 512)
    tables, rows = (
        [jax.ShapeDtypeStruct((2, 8, n, 128), dtype)] * 2
        + [jax.ShapeDtypeStruct((2, 8, n), jnp.float32)] * 2 * (dtype == "int8")
        for n in (4096, 512)
    )
    export = jax.export.export(jax.jit(ring.write), platforms=["tpu"])
    text = export(tables, rows, jax.ShapeDtypeStruct((2, 512), jnp.int32)).mlir_module()
    assert text.count("stablehlo.custom_call @tpu_custom_call") == 1
    assert "scatter" not in text


def test_it_says_which_tables_it_takes():
    fits = functools.partial(ring.fits, rules=(), backend=TPU)
    table = jnp.zeros((4, 2, 256, 128))
    assert fits([table])
    assert not fits([table], backend=PLAIN)
    assert not fits([table], backend=Backend("tpu", kernels=("flash",)))
    assert not fits([table[..., :64]])
    assert not fits([table[:, :, :200]])
    with on_mesh(2, 2, 2):
        assert fits([table], rules=RULES)
        assert not fits([table])
    with on_mesh(8, 1, 1):
        assert not fits([table], rules=RULES)
