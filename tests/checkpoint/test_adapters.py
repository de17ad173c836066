"""Adapter files: written as PEFT and Mistral name them, read exactly, used, and refused."""

import dataclasses
import json
import math
import os
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import processes
import pytest
import reference
import safetensors.numpy
import tiny
import tokenizer_samples
from bounds import bounded
from flax.traverse_util import flatten_dict, unflatten_dict

import mistral_jax
from mistral_jax.checkpoint import adapters, checkpoint, peft
from mistral_jax.checkpoint.lora import Lora, adapter_shardings, apply, attach, init_adapters
from mistral_jax.engine.generate import generate
from mistral_jax.engine.sampling import Sampling
from mistral_jax.engine.text import chat, complete, stream
from mistral_jax.parallel.sharding import read_layout
from mistral_jax.tokens.tokenizer import Tokenizer

TENSORS = reference.random_tensors(tiny.OFFICIAL, 3)
MODEL, PARAMS = tiny.from_official(tiny.OFFICIAL, TENSORS)
CONFIG = MODEL.config
TEXT = np.arange(13) * 5 % 53
SOME = Lora(rank=3, alpha=5.0, dropout=0.1, targets=("k_proj", "lm_head", "o_proj"))
ALL = Lora(rank=4, alpha=6.0, rslora=True)
KEYS_B = "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"
KEYS = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"


def random_adapters(lora, params=PARAMS, seed=7):
    """Returns adapters that change a lot."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_adapters(lora, params, jax.random.key(0)))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.3, size=x.shape), x.dtype), shapes)


def logits(lora, made):
    return tiny.alone(MODEL, attach(PARAMS, made, lora.scale), TEXT)


def close(found, expected, tolerance=1e-5):
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint folder of the model."""
    path = tmp_path_factory.mktemp("base") / "base"
    checkpoint.save(path, CONFIG, PARAMS)
    return path


@pytest.mark.parametrize("lora", [SOME, ALL])
def test_what_is_saved_comes_back_to_the_bit(lora, tmp_path):
    made = random_adapters(lora)
    adapters.save(tmp_path / "x", CONFIG, lora, made)
    read, found = adapters.read(tmp_path / "x", CONFIG)
    equal(found, jax.tree.map(np.asarray, made))
    assert read == dataclasses.replace(lora, targets=tuple(sorted(lora.targets)))
    assert adapters.read(tmp_path / "x" / adapters.PEFT, CONFIG)[0] == read


def test_a_folder_has_what_peft_expects(tmp_path):
    made = random_adapters(SOME)
    adapters.save(tmp_path / "x", CONFIG, SOME, made, base="some/model")
    described = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 3,
        "lora_alpha": 5.0,
        "lora_dropout": 0.1,
        "use_rslora": False,
        "bias": "none",
        "target_modules": ["k_proj", "lm_head", "o_proj"],
        "base_model_name_or_path": "some/model",
        "rank_pattern": {},
    }
    assert {name: described[name] for name in expected} == expected
    tensors = safetensors.numpy.load_file(tmp_path / "x" / "adapter_model.safetensors")
    assert len(tensors) == 2 * (2 + 2 + 1)
    own = made["layers_1"]["attn"]["o_proj"]
    name = "base_model.model.model.layers.1.self_attn.o_proj.lora_{}.weight"
    np.testing.assert_array_equal(tensors[name.format("A")], own["lora_a"].reshape(3, 32))
    np.testing.assert_array_equal(tensors[name.format("B")], own["lora_b"])
    own = made["layers_0"]["attn"]["k_proj"]
    np.testing.assert_array_equal(tensors[KEYS], own["lora_a"])
    assert "base_model.model.lm_head.lora_B.weight" in tensors


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_of_some_modules_are_kept_with_the_one_scale(rslora, tmp_path):
    lora = dataclasses.replace(SOME, rslora=rslora)
    made = flatten_dict(random_adapters(lora))
    wide = flatten_dict(random_adapters(dataclasses.replace(lora, rank=7)))
    mixed = {path: (wide if "layers_1" in path else made)[path] for path in made}
    mixed.pop(("layers_0", "attn", "o_proj", "lora_a"))
    mixed.pop(("layers_0", "attn", "o_proj", "lora_b"))
    mixed = unflatten_dict(mixed)
    adapters.save(tmp_path / "x", CONFIG, lora, mixed)
    described = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert described["rank_pattern"] == {
        "model.layers.1.self_attn.k_proj": 7,
        "model.layers.1.self_attn.o_proj": 7,
    }
    assert "model.layers.1.self_attn.o_proj" in described["target_modules"]
    assert "model.layers.0.self_attn.o_proj" not in described["target_modules"]
    read, found = adapters.read(tmp_path / "x", CONFIG)
    assert read.scale == lora.scale
    close(logits(read, found), logits(lora, mixed), 1e-6)


def test_alphas_of_modules_go_into_their_matrices(tmp_path):
    """The patterns are PEFT's: ends of names, as regular expressions, the first that matches."""
    made = random_adapters(SOME)
    adapters.save(tmp_path / "x", CONFIG, SOME, made)
    patterns = {"alpha_pattern": {r"layers\.1\..*k_proj": 10.0, "k_proj": 20.0, "o_pro": 99.0}}
    change(tmp_path / "x", patterns)
    _, found = adapters.read(tmp_path / "x", CONFIG)
    for layer, factor in (("layers_0", 4.0), ("layers_1", 2.0)):
        own, before = found[layer]["attn"], made[layer]["attn"]
        close(own["k_proj"]["lora_b"], factor * before["k_proj"]["lora_b"], 1e-6)
        np.testing.assert_array_equal(own["o_proj"]["lora_b"], before["o_proj"]["lora_b"])
    change(tmp_path / "x", {"rank_pattern": {"k_proj": 2}})
    with pytest.raises(ValueError, match=r"has rank 3 for model\.layers\.0\.\S+k_proj; expected 2"):
        adapters.read(tmp_path / "x", CONFIG)


def official(rng, rank=2, projections=("wq", "wk", "wo")):
    """Returns tensors of Mistral's file for `TENSORS`."""
    found = {}
    for name, tensor in TENSORS.items():
        if name.removesuffix(".weight").rpartition(".")[2] in projections:
            rows, columns = tensor.shape
            stem = name.removesuffix(".weight")
            found[f"{stem}.lora_A.weight"] = rng.normal(size=(rank, columns)).astype(np.float32)
            found[f"{stem}.lora_B.weight"] = rng.normal(size=(rows, rank)).astype(np.float32) / 4
    return found


def added(tensors, scale):
    """Returns the official model with the products of an official file added."""
    merged = dict(TENSORS)
    for name in {name.rpartition(".lora_")[0] for name in tensors}:
        a, b = (tensors[f"{name}.lora_{letter}.weight"].astype(np.float64) for letter in "AB")
        merged[f"{name}.weight"] = TENSORS[f"{name}.weight"] + scale * b @ a
    return merged


@pytest.mark.parametrize(("scaling", "beside"), [(None, None), (0.5, None), (None, 3.0)])
def test_mistral_s_file_is_read_as_mistral_uses_it(scaling, beside, tmp_path):
    """Against the float64 forward pass of the official layout: rotary pairs, and scale 2."""
    tensors = official(np.random.default_rng(0))
    safetensors.numpy.save_file(tensors, tmp_path / "lora.safetensors")
    if beside:
        text = json.dumps({"dim": 32, "lora": {"scaling": beside}})
        (tmp_path / "params.json").write_text(text)
    lora, found = adapters.read(tmp_path, CONFIG, scaling)
    assert (lora.rank, lora.targets) == (2, ("k_proj", "o_proj", "q_proj"))
    merged = added(tensors, scaling or beside or 2.0)
    close(logits(lora, found), reference.forward(tiny.OFFICIAL, merged, TEXT))


def test_what_is_saved_for_mistral_is_what_it_uses(tmp_path):
    """It wants all projections, in one dtype, and multiplies by 2."""
    lora = Lora(rank=3, alpha=7.5, targets=("q_proj", "k_proj", "up_proj"))
    made = random_adapters(lora)
    adapters.save(tmp_path / "x", CONFIG, lora, made, format="official", dtype="float32")
    (file,) = (tmp_path / "x").iterdir()
    assert file.name == "lora.safetensors"
    tensors = safetensors.numpy.load_file(file)
    assert len(tensors) == 2 * 7 * CONFIG.num_layers
    close(logits(lora, made), reference.forward(tiny.OFFICIAL, added(tensors, 2.0), TEXT))
    read, found = adapters.read(file, CONFIG)
    assert read.scale == 2.0
    close(logits(read, found), logits(lora, made), 1e-6)
    adapters.save(tmp_path / "x", CONFIG, lora, made, format="official", overwrite=True)
    tensors = safetensors.numpy.load_file(file)
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_are_read(dtype, tmp_path):
    made = random_adapters(SOME)
    adapters.save(tmp_path / "x", CONFIG, SOME, made, dtype=dtype)
    _, found = adapters.read(tmp_path / "x", CONFIG)
    equal(found, jax.tree.map(lambda x: np.asarray(x.astype(dtype).astype(jnp.float32)), made))


def test_adapters_on_many_devices_are_saved_whole(tmp_path):
    model, params = tiny.build(vocab_size=64)
    layout = read_layout("fsdp_tensor", model.config, mesh={"fsdp": 2, "tensor": 2})
    checkpoint.save(tmp_path / "base", model.config, params)
    made = random_adapters(SOME, params)
    adapters.save(tmp_path / "one", model.config, SOME, made)
    _, params, _ = checkpoint.load(
        tmp_path / "base", sharding="fsdp_tensor", mesh={"fsdp": 2, "tensor": 2}
    )
    spread = jax.tree.map(jax.device_put, made, adapter_shardings(params, made))
    assert len(spread["lm_head"]["lora_b"].sharding.device_set) == math.prod(
        layout.mesh.shape.values()
    )
    adapters.save(tmp_path / "many", model.config, SOME, spread)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


@pytest.mark.slow
def test_two_processes_use_and_save_them_as_one_does(tmp_path):
    model, params = tiny.build(vocab_size=96, n_layers=1, n_heads=8, n_kv_heads=2, hidden_dim=48)
    checkpoint.save(tmp_path / "base", model.config, params)
    made = random_adapters(SOME, params)
    adapters.save(tmp_path / "x", model.config, SOME, made)
    params = attach(params, made, SOME.scale)
    rows = generate(model, params, processes.PROMPTS, 10, sampling=Sampling(0), stop_ids=())
    folders = [tmp_path / name for name in ("base", "x", "again")]
    first, second = processes.together(processes.__file__, "adapt", *folders)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    tokens = [row.tokens for row in rows]
    assert json.loads(first.out) == {"merge=False": tokens, "merge=True": tokens}
    for name in (adapters.PEFT, adapters.PEFT_CONFIG):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "x" / name).read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"sharding": "data_tensor", "mesh": {"tensor": 2}}, marks=pytest.mark.slow),
    ],
)
def test_a_model_is_loaded_with_its_adapters_beside_or_merged(tmp_path, options):
    model, params = tiny.build(vocab_size=56, n_layers=1)
    checkpoint.save(tmp_path / "base", model.config, params)
    made = random_adapters(ALL, params)
    adapters.save(tmp_path / "x", model.config, ALL, made)
    expected = tiny.alone(model, attach(params, made, ALL.scale), TEXT)
    assert np.abs(expected - tiny.alone(model, params, TEXT)).max() > 0.1
    texts = []
    for merge in (False, True):
        model, used, _ = mistral_jax.load(
            tmp_path / "base", lora=tmp_path / "x", merge=merge, **options
        )
        close(tiny.alone(model, used, TEXT), expected)
        if options:
            own = used["layers_0"]["attn"]["q_proj"]
            assert all(len(x.sharding.device_set) == 8 for x in own.values())
        texts.append(
            [c.tokens for c in generate(model, used, [[1, 5], [7]], 8, sampling=Sampling(0))]
        )
    assert texts[0] == texts[1]
    # What is merged is a model like any other.
    checkpoint.save(tmp_path / "merged", model.config, used)
    model, again, _ = mistral_jax.load(tmp_path / "merged")
    close(tiny.alone(model, again, TEXT), expected)


def test_adapters_take_the_dtype_of_the_model(base, tmp_path):
    made = random_adapters(SOME)
    adapters.save(tmp_path / "x", CONFIG, SOME, made)
    exact = logits(SOME, made)
    for merge in (False, True):
        model, used, _ = checkpoint.load(base, dtype="bfloat16", lora=tmp_path / "x", merge=merge)
        assert {leaf.dtype for leaf in jax.tree.leaves(used)} == {jnp.dtype("bfloat16")}
        close(tiny.alone(model, used, TEXT), exact, 0.05)
    # Merged in float32 and rounded once.
    kernel, own = PARAMS["lm_head"]["kernel"].astype(jnp.bfloat16), made["lm_head"]
    product = np.asarray(own["lora_b"], np.float64) @ own["lora_a"] * SOME.scale
    expected = np.asarray(kernel, np.float64) + product
    error = np.abs(np.asarray(used["lm_head"]["kernel"], np.float64) - expected)
    assert (error <= 2.0**-8 * np.abs(expected) + 1e-6).all()


@pytest.mark.slow
def test_text_is_made_with_adapters_in_every_way(tmp_path):
    file = tokenizer_samples.train_small_mistral(tmp_path / "tokenizer.model")
    model, params = tiny.build(n_layers=1, vocab_size=Tokenizer.from_file(file).vocab_size)
    checkpoint.save(tmp_path / "base", model.config, params, file)
    adapters.save(tmp_path / "x", model.config, ALL, random_adapters(ALL, params))
    greedy = {"sampling": Sampling(0)}
    found = []
    for options in ({}, {"lora": tmp_path / "x"}, {"lora": tmp_path / "x", "merge": True}):
        loaded = mistral_jax.load(tmp_path / "base", **options)
        text = complete(*loaded, "def main", 8, **greedy)
        assert "".join(stream(*loaded, "def main", 8, **greedy)) == text
        answer = chat(*loaded, [{"role": "user", "content": "Hi"}], 8, **greedy)
        found.append((text, answer, mistral_jax.score(*loaded, "def main").logprob))
    plain, beside, merged = found
    assert beside[:2] == merged[:2]
    assert abs(beside[2] - merged[2]) < 1e-4 * abs(merged[2])
    assert abs(beside[2] - plain[2]) > 1e-2 * abs(plain[2])


def test_the_kernels_that_were_merged_into_are_given_back():
    params = jax.tree.map(jnp.copy, PARAMS)
    made = jax.tree.map(np.asarray, random_adapters(SOME))
    merged = apply(params, SOME, made, merged=True)
    assert params["lm_head"]["kernel"].is_deleted()
    assert not any(x.is_deleted() for x in jax.tree.leaves(merged))
    assert (
        merged["layers_0"]["mlp"]["up_proj"]["kernel"]
        is (params["layers_0"]["mlp"]["up_proj"]["kernel"])
    )


def test_params_with_adapters_beside_them_are_not_saved_as_a_model(tmp_path):
    params = attach(PARAMS, random_adapters(SOME))
    with pytest.raises(ValueError, match=r"lora_a: save adapters by themselves, .*merge=True"):
        checkpoint.save(tmp_path / "x", CONFIG, params)


def change(folder, fields):
    """Changes fields of adapter_config.json."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "has use_dora = True; only plain LoRA is read, without it"),
        ({"bias": "all"}, "has bias = 'all'; only plain LoRA is read, with 'none'"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save = "),
        ({"fan_in_fan_out": True}, "has fan_in_fan_out = True"),
        ({"peft_type": "IA3"}, "has peft_type = 'IA3'; only plain LoRA is read, with 'LORA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights = 'pissa_niter_4'"),
        ({"r": 0}, r"adapter_config\.json has r 0; expected an integer of at least 1"),
        ({"r": "8"}, r"adapter_config\.json has r '8'; expected"),
        ({"lora_alpha": None}, r"adapter_config\.json has lora_alpha None; expected"),
        ({"lora_alpha": -1}, r"adapter_config\.json has lora_alpha -1; expected"),
    ],
)
def test_a_config_of_other_adapters_is_refused(tmp_path, fields, message):
    adapters.save(tmp_path / "x", CONFIG, SOME, random_adapters(SOME))
    change(tmp_path / "x", fields)
    with pytest.raises(ValueError, match=message):
        adapters.read(tmp_path / "x", CONFIG)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("r", [True, 2.5, "8", [8], {}, None, 2**63, -1, 0]),
        ("lora_alpha", [True, "8", [8], {}, None, 1e300, float("nan"), float("inf"), 10**400, 0]),
        ("lora_dropout", [True, "0.1", [0.1], {}, -1, 2, 1]),
        ("use_rslora", [1, "yes", [], {}, 0.5]),
        ("rank_pattern", [[], "q_proj", 3, True, {"q_proj": 0}, {"q_proj": 2.5}, {"q_proj": None}]),
        ("alpha_pattern", [[], "q_proj", 3, True, {"q_proj": 0}, {"q_proj": "x"}, {"q_proj": [1]}]),
        ("target_modules", [3, True, {"q_proj": 1}, [1], [None]]),
        ("init_lora_weights", [1, [], {}, 0.5, "loftq"]),
        ("bias", [True, [], "all"]),
        ("peft_type", [True, None, [], {}, "lora"]),
    ],
)
def test_every_value_that_is_read_is_checked(tmp_path, key, values):
    adapters.save(tmp_path / "x", CONFIG, SOME, random_adapters(SOME))
    for value in values:
        change(tmp_path / "x", {key: value})
        with pytest.raises(
            ValueError, match=rf"adapter_config\.json(: lora\.| has ){key[5:]}|{key}"
        ):
            adapters.read(tmp_path / "x", CONFIG)


def test_large_configs_are_not_read(tmp_path):
    adapters.save(tmp_path / "x", CONFIG, SOME, random_adapters(SOME))
    os.truncate(tmp_path / "x" / "adapter_config.json", 1 << 30)
    with bounded(5, 1 << 27), pytest.raises(ValueError, match=r"has 1\.1 GB; expected at most"):
        adapters.read(tmp_path / "x", CONFIG)
    adapters.save(tmp_path / "y", CONFIG, SOME, random_adapters(SOME), format="peft")
    (tmp_path / "y" / "adapter_config.json").unlink()
    os.mkfifo(tmp_path / "y" / "adapter_config.json")
    with bounded(5, 1 << 27), pytest.raises(ValueError, match=r"adapter_config\.json is a pipe"):
        adapters.read(tmp_path / "y", CONFIG)


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["(", "*", "(a+)+b", "k_proj{1}", "[", "(?P<x>k)_proj", "\\"])
def test_a_pattern_that_is_none_or_too_much_is_refused_by_name(tmp_path, name, pattern):
    adapters.save(tmp_path / "x", CONFIG, SOME, random_adapters(SOME))
    change(tmp_path / "x", {name: {pattern: 4}})
    with pytest.raises(ValueError, match=rf"adapter_config\.json has .* in {name}, but it "):
        adapters.read(tmp_path / "x", CONFIG)


def test_a_pattern_with_too_many_ways_to_match_takes_no_time(tmp_path):
    adapters.save(tmp_path / "x", CONFIG, SOME, random_adapters(SOME))
    change(tmp_path / "x", {"alpha_pattern": {".*" * 100 + "x" + ".*" * 100: 4}})
    with bounded(5, 1 << 27):
        _, found = adapters.read(tmp_path / "x", CONFIG)
    equal(found, jax.tree.map(np.asarray, random_adapters(SOME)))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (3, "has lora 3; expected an object"),
        ({"scaling": "2"}, "lora has scaling '2'; expected a finite number above 0"),
        ({"scaling": None}, "lora has scaling None; expected"),
        ({"scaling": 0}, "lora has scaling 0; expected"),
        ({"scaling": 10**400}, "lora has scaling 1000"),
        (None, None),
        ({}, None),
    ],
)
def test_the_scale_beside_mistral_s_file_is_checked(tmp_path, lora, message):
    safetensors.numpy.save_file(official(np.random.default_rng(0)), tmp_path / "lora.safetensors")
    (tmp_path / "params.json").write_text(json.dumps({"lora": lora}))
    if message is None:
        assert adapters.read(tmp_path, CONFIG)[0].scale == 2.0
        return
    with pytest.raises(ValueError, match=rf"params\.json(:| has) ?{message.removeprefix('has ')}"):
        adapters.read(tmp_path, CONFIG)


HEAD_B = "base_model.model.lm_head.lora_B.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({KEYS: None}, r"has \S+k_proj\.lora_B\.weight alone; expected both, lora_A and lora_B"),
        (
            {KEYS: np.ones((3, 64))},
            r"has \(3, 64\) as \S+lora_A\.weight; expected \(3, 32\): it is",
        ),
        ({HEAD_B: np.ones((54, 3))}, r"has \(54, 3\) as \S+lm_head\S+; expected \(53, 3\)"),
        ({HEAD_B: np.ones((53, 2))}, r"expected \(53, 3\)"),
        ({KEYS: np.full((3, 32), np.nan)}, r"has values in \S+ that are not finite"),
        ({KEYS: np.ones(())}, r"has \(\) as \S+lora_A\.weight; expected \(0, 32\)"),
        ({KEYS: np.ones((0, 32)), KEYS_B: np.ones((16, 0))}, r"has rank 0 for \S+; expected 1"),
        ({KEYS: np.ones((70000, 32)), KEYS_B: np.ones((16, 70000))}, "has rank 70000 for"),
        ({KEYS.replace("layers.0", "layers.2"): np.ones(1)}, r"has \S+layers\.2\S+, and the model"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": np.ones(1)}, "has nothing that"),
        ({KEYS.replace("lora_A", "lora_magnitude_vector"): np.ones(1)}, "more than plain LoRA"),
    ],
)
def test_tensors_of_other_adapters_are_refused(tmp_path, tensors, message):
    adapters.save(tmp_path / "x", CONFIG, SOME, random_adapters(SOME))
    file = tmp_path / "x" / "adapter_model.safetensors"
    held = safetensors.numpy.load_file(file) | tensors
    held = {name: x.astype(np.float32) for name, x in held.items() if x is not None}
    safetensors.numpy.save_file(held, file)
    with pytest.raises(ValueError, match=message):
        adapters.read(tmp_path / "x", CONFIG)


def test_folders_without_adapters_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors and no lora\.s\S+$"):
        adapters.read(tmp_path, CONFIG)
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match="save it with safetensors: "):
        adapters.read(tmp_path, CONFIG)
    with pytest.raises(ValueError, match="save it with safetensors: "):
        adapters.read(tmp_path / "adapter_model.bin", CONFIG)
    safetensors.numpy.save_file({}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="has no lora_A and lora_B of any projection"):
        adapters.read(tmp_path, CONFIG)
    (tmp_path / "lora.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match="is cut short or no safetensors file"):
        adapters.read(tmp_path, CONFIG)
    adapters.save(tmp_path / "x", CONFIG, SOME, random_adapters(SOME))
    with pytest.raises(ValueError, match=r"scaling is 2\.0, but adapter_config\.json has its own"):
        adapters.read(tmp_path / "x", CONFIG, scaling=2.0)
    (tmp_path / "x" / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"there is no \S+adapter_config\.json"):
        adapters.read(tmp_path / "x", CONFIG)
    (tmp_path / "x" / "lora.safetensors").touch()
    with pytest.raises(ValueError, match=r"has both .*; name one of the two files"):
        adapters.read(tmp_path / "x", CONFIG)


def test_dtypes_and_scales_that_float32_cannot_hold_are_refused(tmp_path):
    adapters.save(tmp_path / "x", CONFIG, SOME, random_adapters(SOME))
    file = tmp_path / "x" / "adapter_model.safetensors"
    held = safetensors.numpy.load_file(file)
    for array, message in (
        (np.ones((3, 32), np.int8), "has int8 as .*; expected float32 or bfloat16"),
        (np.full((3, 32), 1e300), "not finite"),
    ):
        safetensors.numpy.save_file(held | {KEYS: array}, file)
        with pytest.raises(ValueError, match=message):
            adapters.read(tmp_path / "x", CONFIG)
    safetensors.numpy.save_file(held | {KEYS_B: held[KEYS_B] * 0 + np.float32(3e38)}, file)
    change(tmp_path / "x", {"alpha_pattern": {"k_proj": 1e6}})
    with pytest.raises(ValueError, match=r"scales a lora_B by 200000, more than float32 can hold"):
        adapters.read(tmp_path / "x", CONFIG)


def test_what_cannot_be_saved_leaves_nothing(tmp_path):
    made = random_adapters(SOME)
    deep = random_adapters(SOME, tiny.build(n_layers=3)[1])
    wide = random_adapters(SOME, tiny.build(dim=40)[1])
    broken = jax.tree.map(lambda x: x * jnp.inf, made)
    for given, options, message in (
        (made, {"format": "pefd"}, "format is 'pefd'; expected 'peft' or 'official'"),
        (
            made,
            {"format": "official"},
            "adapters has lm_head, which this model does not have in format 'official'",
        ),
        (deep, {}, "adapters has layers_2/attn/k_proj, which this model does not have"),
        (wide, {}, r"adapters has \(3, 40\) as .*; expected \(3, 32\)"),
        (broken, {}, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            adapters.save(tmp_path / "x", CONFIG, SOME, given, **options)
    assert not any(tmp_path.iterdir())


def test_overwriting_is_asked_for(tmp_path):
    adapters.save(tmp_path / "x", CONFIG, SOME, random_adapters(SOME))
    other = random_adapters(SOME, seed=8)
    with pytest.raises(ValueError, match="exists"):
        adapters.save(tmp_path / "x", CONFIG, SOME, other)
    adapters.save(tmp_path / "x", CONFIG, SOME, other, overwrite=True)
    equal(adapters.read(tmp_path / "x", CONFIG)[1], jax.tree.map(np.asarray, other))
    (tmp_path / "precious").write_text("data")
    with pytest.raises(ValueError, match=r"has precious, .* left as it is"):
        adapters.save(tmp_path, CONFIG, SOME, other, overwrite=True)


@pytest.mark.parametrize("format", ["peft", "official"])
def test_only_adapters_that_save_has_made_are_overwritten(tmp_path, format):
    lora, path = dataclasses.replace(SOME, targets=("k_proj", "o_proj")), tmp_path / "x"
    made = random_adapters(lora)
    adapters.save(path, CONFIG, lora, made, format=format)
    (file,) = path.glob("*.safetensors")
    tensors = safetensors.numpy.load_file(file)
    (path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"x has notes.txt, .* left as it is"):
        adapters.save(path, CONFIG, lora, made, format=format, overwrite=True)
    (path / "notes.txt").unlink()
    adapters.save(path, CONFIG, lora, made, format=format, overwrite=True)
    if format == "peft":  # as PEFT itself writes it
        config = path / "adapter_config.json"
        described = json.loads(config.read_text())
        assert list(described) == peft.FIELDS
        config.write_text(json.dumps(described | {"auto_mapping": None}))
    for metadata in [{"format": "pt"}] if format == "peft" else [None, {"source": "another"}]:
        safetensors.numpy.save_file(tensors, file, metadata)
        with pytest.raises(ValueError, match=rf"x has {file.name}, which this program did not"):
            adapters.save(path, CONFIG, lora, made, format=format, overwrite=True)


def test_merge_without_adapters_is_refused(base):
    with pytest.raises(ValueError, match="merge is True, but lora names no adapters"):
        checkpoint.load(base, merge=True)
