"""Laws of Tekken, with Mistral's own files and with small ones of every version."""

import base64
import json
import os
import random
import subprocess
import sys

import pytest
import tekken_samples
import tokenizer_samples as samples

from mistral_jax.tokens.tokenizer import Tokenizer

VERSIONS = ("v3", "v7", "v11", "v13", "v15")


@pytest.fixture(scope="module")
def real():
    return Tokenizer.from_file(tekken_samples.FILES[1])


@pytest.fixture(scope="module", params=VERSIONS)
def small(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tekken") / "tekken.json"
    return Tokenizer.from_file(tekken_samples.write(path, request.param))


def test_sizes_and_special_ids(real):
    assert (real.kind, real.version, real.vocab_size) == ("tekken", "v3", 131072)
    assert (real.unk_id, real.bos_id, real.eos_id) == (0, 1, 2)
    found = {name: real.control(name) for name in ("[INST]", "[SUFFIX]", "[TOOL_CONTENT]", "<pad>")}
    assert found == {"[INST]": 3, "[SUFFIX]": 16, "[TOOL_CONTENT]": 19, "<pad>": 11}
    assert (real.control("<SPECIAL_20>"), real.piece(999)) == (20, "<SPECIAL_999>")
    assert real.control("the") is None
    assert real.is_control(999)
    assert not real.is_control(1000)
    assert real.piece(1000 + 0xE4) == "<0xE4>"


def test_ids_equal_mistral_commons(real):
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    oracle, rng = Tekkenizer.from_file(tekken_samples.FILES[1]), random.Random(0)
    for _ in range(3000):
        text = samples.random_text(rng)
        ids = real.encode(text, bos=True, eos=True)
        assert ids == oracle.encode(text, bos=True, eos=True)
        assert real.decode(ids) == text


def test_small_files_equal_mistral_commons(small, tmp_path):
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    path = tekken_samples.write(tmp_path / "tekken.json", small.version)
    oracle, rng = Tekkenizer.from_file(path), random.Random(1)
    assert small.vocab_size == oracle.n_words
    for name in ("<s>", "[INST]", "[ARGS]", "[THINK]", "<SPECIAL_20>", "<SPECIAL_23>"):
        found = small.control(name)
        assert found == (oracle.get_special_token(name) if oracle.is_special(name) else None)
    for _ in range(300):
        text = samples.random_text(rng)
        assert small.encode(text) == oracle.encode(text, bos=False, eos=False)


def test_ranks_of_special_tokens_may_have_gaps_and_any_order(tmp_path):
    made = tekken_samples.described("v11")
    listed = made["special_tokens"][::-1]
    made["special_tokens"] = [entry for entry in listed if entry["rank"] != 10]
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps(made))
    tokenizer = Tokenizer.from_file(path)
    assert [tokenizer.piece(i) for i in (1, 3, 10)] == ["<s>", "[INST]", "<SPECIAL_10>"]


# Mistakes


def _changed(**changes):
    made = tekken_samples.described()
    for where, value in changes.items():
        *inner, last = where.split("__")
        table = made
        for name in inner:
            table = table[int(name) if name.isdecimal() else name]
        if value is ...:
            del table[last]
        else:
            table[int(last) if last.isdecimal() else last] = value
    return made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": 5}, "has config 5; expected an object"),
        ({"vocab": {}}, "has vocab {}; expected a list"),
        ({"vocab__7": 3}, "has vocab .* expected a list of .* each an object"),
        ({"config__pattern": ...}, "config has pattern None; expected a string"),
        ({"config__pattern": "(?<!"}, "the pattern is .* expected a regular"),
        ({"config__pattern": "a" * 20_000}, "has a pattern of 20000 characters"),
        ({"config__version": 3}, "config has version 3; expected a string"),
        ({"config__version": "three"}, "has version 'three'; expected one such as"),
        ({"config__version": "v11"}, "has version v11 and no special_tokens"),
        ({"config__default_vocab_size": 10**6}, r"has \d+ entries in vocab; expected at least"),
        ({"config__default_vocab_size": 10**9}, "has default_vocab_size 1000000000; expected an"),
        ({"config__default_num_special_tokens": 1}, "has default_num_special_tokens 1; expected"),
        ({"config__default_num_special_tokens": 200}, "entries in vocab; expected at least 256"),
        ({"vocab__270": {}}, r"vocab\[270\] has token_bytes None; expected bytes in base64"),
        ({"vocab__9__token_bytes": "*"}, r"vocab\[9\] has token_bytes '\*'; expected bytes in"),
        ({"vocab__9__rank": 10}, r"vocab\[9\] has rank 10; expected 9"),
        ({"vocab__9__rank": True}, r"vocab\[9\] has rank True; expected 9"),
        (
            {"vocab__9__token_bytes": "QQ=="},
            r"vocab\[9\] has token_bytes 'QQ=='; expected the byte",
        ),
        ({"vocab__260__token_bytes": "QQ=="}, "has two entries in vocab with the same token_bytes"),
        ({"special_tokens": "x"}, "has special_tokens 'x'; expected a list"),
        ({"special_tokens": [{"rank": 1}]}, r"special_tokens\[0\] has token_str None; expected"),
        ({"special_tokens": [{"rank": 1, "token_str": "<s>"}]}, "no special tokens <s> and </s>"),
        ({"special_tokens": [{"rank": 99, "token_str": "<s>"}]}, "has rank 99; expected a rank of"),
        (
            {"special_tokens": [{"rank": i, "token_str": "<s>"} for i in (0, 1)]},
            "has two special tokens with the same token_str",
        ),
    ],
)
def test_files_that_are_no_tekken_json_are_refused(tmp_path, changes, message):
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps(_changed(**changes)))
    with pytest.raises(ValueError, match=rf"tekken\.json.*{message}") as error:
        Tokenizer.from_file(path)
    assert "\n" not in str(error.value)


def test_damaged_files_are_refused(tmp_path):
    path = tekken_samples.write(tmp_path / "tekken.json")
    whole = path.read_bytes()
    for data, message in (
        (whole[:5000], "is not valid JSON"),
        (whole[:-1], "is not valid JSON"),
        (b"{}", "is not a SentencePiece model"),
        (b"{" * 100_000, "is not valid JSON|is nested too deeply"),
        (whole.replace(b"rank", b"\xff\xff"), "UTF-8"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            Tokenizer.from_file(path)
    with path.open("wb") as file:
        file.write(b"{")
        file.truncate(1 << 30)
    with pytest.raises(ValueError, match=r"has 1\.1 GB; expected at most 67\.1 MB"):
        Tokenizer.from_file(path)


def test_a_pattern_that_backtracks_for_ever_is_refused_in_bounded_time(tmp_path):
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps(_changed(config__pattern=r"(?:(?=a)a+)+b(?<=b)")))
    tokenizer = Tokenizer.from_file(path)
    with pytest.raises(ValueError, match="pattern"):
        tokenizer.encode("a" * 64)


def test_the_missing_package_is_named(tmp_path):
    path = tekken_samples.write(tmp_path / "tekken.json")
    program = (
        "import sys; sys.modules['tiktoken'] = None\n"
        "from mistral_jax.tokens.tokenizer import Tokenizer\n"
        f"Tokenizer.from_file({str(path)!r})"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ)
    )
    assert "pip install 'mistral-jax-flax[tekken]'" in found.stderr.splitlines()[-1]


def test_the_vocabulary_is_cut_to_the_size_of_the_config(tmp_path):
    made = tekken_samples.described(unused=50)
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps(made))
    tokenizer = Tokenizer.from_file(path)
    assert tokenizer.vocab_size == made["config"]["default_vocab_size"]
    last = made["vocab"][tokenizer.vocab_size - 24 - 1]["token_bytes"]
    assert tokenizer._spell(tokenizer.vocab_size - 1, None) == base64.b64decode(last)
