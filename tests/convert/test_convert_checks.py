import ml_dtypes
import numpy as np
import pytest
import sources
from mistral_jax.convert import architecture, checks, source


def check(folder, format=None):
    found = source.find(folder, format)
    config = architecture.read(found.config_file).config
    checks.match(found, found.tensors(), config)


def refused(folder, message):
    with pytest.raises(ValueError, match=message):
        check(folder)


WQ = "layers.1.attention.wq.weight"
NAMES = {True: WQ, False: "model.layers.1.self_attn.q_proj.weight"}


@pytest.mark.parametrize("format", sources.FORMATS)
def test_a_whole_source_is_good(tmp_path, format):
    check(sources.write(tmp_path, format))


@pytest.mark.parametrize("format", sources.FORMATS)
def test_a_missing_tensor_is_named(tmp_path, format):
    tensors = sources.tensors()
    del tensors[WQ]
    sources.write(tmp_path, format, tensors)
    refused(tmp_path, rf"has no tensor {NAMES[format[0] == 'o']}; expected one of \(32, 32\)")


@pytest.mark.parametrize("format", sources.FORMATS)
def test_an_extra_tensor_is_named_with_its_file(tmp_path, format):
    extra = {"layers.2.attention_norm.weight": np.ones(32, np.float32)}
    sources.write(tmp_path, format, sources.tensors() | extra)
    refused(tmp_path, r"tensor \S*layers\.2\.\S+ \(32,\) in \S+ is no part of this model")


@pytest.mark.parametrize("format", sources.FORMATS)
def test_a_shape_is_named_with_what_is_expected(tmp_path, format):
    tensors = sources.tensors()
    tensors[WQ] = tensors[WQ][:, :-1]
    sources.write(tmp_path, format, tensors)
    name = NAMES[format[0] == "o"]
    refused(tmp_path, rf"tensor {name} in \S+ is \(32, 31\); expected \(32, 32\)")


@pytest.mark.parametrize("format", ["hf-safetensors", "hf-torch"])
def test_a_dtype_is_named_with_what_is_expected(tmp_path, format):
    tensors = sources.tensors()
    tensors[WQ] = tensors[WQ].astype(np.int64)
    sources.write(tmp_path, format, tensors)
    refused(tmp_path, rf"tensor {NAMES[False]} in \S+ is int64; expected bfloat16 or float16 or")


def test_tables_of_rotary_angles_are_ignored(tmp_path):
    tensors = {sources.hf_name(name): tensor for name, tensor in sources.tensors().items()}
    angles = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    sources.write(tmp_path, "hf-safetensors")
    sources.save_safetensors(tmp_path / "model.safetensors", tensors | angles)
    check(tmp_path)


def test_a_tied_model_may_hold_its_table_twice_but_not_another(tmp_path):
    tensors = sources.tensors(tied=True)
    check(sources.write(tmp_path / "once", "hf-torch", tensors, tie_word_embeddings=True))
    tensors["output.weight"] = tensors["tok_embeddings.weight"]
    check(sources.write(tmp_path / "twice", "hf-torch", tensors, tie_word_embeddings=True))
    tensors["output.weight"] = tensors["output.weight"] + 1
    sources.write(tmp_path / "other", "hf-torch", tensors, tie_word_embeddings=True)
    refused(tmp_path / "other", r"tensor lm_head\.weight in \S+ differs from the embedding")


def test_both_tables_of_a_tied_model_may_lie_in_parts(tmp_path):
    fields = {"vocab_size": 52, "tied_embeddings": True}
    tensors = sources.tensors(vocab_size=52, tied=True)
    tensors["output.weight"] = tensors["tok_embeddings.weight"]
    check(sources.write(tmp_path / "equal", "official-torch", tensors, parts=2, **fields))
    tensors["output.weight"] = tensors["output.weight"][::-1]
    sources.write(tmp_path / "other", "official-torch", tensors, parts=2, **fields)
    refused(tmp_path / "other", r"tensor output\.weight in \S+ differs from the embedding")
    tensors["output.weight"] = tensors["output.weight"][:26]
    sources.write(tmp_path / "short", "official-torch", tensors, parts=2, **fields)
    refused(tmp_path / "short", r"tensor output\.weight in \S+ is \(13, 32\); expected \(26, 32\)")


def test_an_untied_model_needs_its_output(tmp_path):
    sources.write(tmp_path, "hf-safetensors", sources.tensors(tied=True))
    refused(tmp_path, r"has no tensor lm_head\.weight; expected one of \(53, 32\)")


def test_parts_are_all_there_and_fit(tmp_path):
    tensors = sources.tensors(vocab_size=52)
    sources.write(tmp_path, "official-torch", tensors, parts=2, vocab_size=52)
    check(tmp_path)
    second = tmp_path / "consolidated.01.pth"
    places = source.find(tmp_path).tensors()
    whole = {name: parts[1].array.copy() for name, parts in places.items()}
    sources.save_torch(second, {name: a for name, a in whole.items() if name != WQ})
    refused(tmp_path, rf"tensor {WQ} is in 1 of 2 parts of")
    sources.save_torch(second, whole | {WQ: tensors[WQ]})
    refused(tmp_path, rf"tensor {WQ} in \S+01\.pth is \(32, 32\); expected \(16, 32\)")
    sources.save_torch(second, whole | {"norm.weight": whole["norm.weight"] + 1})
    refused(tmp_path, r"tensor norm\.weight differs between \S+00\.pth and \S+01\.pth")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_finite(dtype):
    extremes = [0, -0.0, ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).min]
    extremes += [ml_dtypes.finfo(dtype).smallest_subnormal, -1, 1]
    good = np.array([extremes, extremes], np.float64).astype(dtype)
    for array in (good, good[:, 1:], good.T, good[:1, 3:4], good[:1, 2:3]):
        checks.check_finite(array, "x")
    for value in (np.inf, -np.inf, np.nan, -np.nan):
        bad = good.copy()
        bad[1, 2] = value
        with pytest.raises(
            ValueError, match=r"x has 1 values that are not finite, first .* at \(1, 2\)"
        ):
            checks.check_finite(bad, "x")
        with pytest.raises(ValueError, match=r"at \(2, 1\)"):
            checks.check_finite(bad.T, "x")


@pytest.mark.parametrize(
    "name",
    [
        "model.rotary_emb.inv_freq",
        "rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
        "model.layers.1.self_attn.rotary_emb.sin_cached",
    ],
)
def test_tables_of_rotary_angles_are_ignored_wherever_they_lie(tmp_path, name):
    tensors = {sources.hf_name(name): tensor for name, tensor in sources.tensors().items()}
    sources.write(tmp_path, "hf-safetensors")
    file = tmp_path / "model.safetensors"
    sources.save_safetensors(file, tensors | {name: np.ones((1, 4), np.float32)})
    check(tmp_path)
    for other in (
        f"{name}.weight",
        name.replace("rotary_emb", "attn"),
        f"x{name}".replace(".", ""),
    ):
        sources.save_safetensors(file, tensors | {other: np.ones(4, np.float32)})
        refused(tmp_path, "is no part of this model")


LORA = {"enable": True, "rank": 64, "dropout": 0.0, "scaling": 2.0}


@pytest.mark.parametrize("lora", [LORA, LORA | {"enable": False}, {}, None])
def test_whether_there_are_adapters_is_told_by_the_tensors(tmp_path, lora):
    """A whole fine-tune of Mistral's own program says in params.json how it was trained."""
    sources.write(tmp_path, "official-safetensors", lora=lora, moe=None)
    check(tmp_path)
    for other in (
        "layers.0.attention.wq.lora_A.weight",
        "layers.0.attention.wq.lora.lora_B.weight",
        "output.lora_B",
    ):
        tensors = sources.tensors() | {other: np.ones((2, 32), np.float32)}
        sources.write(tmp_path, "official-safetensors", tensors, lora=lora)
        refused(tmp_path, rf"tensor {other} in \S+ is an adapter's; expected a whole model")


def test_a_tensor_that_repeats_a_few_values_is_refused(tmp_path):
    """Written out, it could take any room."""
    fields = {"vocab_size": 1 << 20, "dim": 32}
    sources.write(tmp_path, "official-torch", sources.tensors(), **fields)
    file = tmp_path / "consolidated.00.pth"
    names = list(sources.tensors())
    shape = (1 << 20, 32)
    opcodes = sources.text("tok_embeddings.weight") + sources.rebuilt(
        "0", "float32", shape, (0, 1), count=32
    )
    sources.save_zip(file, b"\x80\x02}(" + opcodes + b"u.", [bytes(128)])
    assert names[0] == "tok_embeddings.weight"
    refused(tmp_path, r"tok_embeddings\.weight in \S+ has 134217728 bytes, more than its file")
