"""Arrays on large pages are the arrays that they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mistral_jax.base import memory
from mistral_jax.checkpoint import checkpoint

LARGE = 2 << 20
# What moves is tested where it can; that nothing else does, everywhere.
GIVEN = pytest.mark.skipif(
    not memory._LARGE_PAGES.is_file(), reason="this system gives no large pages on request"
)


@pytest.fixture(autouse=True)
def setting(monkeypatch, tmp_path):
    file = tmp_path / "enabled"
    file.write_text("always [madvise] never\n")
    monkeypatch.setattr(memory, "_LARGE_PAGES", file)
    return file


def flags(address):
    """Returns the flags of the mapping that has an address."""
    found = None
    with open("/proc/self/smaps") as file:
        for line in file:
            name, *rest = line.split()
            if not name.endswith(":"):
                begin, end = (int(number, 16) for number in name.split("-"))
                found = begin <= address < end
            elif found and name == "VmFlags:":
                return rest
    return None


@GIVEN
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
@pytest.mark.parametrize("extra", [0, 1, 4096, LARGE - 1])
def test_they_keep_their_numbers_and_begin_a_large_page(dtype, extra):
    numbers = np.random.default_rng(extra).integers(0, 2, (LARGE + extra, 1)).astype(dtype)
    array = jnp.asarray(numbers)
    sharding = array.sharding
    moved = memory.to_large_pages({"a": [array]})["a"][0]
    assert array.is_deleted()
    assert (moved.dtype, moved.sharding) == (numbers.dtype, sharding)
    np.testing.assert_array_equal(moved, numbers)
    address = moved.unsafe_buffer_pointer()
    assert address % LARGE == 0
    assert "hg" in flags(address)  # asked for; whether it was given is the system's business
    assert "hg" not in flags(address + moved.nbytes // LARGE * LARGE)


def test_the_small_and_the_split_stay():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put(jnp.ones((8, LARGE)), NamedSharding(mesh, PartitionSpec("x")))
    tree = {"small": jnp.ones(LARGE // 4 - 1), "split": split}
    moved = memory.to_large_pages(tree)
    assert all(moved[name] is tree[name] for name in tree)


@pytest.mark.parametrize("text", ["[always] madvise never", "always madvise [never]", None])
def test_nothing_moves_where_the_system_does_not_ask(setting, text):
    setting.unlink() if text is None else setting.write_text(text)
    array = jnp.ones(LARGE)
    assert memory.to_large_pages(array) is array


@GIVEN
def test_they_can_be_given_away():
    moved = memory.to_large_pages(jnp.ones(LARGE))
    doubled = jax.jit(lambda x: 2 * x, donate_argnums=0)(moved)
    assert moved.is_deleted()
    np.testing.assert_array_equal(doubled, np.full(LARGE, 2, np.float32))


@GIVEN
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_model_is_loaded_onto_them(quantize):
    _, params, _ = checkpoint.load(dtype="float32", quantize=quantize)
    large = [array for array in jax.tree.leaves(params) if array.nbytes >= LARGE]
    assert large
    assert all("hg" in flags(array.unsafe_buffer_pointer()) for array in large)
