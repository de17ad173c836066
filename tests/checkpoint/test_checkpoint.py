import contextlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import mistral_common
import numpy as np
import pytest
import sources
import tiny
from flax.traverse_util import flatten_dict

import mistral_jax
from mistral_jax.base import memory
from mistral_jax.base.output import Progress
from mistral_jax.checkpoint import checkpoint, manifest, quantization


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model in bfloat16, and the folder that it was saved to."""
    model, params = tiny.build()
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    path = tmp_path_factory.mktemp("saved") / "checkpoint"
    checkpoint.save(path, model.config, params, provenance={"source": "a test"})
    return path, model.config, params


def equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def dtypes(params):
    return {leaf.dtype for leaf in jax.tree.leaves(params)}


def test_a_model_comes_back_ready_to_apply(saved):
    path, config, params = saved
    model, found, tokenizer = mistral_jax.load(path)
    assert model.config == config
    assert tokenizer is None
    equal(found, params)
    tokens = jnp.arange(6)[None]
    expected, _ = tiny.forward(tiny.build()[0], found, tokens, tokens)
    logits, _ = tiny.forward(model, found, tokens, tokens)
    np.testing.assert_array_equal(logits, expected)


def test_on_a_cpu_the_dtype_is_float32_unless_told(saved):
    path, _, params = saved
    for dtype, expected in ((None, "float32"), ("bfloat16", "bfloat16"), (jnp.float16, "float16")):
        model, found, _ = checkpoint.load(path, dtype=dtype)
        assert model.dtype == jnp.dtype(expected)
        assert dtypes(found) == {jnp.dtype(expected)}
    equal(checkpoint.load(path, dtype="bfloat16")[1], params)


def test_a_dtype_that_is_none(saved):
    for dtype in ("int8", "float64", "bf16", "float"):
        with pytest.raises(ValueError, match=rf"dtype is '{dtype}'; expected bfloat16 or"):
            checkpoint.load(saved[0], dtype=dtype)


@pytest.mark.parametrize(
    ("sharding", "mesh", "devices"),
    [("single", {}, 1), ("fsdp", {}, 8), ("data_tensor", {}, 8), ("tensor", {"tensor": 4}, 4)],
)
def test_arrays_go_straight_to_their_devices(tmp_path, sharding, mesh, devices):
    model, params = tiny.build(vocab_size=56, dim=32, hidden_dim=48, n_heads=8, n_kv_heads=4)
    checkpoint.save(tmp_path / "x", model.config, params)
    model, found, _ = checkpoint.load(tmp_path / "x", sharding=sharding, mesh=mesh)
    equal(found, params)
    used = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(found)}
    assert used == {devices}
    assert bool(model.rules) == (sharding != "single")
    # What is on several devices can be saved again.
    checkpoint.save(tmp_path / "y", model.config, found)
    equal(checkpoint.load(tmp_path / "y")[1], params)


def test_a_tied_model_has_no_output(tmp_path):
    model, params = tiny.build(tied=True)
    checkpoint.save(tmp_path / "x", model.config, params)
    found, loaded, _ = checkpoint.load(tmp_path / "x")
    assert found.config.tie_embeddings
    assert "lm_head" not in loaded
    equal(loaded, params)


def test_windows_by_layer_are_kept(tmp_path):
    model, params = tiny.build(sliding_window=[None, 3])
    checkpoint.save(tmp_path / "x", model.config, params)
    assert checkpoint.load(tmp_path / "x")[0].config.sliding_window == (None, 3)


def test_provenance_is_kept(saved):
    assert manifest.read(saved[0])[1] == {"source": "a test"}


def test_overwriting_is_asked_for(tmp_path):
    model, params = tiny.build()
    checkpoint.save(tmp_path / "x", model.config, params)
    other = jax.tree.map(lambda a: a + 1, params)
    with pytest.raises(ValueError, match="exists"):
        checkpoint.save(tmp_path / "x", model.config, other)
    equal(checkpoint.load(tmp_path / "x")[1], params)
    checkpoint.save(tmp_path / "x", model.config, other, overwrite=True)
    equal(checkpoint.load(tmp_path / "x")[1], other)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_no_other_folder_is_overwritten(tmp_path):
    model, params = tiny.build()
    (tmp_path / "precious").write_text("data")
    with pytest.raises(ValueError, match=r"has precious, .* left as it is"):
        checkpoint.save(tmp_path, model.config, params, overwrite=True)
    assert (tmp_path / "precious").read_text() == "data"


def test_a_checkpoint_with_the_user_s_files_is_not_overwritten(saved, tmp_path):
    _, config, params = saved
    path = tmp_path / "x"
    checkpoint.save(path, config, params)
    for name in ("notes.txt", "params/state/mine/notes.txt", "src/a.py"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).touch()
        with pytest.raises(ValueError, match=rf"x has {name}, which .*; it is left as it is"):
            checkpoint.save(path, config, params, overwrite=True)
        (path / name).unlink()
        if "/" in name:
            (path / name).parent.rmdir()
    for name in (".DS_Store", "params/._x"):
        (path / name).touch()
    checkpoint.save(path, config, params, overwrite=True)


def test_parameters_of_another_model_are_not_saved(tmp_path):
    model, params = tiny.build()
    for change, message in (
        ({"final_norm": {"scale": jnp.ones(31)}}, r"has \(31,\) as final_norm/scale; .* \(32,\)"),
        ({"final_norm": {}}, r"has nothing as final_norm/scale; expected \(32,\)"),
        ({"more": jnp.ones(3)}, r"has \(3,\) as more; expected nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.save(tmp_path / "x", model.config, params | change)
    assert not any(tmp_path.iterdir())


def test_a_parameter_that_was_not_written_leaves_nothing(tmp_path):
    with (
        pytest.raises(ValueError, match=r"has nothing as b; expected \(2,\)"),
        checkpoint.create(tmp_path / "x", tiny.build()[0].config, {"a": (3,), "b": (2,)}) as write,
    ):
        write("a", np.ones(3))
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_of_another_model(saved, tmp_path):
    _, config, params = saved
    checkpoint.save(tmp_path / "x", config, params)
    fields = config.to_dict() | {"num_layers": 3}
    manifest.write(tmp_path / "x", type(config).from_dict(fields), {})
    with pytest.raises(ValueError, match=r"params has 2 layers; expected 3, as config\.json says"):
        checkpoint.load(tmp_path / "x")


def test_an_incomplete_checkpoint_is_refused_before_orbax_sees_it(saved, tmp_path, capfd):
    _, config, params = saved
    checkpoint.save(tmp_path / "x", config, params)
    largest = max((tmp_path / "x" / "params").rglob("*"), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(ValueError, match="copy it again"):
        checkpoint.load(tmp_path / "x")
    largest.unlink()
    with pytest.raises(ValueError, match="copy it again"):
        checkpoint.load(tmp_path / "x")
    assert capfd.readouterr() == ("", "")


def test_damage_is_found_where_files_are_verified(saved, tmp_path):
    path = tmp_path / "x"
    shutil.copytree(saved[0], path)
    equal(checkpoint.load(path, verify=True, dtype="bfloat16")[1], saved[2])
    equal(checkpoint.load(path, verify=True, quantize="int8")[1]["embed"], saved[2]["embed"])
    file = path / "params" / "state" / "layers_1.attn.k_proj.kernel" / "0.0.0"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    assert checkpoint.load(path)
    with pytest.raises(ValueError, match=rf"array layers_1/attn/k_proj/kernel: {file} is not the"):
        checkpoint.load(path, verify=True)


def mutate(path, rng):
    """Damages a checkpoint in one of many ways; returns which."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    described = [file for file in files if file.suffix in (".json", "") and file.stat().st_size]
    kind = rng.choice(["flip", "cut", "remove", "swap", "copy", "folder", "value", "value", "drop"])
    file, other = rng.choice(files), rng.choice(files)
    data = bytearray(file.read_bytes())
    if kind == "flip" and data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
    elif kind == "cut":
        file.write_bytes(data[: rng.randrange(len(data) + 1)])
    elif kind == "swap":
        file.write_bytes(other.read_bytes())
        other.write_bytes(data)
    elif kind == "copy":
        shutil.copyfile(file, file.with_name(file.name + "0"))
    elif kind in ("remove", "folder"):
        file.unlink()
        if kind == "folder":
            file.mkdir()
    elif kind in ("value", "drop"):
        named = (".json", ".zarray", "_METADATA", "_CHECKPOINT_METADATA")
        file = rng.choice([file for file in described if file.name.endswith(named)])
        table = inner = json.loads(file.read_text())
        while isinstance(inner.get(key := rng.choice([*inner])), dict) and inner[key]:
            inner = inner[key]
        values = (None, True, -1, 1 << 40, 1 << 70, 1e300, "", "x\n", [], {}, [1 << 40] * 2, ["a"])
        inner.pop(key) if kind == "drop" else inner.update({key: rng.choice(values)})
        file.write_text(json.dumps(table))
    return f"{kind} {file.relative_to(path)}"


@pytest.mark.parametrize("seed", range(60))
def test_any_damage_ends_in_one_sentence(saved, tmp_path, seed):
    path = tmp_path / "x"
    shutil.copytree(saved[0], path)
    what = mutate(path, random.Random(seed))
    for verify in (False, True):
        try:
            _, params, _ = checkpoint.load(path, verify=verify, dtype="bfloat16")
        except (ValueError, OSError) as error:
            said = str(error)
        else:
            said = f"{path} is whole"
            # What is said to be whole is the model, but for what config.json alone tells.
            assert not verify or jax.tree.all(jax.tree.map(jnp.array_equal, params, saved[2])), what
        assert "\n" not in said, what
        assert str(path) in said, what


def test_a_source_is_refused_with_the_command_that_converts_it(tmp_path):
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(ValueError, match=r"python -m mistral_jax\.convert to-orbax"):
        checkpoint.load(tmp_path)


def test_names_of_what_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkpoint.find(None) == checkpoint.find("nano") == checkpoint.BUNDLED
    (tmp_path / "nano").mkdir()
    assert checkpoint.find("nano") == Path("nano")
    command = (
        r"python -m mistral_jax\.convert to-orbax mistralai/Mistral-7B-v0\.3 Mistral-7B-v0\.3$"
    )
    with pytest.raises(ValueError, match=command):
        checkpoint.load("mistralai/Mistral-7B-v0.3")


@pytest.mark.parametrize("unnamed", [0, 2])
def test_a_tokenizer_of_the_model_s_size_or_a_little_less(tmp_path, unnamed):
    file = sources.write_tokenizer(tmp_path / "t", 50)
    model, params = tiny.build(vocab_size=50 + unnamed)
    checkpoint.save(tmp_path / "x", model.config, params, tokenizer_file=file)
    _, _, tokenizer = checkpoint.load(tmp_path / "x")
    assert tokenizer.vocab_size == 50


@pytest.mark.parametrize("size", [49, 50 + 256])
def test_a_tokenizer_of_another_size(tmp_path, size):
    file = sources.write_tokenizer(tmp_path / "t", 50)
    model, params = tiny.build(vocab_size=size)
    checkpoint.save(tmp_path / "x", model.config, params, tokenizer_file=file)
    with pytest.raises(ValueError, match=rf"tokenizer\.model has 50 tokens; expected {size}"):
        checkpoint.load(tmp_path / "x")


def test_a_tokenizer_of_v3_does_not_fit_a_model_of_v1(tmp_path):
    data = Path(mistral_common.__file__).parent / "data"
    (file,) = data.glob("*.model.v3")
    model, params = tiny.build(vocab_size=32000, dim=8, n_layers=1, hidden_dim=8)
    checkpoint.save(tmp_path / "x", model.config, params, tokenizer_file=file)
    with pytest.raises(ValueError, match="has 32768 tokens; expected 32000"):
        checkpoint.load(tmp_path / "x")


def test_memory_is_compared_before_anything_is_loaded(saved, monkeypatch):
    path, _, params = saved
    count = sum(leaf.size for leaf in jax.tree.leaves(params))

    def free(size):
        monkeypatch.setattr(memory, "host_free", lambda: size)

    free(10 * count)
    assert checkpoint.load(path)[0].dtype == jnp.float32
    free(4 * count)  # float32 would leave no room to read it
    assert checkpoint.load(path)[0].dtype == jnp.bfloat16
    free(2 * count)
    monkeypatch.setattr(checkpoint.arrays, "read", lambda *_: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=r"needs .*B of memory on this machine, .*B free"):
        checkpoint.load(path)
    free(4 * count)
    with pytest.raises(ValueError, match=r"load it in a smaller dtype, or spread it"):
        checkpoint.load(path, dtype="float32")


class Heard(Progress):
    """A listener that remembers."""

    def __init__(self):
        self.said, self.size, self.done = [], None, []

    def say(self, sentence):
        self.said.append(sentence)

    @contextlib.contextmanager
    def task(self, size):
        self.size = size
        yield self.done.append


def test_a_dtype_that_memory_decides_is_told(saved, monkeypatch):
    path, _, params = saved
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    for free, dtype, expected in (
        (None, None, 0),
        (4 * count, None, 1),
        (4 * count, "bfloat16", 0),
    ):
        monkeypatch.setattr(memory, "host_free", lambda free=free: free)
        heard = Heard()
        checkpoint.load(path, dtype=dtype, progress=heard)
        assert len(heard.said) == expected
        assert heard.size is None, "small weights show no progress"
    monkeypatch.setattr(memory, "host_free", lambda: 4 * count)
    checkpoint.load(path, progress=(heard := Heard()))
    assert f"{path} is loaded in bfloat16, as it is stored: this machine has" in heard.said[0]
    assert "name a dtype" in heard.said[0]


def test_large_weights_show_progress(saved, monkeypatch):
    path, _, params = saved
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    monkeypatch.setattr(checkpoint, "_PART_BYTES", size // 3)
    for quantize in (None, "int8"):
        heard = Heard()
        checkpoint.load(path, dtype="bfloat16", quantize=quantize, progress=heard)
        assert heard.size == sum(heard.done) == size
        assert 2 <= len(heard.done) <= len(params)
    equal(checkpoint.load(path, dtype="bfloat16", progress=heard)[1], params)


def test_what_is_quantised_needs_a_byte_a_number(saved, monkeypatch):
    path, _, params = saved
    small = quantization.matrices(params, output=True)
    few = sum(leaf.size for name, leaf in flatten_dict(params).items() if name in small)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    scales = sum(np.prod(flatten_dict(params)[name].shape[:n]) for name, n in small.items())
    spare = checkpoint.arrays.least_in_flight(params)
    for left, dtype in ((0, jnp.float32), (-1, jnp.bfloat16)):
        free = 4 * (count - few + scales) + few + spare + left
        monkeypatch.setattr(memory, "host_free", lambda free=free: free)
        assert checkpoint.load(path, quantize="int8")[0].dtype == dtype


def test_all_processes_choose_one_dtype(saved, monkeypatch):
    """What is too large for another is too large for this one, which has the memory."""
    answers = iter([True, False])
    monkeypatch.setattr(checkpoint.distributed, "any_of", lambda short: next(answers))
    assert dtypes(checkpoint.load(saved[0])[1]) == {jnp.dtype("bfloat16")}
    monkeypatch.setattr(checkpoint.distributed, "any_of", lambda short: True)
    with pytest.raises(ValueError, match="needs more memory than another process has free"):
        checkpoint.load(saved[0])


def test_the_bundled_model_loads_without_a_word():
    code = "import mistral_jax as mj; m, p, t = mj.load(); print(m.config.vocab_size, t.vocab_size)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    model, tokenizer = map(int, run.stdout.split())
    assert model == tokenizer
    assert run.stderr == ""


def test_a_tokenizer_in_place_of_its_file_is_refused(tmp_path):
    model, params, tokenizer = checkpoint.load()
    with pytest.raises(ValueError, match=r"^tokenizer_file is <.*; expected the path of its file"):
        checkpoint.save(tmp_path / "made", model.config, params, tokenizer)
    assert not (tmp_path / "made").exists()
