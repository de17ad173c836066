"""Mixtures of experts are read from every layout of their files, and written back."""

import json
import re

import jax
import numpy as np
import pytest
import reference
import sources
import tiny
from safetensors.numpy import load_file

import mistral_jax
from convert.inspect import inspect
from convert.to_orbax import to_orbax
from convert.to_torch import to_torch

E, F, D = 3, tiny.OFFICIAL["hidden_dim"], tiny.OFFICIAL["dim"]
PARAMS = tiny.OFFICIAL | {"moe": {"num_experts": E, "num_experts_per_tok": 2}}
HF = {"model_type": "mixtral", "num_local_experts": E, "num_experts_per_tok": 2}
MATRIX = re.compile(r"(layers\.\d+)\.feed_forward\.experts\.(\d+)\.(w\d)\.weight")


@pytest.fixture(scope="module")
def official():
    """The tensors of a mixture, by official name."""
    held, rng = {}, np.random.default_rng(0)
    for name, tensor in reference.random_tensors(tiny.OFFICIAL, 0).items():
        if ".feed_forward." not in name:
            held[name] = tensor
            continue
        layer, matrix = name.split(".feed_forward.")
        held[f"{layer}.feed_forward.gate.weight"] = rng.normal(size=(E, D)).astype(np.float32)
        for i in range(E):
            one = rng.normal(size=tensor.shape).astype(np.float32)
            held[f"{layer}.feed_forward.experts.{i}.{matrix}"] = one
    return held


def first_release(held):
    """Returns the tensors as the first Mixtral 8x7B had them."""
    found = {}
    for name, tensor in held.items():
        if match := MATRIX.fullmatch(name):
            rows = tensor.T if match[3] == "w2" else tensor
            found.setdefault(f"{match[1]}.block_sparse_moe.{match[3]}", []).append(rows)
        else:
            found[name.replace("feed_forward.gate", "block_sparse_moe.gate")] = tensor
    return {n: np.concatenate(x) if isinstance(x, list) else x for n, x in found.items()}


def hf(held):
    """Returns the tensors as Hugging Face's files have them."""
    names = {n: n.replace("feed_forward", "block_sparse_moe") for n in held}
    return {
        names[n] if "lm_head" in names[n] else sources.hf_name(names[n]): sources.hf_layout(n, x)
        for n, x in held.items()
    }


def fused(held):
    """Returns the tensors under the names of Transformers 5 in memory."""
    found = {n: x for n, x in hf(held).items() if "block_sparse_moe" not in n}
    for i in range(tiny.OFFICIAL["n_layers"]):
        w1, w2, w3 = (
            np.stack([held[f"layers.{i}.feed_forward.experts.{e}.w{n}.weight"] for e in range(E)])
            for n in (1, 2, 3)
        )
        module = f"model.layers.{i}.mlp"
        found[f"{module}.experts.gate_up_proj"] = np.concatenate([w1, w3], axis=1)
        found[f"{module}.experts.down_proj"] = w2
        found[f"{module}.gate.weight"] = held[f"layers.{i}.feed_forward.gate.weight"]
    return found


def write(folder, held, parts=1, ending=None, params=PARAMS):
    """Writes a source; `ending` names official torch files, and else they are safetensors."""
    folder.mkdir()
    hugging = any(name.startswith("model.") for name in held)
    described = sources.HF_CONFIG | HF if hugging else params
    (folder / ("config.json" if hugging else "params.json")).write_text(json.dumps(described))
    if ending is None:
        file = "model.safetensors" if hugging else "consolidated.safetensors"
        sources.save_safetensors(folder / file, held)
    for part in range(parts if ending else 0):
        own = {n: x for i, (n, x) in enumerate(held.items()) if i % parts == part}
        sources.save_torch(folder / f"consolidated.{part:02}.{ending}", own)
    return folder


def tree(folder, target):
    to_orbax(folder, target)
    return mistral_jax.load(target, dtype="float32")[1]


def test_every_layout_gives_the_same_tree(official, tmp_path):
    written = {
        "official": write(tmp_path / "a", official),
        "first": write(tmp_path / "b", first_release(official), 3, "pt"),
        "pth": write(tmp_path / "c", official, 2, "pth"),
        "hf": write(tmp_path / "d", hf(official)),
        "fused": write(tmp_path / "e", fused(official)),
    }
    trees = {name: tree(folder, tmp_path / name) for name, folder in written.items()}
    expected = trees.pop("official")
    moe = expected["layers_1"]["moe"]
    for i in range(E):
        name = f"layers.1.feed_forward.experts.{i}"
        for ours, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            kernel = moe[f"{ours}_proj"]["kernel"][i]
            np.testing.assert_array_equal(kernel, official[f"{name}.{theirs}.weight"])
    for found in trees.values():
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_exports_are_equal_byte_for_byte(official, tmp_path):
    to_orbax(write(tmp_path / "source", official), tmp_path / "ours")
    for format, expected in (("official", official), ("hf", hf(official))):
        to_torch(tmp_path / "ours", tmp_path / format, format=format)
        (file,) = (tmp_path / format).glob("*.safetensors")
        found = load_file(file)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert tensor.tobytes() == np.ascontiguousarray(expected[name]).tobytes(), name


def test_int8_is_that_of_the_loaded_model(official, tmp_path):
    source = write(tmp_path / "source", official)
    to_orbax(source, tmp_path / "wide")
    to_orbax(source, tmp_path / "small", quantize="int8")
    expected = mistral_jax.load(tmp_path / "wide", quantize="int8", dtype="float32")[1]
    found = mistral_jax.load(tmp_path / "small", dtype="float32")[1]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layers.1.feed_forward.experts.2.w2.weight": None},
            "has no tensor layers.1.feed_forward",
        ),
        (
            {"layers.0.feed_forward.gate.weight": None},
            "no tensor layers.0.feed_forward.gate.weight",
        ),
        (
            {"layers.0.feed_forward.experts.3.w1.weight": np.zeros((F, D), np.float32)},
            "is no part of this model",
        ),
        (
            {"layers.0.feed_forward.experts.1.w1.weight": np.zeros((D, F), np.float32)},
            "layers.0.feed_forward.experts.1.w1.weight in",
        ),
        (
            {"layers.0.block_sparse_moe.w1": np.zeros((E * F, D), np.float32)},
            "experts.0.w1.weight is in",
        ),
        ({"layers.0.block_sparse_moe.w9": np.zeros(3, np.float32)}, "is no part of this model"),
    ],
)
def test_bad_files_are_refused_by_name(official, change, message, tmp_path):
    held = {n: x for n, x in (official | change).items() if x is not None}
    source = write(tmp_path / "source", held)
    with pytest.raises(ValueError, match=re.escape(message)):
        to_orbax(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    assert any(label == "problem" and message in text for label, text in inspect(source))


def test_a_fused_tensor_of_the_wrong_shape_is_refused(official, tmp_path):
    held = first_release(official)
    held["layers.0.block_sparse_moe.w3"] = held["layers.0.block_sparse_moe.w3"][:-1]
    with pytest.raises(ValueError, match=rf"block_sparse_moe.w3 .* expected \({E * F}, {D}\)"):
        to_orbax(write(tmp_path / "source", held, 2, "pt"), tmp_path / "ours")


def test_inspect_tells_total_and_active_parameters(official, tmp_path):
    lines = dict(inspect(write(tmp_path / "source", official)))
    total = sum(tensor.size for tensor in official.values())
    idle = tiny.OFFICIAL["n_layers"] * 3 * F * D * (E - 2)
    assert lines["parameters"] == f"{total:,}, of which {total - idle:,} compute each token"
    assert lines["experts"] == f"{E} in each layer, of which 2 compute each token"


def test_the_first_release_lacks_theta(official, tmp_path):
    params = {key: value for key, value in PARAMS.items() if key != "rope_theta"}
    to_orbax(write(tmp_path / "source", official, params=params), tmp_path / "ours")
    assert mistral_jax.load(tmp_path / "ours")[0].config.rope_theta == 1e6
