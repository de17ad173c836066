"""GGUF files: tables, dequantisation, names. The files and the expected numbers are gguf's own."""

import contextlib

import gguf as library
import numpy as np
import pytest
import sources
from bounds import bounded
from flax.traverse_util import flatten_dict
from mistral_jax.convert import architecture, gguf, gguf_model, gguf_tokenizer
from mistral_jax.convert.gguf_blocks import KINDS
from mistral_jax.convert.source import find
from mistral_jax.convert.to_orbax import to_orbax as convert

import mistral_jax as mj
from mistral_jax.checkpoint.checkpoint import BUNDLED
from mistral_jax.tokens import spm
from mistral_jax.tokens.tokenizer import Tokenizer

QUANTISED = [number for number, kind in KINDS.items() if kind.widen]


def write(file, tensors=(), metadata=(), kind="llama"):
    """Writes a file; a tensor is (name, array) or (name, bytes, number of its type)."""
    writer = library.GGUFWriter(file, kind)
    for key, value in dict(metadata).items():
        add = {bool: writer.add_bool, str: writer.add_string, float: writer.add_float32}
        add.get(type(value), writer.add_array if isinstance(value, list) else writer.add_uint32)(
            key, value
        )
    for name, array, *number in tensors:
        raw = library.GGMLQuantizationType(number[0]) if number else None
        writer.add_tensor(name, array, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("number", QUANTISED, ids=lambda number: KINDS[number].name)
def test_blocks_are_dequantised_bit_for_bit(tmp_path, number):
    """Any bytes are valid blocks; scales that are not finite give numbers that are not."""
    kind = KINDS[number]
    raw = np.random.default_rng(number).integers(0, 256, (6, 4, kind.size), np.uint8)
    file = write(tmp_path / "x.gguf", [("t", raw.reshape(6, -1), number)])
    tensor = gguf.read(file).tensors["t"]
    assert (tensor.shape, tensor.dtype, tensor.nbytes) == ((6, 4 * kind.numbers), "f4", raw.nbytes)
    with np.errstate(all="ignore"):
        expected = library.quants.dequantize(raw, library.GGMLQuantizationType(number))
    np.testing.assert_array_equal(np.asarray(tensor), expected.reshape(tensor.shape))
    np.testing.assert_array_equal(np.asarray(tensor[2]), expected.reshape(tensor.shape)[2])


def test_dequantises_in_parts(tmp_path, monkeypatch):
    raw = np.random.default_rng(0).integers(0, 99, (64, 18 * 32), np.uint8)
    tensor = gguf.read(write(tmp_path / "x.gguf", [("t", raw, 2)])).tensors["t"]
    whole = np.asarray(tensor)
    monkeypatch.setattr(gguf, "_AT_ONCE", 96)
    np.testing.assert_array_equal(np.asarray(tensor), whole)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_plain_tensors_are_views_of_the_file(tmp_path, dtype):
    array = np.arange(12).reshape(3, 4).astype(dtype)
    found = gguf.read(write(tmp_path / "x.gguf", [("t", array)])).tensors["t"]
    np.testing.assert_array_equal(found, array)
    assert found.dtype == dtype
    assert not found.flags.owndata


def test_metadata_of_every_type(tmp_path):
    writer = library.GGUFWriter(tmp_path / "x.gguf", "llama")
    values = {
        "uint8": 7, "int8": -7, "uint16": 300, "int16": -300, "uint32": 1 << 31, "int32": -5,
        "uint64": 1 << 63, "int64": -1, "float32": 0.5, "float64": 0.1, "bool": True,
        "string": "▁ä\n",
    }  # fmt: skip
    for name, value in values.items():
        getattr(writer, f"add_{name}")(name, value)
    writer.add_array("texts", ["a", "", "b"])
    writer.add_array("numbers", [1, 2, 3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = gguf.read(tmp_path / "x.gguf").metadata
    del found["general.architecture"]
    assert found == values | {"texts": ["a", "", "b"], "numbers": [1, 2, 3]}


def test_every_cut_of_a_file_is_refused_in_one_sentence(tmp_path):
    file = write(
        tmp_path / "x.gguf", [("t", np.ones((2, 32), np.float32))], {"list": [1, 2], "text": "abc"}
    )
    data = file.read_bytes()
    end = data.rindex(np.ones(64, np.float32).tobytes()) + 256
    for size in range(end):
        file.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"x\.gguf .*(expected|again)") as caught:
            gguf.read(file)
        assert "\n" not in str(caught.value)


def test_damage_costs_neither_time_nor_memory(tmp_path):
    """Any byte may be wrong; what can still be read is read, else there is one clear error."""
    file = write(tmp_path / "x.gguf", [("t", np.ones((2, 32), np.float32))], {"list": [1, 2]})
    data, rng = file.read_bytes(), np.random.default_rng(0)
    with bounded(60, 64 << 20):
        for _ in range(300):
            changed = bytearray(data)
            for at in rng.integers(0, len(data), 3):
                changed[at] = rng.choice([0, 1, 127, 128, 255])
            file.write_bytes(changed)
            with contextlib.suppress(ValueError):
                gguf.read(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((b"GGUF", b"GGML"), "begins with b'GGML'; expected a GGUF file"),
        ((b"GGUF\x03", b"GGUF\x01"), "has GGUF version 1; expected 2 or 3"),
        (
            (b"\x02\0\0\0\x20\0\0\0\0\0\0\0\x02", b"\x02\0\0\0\x20\0\0\0\0\0\0\0\x00"),
            "shape (0, 32) and type F32; expected axes above 0",
        ),
    ],
)
def test_other_files_are_refused_by_what_they_are(tmp_path, change, message):
    file = write(tmp_path / "x.gguf", [("t", np.ones((2, 32), np.float32))])
    file.write_bytes(file.read_bytes().replace(*change, 1))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        gguf.read(file)
    assert message in str(caught.value)


def test_an_unsupported_quantisation_is_named(tmp_path):
    raw = np.zeros((2, 98), np.uint8)
    file = write(tmp_path / "x.gguf", [("blk.0.attn_q.weight", raw, 18)])
    with pytest.raises(ValueError, match=r"'blk\.0\.attn_q\.weight' of type IQ3_XXS; expected one"):
        gguf.read(file)


def test_parts_are_found_from_any_of_them(tmp_path):
    names = [f"m-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    for name in names:
        write(tmp_path / name, [(name, np.ones(32, np.float32))])
    files = gguf.parts(tmp_path / names[1])
    assert [file.name for file in files] == names
    assert list(gguf.read_all(files)[1]) == names
    (tmp_path / names[2]).unlink()
    with pytest.raises(ValueError, match=r"m-00003-of-00003\.gguf; expected the 3 parts"):
        gguf.parts(tmp_path / names[0])


BASE = {
    "llama.block_count": 2, "llama.context_length": 64, "llama.embedding_length": 32,
    "llama.feed_forward_length": 48, "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e6, "llama.rope.dimension_count": 8, "llama.vocab_size": 40,
}  # fmt: skip


def params(tmp_path, changes=(), kind="llama", tensors=()):
    metadata = {key.replace("llama.", f"{kind}."): x for key, x in (BASE | dict(changes)).items()}
    return gguf_model.params(write(tmp_path / "x.gguf", tensors, metadata, kind))[0]


def test_metadata_becomes_the_official_fields(tmp_path):
    ends = {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.bos_token_id": 1}
    assert params(tmp_path, ends) == {
        "dim": 32, "n_layers": 2, "hidden_dim": 48, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8,
        "norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 64, "vocab_size": 40,
        "tied_embeddings": True, "bos_token_id": 1, "eos_token_id": [2],
    }  # fmt: skip
    lists = {"llama.attention.head_count_kv": [2, 2], "llama.feed_forward_length": [48, 48]}
    assert params(tmp_path, lists)["n_kv_heads"] == 2


def test_the_window_of_7b_v01_is_said(tmp_path):
    shapes = {
        "block_count": 32, "embedding_length": 4096, "feed_forward_length": 14336,
        "attention.head_count": 32, "context_length": 32768, "attention.head_count_kv": 8,
        "rope.freq_base": 1e4, "rope.dimension_count": 128,
    }  # fmt: skip
    metadata = BASE | {f"llama.{key}": value for key, value in shapes.items()}
    found, notes = gguf_model.params(write(tmp_path / "x.gguf", metadata=metadata))
    assert found["sliding_window"] == 4096
    assert "whose window of 4096 keys llama.cpp leaves out" in notes[0]
    metadata["llama.rope.freq_base"] = 1e6
    found, notes = gguf_model.params(write(tmp_path / "x.gguf", metadata=metadata))
    assert ("sliding_window" in found, notes) == (False, [])


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({}, "qwen2", "is of the architecture 'qwen2'; expected llama or mistral3"),
        ({"llama.logit_scale": 2.0}, "llama", r"llama\.logit_scale 2\.0, which is not supported"),
        ({"llama.rope.dimension_count": 4}, "llama", "expected 8, the width of a head"),
        ({"llama.feed_forward_length": [48, 64]}, "llama", r"\[48, 64\]; expected the same"),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            "llama",
            "rotation scaled by 'linear'; expected none or yarn",
        ),
    ],
)
def test_what_the_model_does_not_compute_is_refused(tmp_path, changes, kind, message):
    with pytest.raises(ValueError, match=message):
        params(tmp_path, changes, kind)


def test_names_are_those_that_llama_cpp_gives(tmp_path):
    """The library's own table says what each official tensor is called."""
    arch = library.MODEL_ARCH.LLAMA
    table = library.get_tensor_name_map(arch, 2)
    names = {
        f"{table.get_name(base)}.weight": f"{base}.weight"
        for base in (
            "tok_embeddings", "norm", "output", "layers.1.attention_norm", "layers.1.ffn_norm",
            *(f"layers.1.attention.{name}" for name in ("wq", "wk", "wv", "wo")),
            *(f"layers.1.feed_forward.{name}" for name in ("w1", "w2", "w3")),
        )
    }  # fmt: skip
    assert len(names) == 12
    tensors = [(name, np.full(4, i, np.float32)) for i, name in enumerate(names)]
    found = gguf_model.tensors([write(tmp_path / "x.gguf", tensors)])
    assert {name: place.array[0] for name, place in found.items()} == {
        official: i for i, official in enumerate(names.values())
    }


def test_experts_are_divided(tmp_path):
    tensors = [
        ("blk.0.ffn_gate_exps.weight", np.arange(24, dtype=np.float32).reshape(3, 2, 4)),
        ("blk.0.ffn_gate_inp.weight", np.ones((3, 4), np.float32)),
        ("blk.1.ffn_down.2.weight", np.ones((4, 2), np.float32)),
    ]
    found = gguf_model.tensors([write(tmp_path / "x.gguf", tensors)])
    assert list(found) == [
        *(f"layers.0.feed_forward.experts.{i}.w1.weight" for i in range(3)),
        "layers.0.feed_forward.gate.weight",
        "layers.1.feed_forward.experts.2.w2.weight",
    ]
    expert = found["layers.0.feed_forward.experts.1.w1.weight"]
    np.testing.assert_array_equal(expert.array, tensors[0][1][1])
    other = write(tmp_path / "y.gguf", [("v.patch_embd.weight", np.ones(4, np.float32))])
    with pytest.raises(ValueError, match=r"tensor 'v\.patch_embd\.weight', which is no part of"):
        gguf_model.tensors([other])


def texts(count=300):
    rng = np.random.default_rng(0)
    ranges = [(32, 127), (9, 14), (0xC0, 0x250), (0x4E00, 0x4F00), (0x1F600, 0x1F640)]
    for _ in range(count):
        kinds = rng.integers(0, len(ranges), 12)
        yield "".join(chr(rng.integers(*ranges[kind])) for kind in kinds)
        yield " ".join(rng.choice(["the", "  return", "def x():\n", "12345", "ä", "<s>"], 5))


def test_a_sentencepiece_tokenizer_encodes_as_the_file_that_it_was_made_from(tmp_path):
    data = (BUNDLED / "tokenizer.model").read_bytes()
    pieces = spm.pieces(data)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.text for piece in pieces],
        "tokenizer.ggml.scores": [piece.score for piece in pieces],
        "tokenizer.ggml.token_type": [int(piece.kind) for piece in pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    held = gguf.read(write(tmp_path / "x.gguf", metadata=metadata))
    made = gguf_tokenizer.files(held.metadata, "x.gguf")["tokenizer.model"]
    (tmp_path / "tokenizer.model").write_bytes(made)
    ours = Tokenizer.from_file(tmp_path / "tokenizer.model")
    original = Tokenizer.from_file(BUNDLED / "tokenizer.model")
    assert spm.pieces(made) == pieces
    assert (ours.bos_id, ours.eos_id, ours.version) == (1, 2, original.version)
    for text in texts():
        assert ours.encode(text) == original.encode(text)
        assert ours.decode(ours.encode(text)) == original.decode(original.encode(text))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "a tokenizer of kind 'bert'; expected llama"),
        ({"pre": "qwen2"}, r"divides texts as 'qwen2' .*; expected one of gpt-2"),
        ({"token_type": [1]}, "no type for each of its 3 tokens"),
        ({"merges": ["a"]}, "no list of pairs"),
        ({"model": "llama"}, "no score for each of its 3 tokens"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(changes, message):
    own = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"]}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in (own | changes).items()}
    with pytest.raises(ValueError, match=message):
        gguf_tokenizer.files(metadata, "x.gguf")


SMALL = {"hidden_dim": 64, "vocab_size": 64, "sliding_window": ...}
FIELDS = {
    "block_count": 2, "embedding_length": 32, "feed_forward_length": 64, "vocab_size": 64,
    "attention.head_count": 4, "attention.head_count_kv": 2, "context_length": 4096,
    "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e4, "rope.dimension_count": 8,
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("number", [0, 1, 8, 3], ids=["F32", "F16", "Q8_0", "Q4_1"])
def test_converts_to_the_numbers_of_the_blocks(tmp_path, number, tied):
    """A GGUF file, and an official checkpoint of its dequantised numbers, give the same arrays."""
    kind = library.GGMLQuantizationType(number)
    held = sources.tensors(tied, **{key: x for key, x in SMALL.items() if x is not ...})
    table = library.get_tensor_name_map(library.MODEL_ARCH.LLAMA, 2)
    written = []
    for name, array in held.items():
        raw = array if array.ndim == 1 else library.quants.quantize(array, kind)
        if array.ndim > 1:
            held[name] = library.quants.dequantize(raw, kind)
        theirs = f"{table.get_name(name.removesuffix('.weight'))}.weight"
        written.append((theirs, raw, *([number] if array.ndim > 1 and number > 1 else [])))
    metadata = {f"llama.{key}": value for key, value in FIELDS.items()}
    file = write(tmp_path / "tiny.gguf", written, metadata)
    changes = SMALL | {"max_position_embeddings": 4096, "tied_embeddings": tied}
    sources.write(tmp_path / "official", "official-safetensors", held, **changes)
    convert(file, tmp_path / "x")
    convert(tmp_path / "official", tmp_path / "y")
    (model, params, _), (expected_model, expected, _) = (
        mj.load(tmp_path / name, dtype="float32") for name in ("x", "y")
    )
    assert model.config == expected_model.config
    for path, array in flatten_dict(expected).items():
        np.testing.assert_array_equal(flatten_dict(params)[path], array, err_msg=str(path))


def test_a_folder_with_one_file_is_a_source_and_with_several_asks_for_a_name(tmp_path):
    (tmp_path / "x").mkdir()
    for name in ("a.gguf", "b.gguf"):
        write(tmp_path / "x" / name, metadata=BASE)
    with pytest.raises(ValueError, match=r"x holds a\.gguf and b\.gguf; name one file"):
        find(tmp_path / "x")
    (tmp_path / "x" / "b.gguf").unlink()
    assert find(tmp_path / "x").weight_files == (tmp_path / "x" / "a.gguf",)
    assert find(tmp_path / "x" / "a.gguf").format == "gguf"


def test_a_mixture_s_experts_are_read_one_by_one(tmp_path):
    """Experts in one quantised tensor, as llama.cpp has them, give those of an official file."""
    count, rng = 3, np.random.default_rng(0)
    table = library.get_tensor_name_map(library.MODEL_ARCH.LLAMA, 2)
    held, stacks, written = {}, {}, []
    for name, array in sources.tensors(**{k: x for k, x in SMALL.items() if x is not ...}).items():
        layer, _, matrix = name.partition(".feed_forward.")
        if not matrix:
            held[name] = array
            written.append((f"{table.get_name(name.removesuffix('.weight'))}.weight", array))
            continue
        raw = library.quants.quantize(
            rng.normal(size=(count, *array.shape)).astype(np.float32),
            library.GGMLQuantizationType.Q8_0,
        )
        stacks[table.get_name(name.removesuffix(".weight")) + "_exps.weight"] = raw
        for i, one in enumerate(library.quants.dequantize(raw, library.GGMLQuantizationType.Q8_0)):
            held[f"{layer}.feed_forward.experts.{i}.{matrix}"] = one
    for i in range(2):
        router = rng.normal(size=(count, 32)).astype(np.float32)
        held[f"layers.{i}.feed_forward.gate.weight"] = router
        written.append((f"blk.{i}.ffn_gate_inp.weight", router))
    written += [(name, raw, 8) for name, raw in stacks.items()]
    metadata = {f"llama.{key}": value for key, value in FIELDS.items()}
    metadata |= {"llama.expert_count": count, "llama.expert_used_count": 2}
    file = write(tmp_path / "tiny.gguf", written, metadata)
    moe = {"num_experts": count, "num_experts_per_tok": 2}
    changes = SMALL | {"max_position_embeddings": 4096, "moe": moe}
    sources.write(tmp_path / "official", "official-safetensors", held, **changes)
    convert(file, tmp_path / "x")
    convert(tmp_path / "official", tmp_path / "y")
    (model, params, _), (expected_model, expected, _) = (
        mj.load(tmp_path / name) for name in ("x", "y")
    )
    assert model.config == expected_model.config
    for path, array in flatten_dict(expected).items():
        np.testing.assert_array_equal(flatten_dict(params)[path], array, err_msg=str(path))


@pytest.mark.parametrize("multiplier", [0.0, 1.0])
def test_yarn_and_the_scale_of_queries_are_the_official_fields(tmp_path, multiplier):
    scaling = {
        "rope.scaling.type": "yarn", "rope.scaling.factor": 16.0,
        "rope.scaling.original_context_length": 16, "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0, "rope.scaling.yarn_log_multiplier": multiplier,
        "attention.temperature_scale": 0.1,
    }  # fmt: skip
    metadata = {f"mistral3.{key}": value for key, value in (FIELDS | scaling).items()}
    file = write(tmp_path / "x.gguf", metadata=metadata, kind="mistral3")
    yarn = {"factor": 16, "original_max_position_embeddings": 16, "beta": 32, "alpha": 1}
    changes = SMALL | {
        "yarn": yarn | {"apply_scale": bool(multiplier)},
        "llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 16},
        **{"max_position_embeddings": 4096, "tied_embeddings": True},
    }
    official = sources.write(tmp_path / "official", "official-safetensors", {}, **changes)
    found, expected = architecture.read(file), architecture.read(official / "params.json")
    assert found.config == expected.config
    del metadata["mistral3.rope.scaling.original_context_length"]
    with pytest.raises(ValueError, match=r"x\.gguf has yarn .* without original_max_position"):
        architecture.read(write(tmp_path / "x.gguf", metadata=metadata, kind="mistral3"))
