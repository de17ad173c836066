import logging
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from mistral_jax import arrays


def parts():
    rng = np.random.default_rng(0)
    return [
        {"a": {"x": rng.standard_normal((8, 6)).astype(np.float32)}},
        {"b": {"y": rng.standard_normal((4, 2, 3)).astype(ml_dtypes.bfloat16)}},
        {"b2": jnp.arange(5.0)},
    ]


def whole():
    return parts()[0] | parts()[1] | parts()[2]


def abstract(sharding=None, dtype=None):
    sharding = sharding or SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, dtype or a.dtype, sharding=sharding), whole()
    )


@pytest.fixture
def written(tmp_path):
    with arrays.Writer(tmp_path / "t") as writer:
        for part in parts():
            writer.add(part)
    return tmp_path / "t"


def equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_what_is_written_in_parts_is_read_whole(written):
    equal(arrays.read(written, abstract()), whole())


def test_shapes_and_dtypes_without_reading(written):
    found = arrays.stored(written)
    assert jax.tree.structure(found) == jax.tree.structure(whole())
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(whole()), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_a_part_is_read_alone(written):
    equal(arrays.read(written, {"b": abstract()["b"]}), parts()[1])


def test_reading_casts(written):
    expected = jax.tree.map(lambda a: np.asarray(a).astype(np.float32), whole())
    equal(arrays.read(written, abstract(dtype=jnp.dtype(jnp.float32))), expected)


def test_reading_puts_arrays_where_they_belong(written):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    rows = NamedSharding(mesh, PartitionSpec("x"))
    wanted = {"a": {"x": jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=rows)}}
    found = arrays.read(written, wanted)
    assert found["a"]["x"].sharding == rows
    equal(found, parts()[0])


def test_a_small_part_may_hold_one_large_array(tmp_path):
    """The bound on what is read at a time has room for any single array."""
    tree = {"large": np.ones((300, 1000), np.float32), "small": np.ones(1, np.float32)}
    with arrays.Writer(tmp_path / "t") as writer:
        writer.add(tree)
    one = SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one), tree)
    equal(arrays.read(tmp_path / "t", wanted), tree)


def test_an_error_comes_with_the_next_part_or_the_end(tmp_path):
    def write_both():
        with arrays.Writer(tmp_path / "t") as writer:
            writer.add({"a": np.ones(3, np.float32)})
            (tmp_path / "t").write_text("in the way")

    with pytest.raises(OSError, match="t"):
        write_both()


def test_an_error_of_the_caller_leaves_no_thread_behind(tmp_path):
    def fail():
        with arrays.Writer(tmp_path / "t") as writer:
            writer.add({"a": np.ones(3, np.float32)})
            raise RuntimeError("ours")

    before = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="ours"):
        fail()
    assert not [t for t in set(threading.enumerate()) - before if "ThreadPool" in t.name]
    assert not (tmp_path / "t").exists()


def test_orbax_is_quiet_and_its_logger_is_left_as_it_was(written, capfd):
    level = logging.getLogger("absl").level
    arrays.read(written, abstract())
    arrays.stored(written)
    assert logging.getLogger("absl").level == level
    assert capfd.readouterr() == ("", "")
