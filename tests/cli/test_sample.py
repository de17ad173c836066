"""The command line of generation: what it prints where, and what it refuses."""

import io
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import mistral_jax
from mistral_jax.checkpoint import adapters, checkpoint
from mistral_jax.checkpoint.lora import Lora, init_adapters
from mistral_jax.engine import prefill
from mistral_jax.engine.sampling import Sampling
from mistral_jax.engine.text import chat, complete

SAMPLING = Sampling(temperature=1, top_p=1, seed=4)
FLAGS = ["--temperature", "1", "--top-p", "1", "--seed", "4", "--max-tokens", "12"]


@pytest.fixture
def typed(monkeypatch):
    """Sets standard input to some bytes."""

    def set_input(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))

    return set_input


def expected(folder, prompt, **options):
    return complete(*checkpoint.load(folder), prompt, 12, sampling=SAMPLING, **options)


def test_standard_output_carries_the_continuation_and_nothing_else(command, folder):
    assert command("def main") == (0, expected(folder, "def main") + "\n", "")


def test_a_prompt_stands_before_its_continuation_on_a_terminal(command, folder, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert command("def main")[1] == "def main" + expected(folder, "def main") + "\n"
    assert command("def main", "--chat")[1] == _answer(folder, ["def main"])[0] + "\n"
    assert command("def main", "--json")[1].startswith("{")


def _answer(folder, questions, system=()):
    loaded = checkpoint.load(folder)
    conversations = [[*system, {"role": "user", "content": text}] for text in questions]
    return [chat(*loaded, messages, 12, sampling=SAMPLING) for messages in conversations]


def test_a_dash_reads_standard_input_without_its_last_newline(command, folder, typed):
    typed("Straße\n\n".encode())
    assert command("-")[1] == expected(folder, "Straße\n") + "\n"


def test_standard_input_must_be_utf8(command, typed):
    typed(b"abc\xff")
    code, out, err = command("-")
    assert (code, out) == (2, "")
    assert err == (
        "error: standard input is not UTF-8: byte 0xff at offset 3; convert it to UTF-8 first\n"
    )


def test_several_prompts_make_a_batch(command, folder, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("import\n\nreturn 日本\n", encoding="utf-8")
    prompts = ["def", "import", "return 日本"]
    texts = expected(folder, prompts)
    code, out, err = command("def", "--prompts-file", str(file))
    assert (code, out, err) == (0, "\n\n".join(texts) + "\n", "")


def test_only_a_line_feed_ends_a_prompt_and_a_mark_is_none(command, tmp_path, typed):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa  # x\u2028y\r\ndef f():\x0c\n    pass\x85\n".encode())
    flags = ["--prompts-file", str(file), "--json", "--max-tokens", "1"]
    lines = command(*flags)[1].splitlines()
    prompts = ["a  # x\u2028y", "def f():\x0c", "    pass\x85"]
    assert [json.loads(line)["prompt"] for line in lines] == prompts
    typed(b"\xef\xbb\xbfdef")
    assert json.loads(command("-", "--json", "--max-tokens", "1")[1])["prompt"] == "def"


def test_json_tells_all(command, folder):
    code, out, err = command("def", "日本", "--json", "--top-logprobs", "2", "--stop", "\0")
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in lines] == ["def", "日本"]
    assert [line["text"] for line in lines] == expected(folder, ["def", "日本"])
    for line in lines:
        assert list(line) == [
            *("prompt", "text", "tokens", "logprobs", "finish_reason", "seconds", "top_logprobs")
        ]
        assert line["finish_reason"] in ("stop", "length")
        assert len(line["tokens"]) == len(line["logprobs"]) == len(line["top_logprobs"]) <= 12
        assert all(len(top) == 2 for top in line["top_logprobs"])
        assert 0 < line["seconds"]["first_token"] <= line["seconds"]["total"]


def test_json_is_valid_where_logits_are_not_finite(command, folder, tmp_path):
    model, params, tokenizer = checkpoint.load(folder)
    table = params["embed"]["embedding"].at[tokenizer.encode("x")[-1]].set(jnp.nan)
    params = params | {"embed": {"embedding": table}}
    checkpoint.save(tmp_path / "nan", model.config, params, folder / "tokenizer.model")
    flags = ["--checkpoint", str(tmp_path / "nan"), "--top-logprobs", "1", "--max-tokens", "3"]
    code, out, err = command("x", "y", "--json", *flags)

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    failed, sound = (json.loads(line, parse_constant=refuse) for line in out.splitlines())
    assert (failed["text"], failed["tokens"], failed["finish_reason"]) == ("", [], "error")
    assert "float16" in failed["error"]
    assert "error" not in sound
    assert (code, err) == (2, f"error: prompt 0: {failed['error']}\n")
    assert command("x", *flags[:2], *flags[4:]) == (2, "\n", f"error: {failed['error']}\n")


def test_messages_are_answered_with_their_system_text(command, folder):
    flags = ["--chat", "--system", "Be brief."]
    system = [{"role": "system", "content": "Be brief."}]
    answers = _answer(folder, ["Hello", "Hi"], system)
    assert command("Hello", *flags)[1] == answers[0] + "\n"
    assert command("Hello", "Hi", *flags)[1].startswith(answers[0] + "\n\n")


def test_a_conversation_remembers(command, folder, typed):
    typed(b"Hello\nAnd now?\n/reset\nHello\n")
    loaded = checkpoint.load(folder)
    messages, answers = [], []
    for text in ("Hello", "And now?"):
        messages.append({"role": "user", "content": text})
        answers.append(chat(*loaded, messages, 12, sampling=SAMPLING))
        messages.append({"role": "assistant", "content": answers[-1]})
    assert command("--chat") == (0, "".join(f"{a}\n" for a in (*answers, answers[0])), "")


def test_adapters_are_used_beside_the_weights_and_merged(command, folder, tmp_path):
    model, params, _ = checkpoint.load(folder)
    lora, key = Lora(rank=2, targets=("v_proj", "lm_head")), jax.random.key(0)
    made = jax.tree.map(lambda x: x + 0.3, init_adapters(lora, params, key))
    adapters.save(tmp_path / "x", model.config, lora, made)
    loaded = checkpoint.load(folder, lora=tmp_path / "x")
    text = complete(*loaded, "def", 12, sampling=Sampling(0))
    flags = ["def", "--lora", str(tmp_path / "x"), "--temperature", "0"]
    assert command(*flags) == (0, text + "\n", "")
    assert command(*flags, "--merge") == (0, text + "\n", "")
    assert text != complete(*checkpoint.load(folder), "def", 12, sampling=Sampling(0))


def test_matrices_are_quantised_where_asked(command, folder):
    loaded = checkpoint.load(folder, quantize="int8")
    text = complete(*loaded, "def", 12, sampling=Sampling(0))
    flags = ["def", "--quantize", "int8", "--temperature", "0"]
    assert command(*flags) == (0, text + "\n", "")


def test_stats_are_told_on_standard_error(command, folder):
    code, out, err = command("def main", "--stats")
    assert (code, out) == (0, expected(folder, "def main") + "\n")
    names = [line.split("  ")[0] for line in err.splitlines()]
    assert names == ["load", "compile", "first token", "prefill", "decode", "memory"]


def test_the_limit_can_be_lifted(command):
    code, _, err = command("def main", "--max-positions", "10")
    assert code == 2
    assert "the model's 10 positions" in err
    assert "--max-positions" in err
    assert command("def main", "--max-positions", "100", "--max-tokens", "1")[0] == 0


def test_the_cache_may_be_in_8_bits(command, monkeypatch):
    kept = []
    make = prefill.init_cache

    def init_cache(config, rows, length, dtype, *order):
        kept.append(dtype)
        return make(config, rows, length, dtype, *order)

    monkeypatch.setattr(prefill, "init_cache", init_cache)
    prefill.start_reading.clear_cache()
    code, out, _ = command("def main", "--kv-cache-dtype", "int8", "--max-tokens", "3")
    assert (code, kept) == (0, [jnp.dtype("int8")])
    assert out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no prompt; give one, - for standard input, or --chat"),
        (["x", "--system", "y"], "--system is for --chat"),
        (["x", "--tools", "y"], "--tools is for --chat"),
        (["x", "--chat", "--suffix", "y"], "--suffix is for a prompt to complete; leave out"),
        (["x", "--suffix", "y"], "the tokenizer has no [SUFFIX]: the model cannot fill in"),
        (["x", "--chat", "--chat-form", "none"], "the model has no chat form: it is a base mod"),
        (["x", "--chat", "--chat-form", "v7", "--system", "y"], "the tokenizer has no [SYSTEM_P"),
        (["x", "--chat", "--chat-form", "template"], "the checkpoint has no chat template; con"),
        (["--chat", "--json"], "--json is for prompts"),
        (["x", "--temperature", "nan"], "temperature is nan; expected a number from 0 to 100"),
        (["x", "--top-p", "2"], "top_p is 2.0; expected a number from 0 to 1"),
        (["x", "--top-k", "-1"], "top_k is -1; expected an integer from 0"),
        (["x", "--top-k", "1.5"], "argument --top-k: invalid int value: '1.5'"),
        (["x", "--min-p", "inf"], "min_p is inf; expected a number from 0 to 1"),
        (["x", "--seed", "-1"], "seed is -1; expected an integer from 0"),
        (["x", "--max-tokens", "0"], "max_new_tokens is 0; expected an integer above 0"),
        (["x", "--max-positions", "0"], "max_positions is 0; expected an integer above 0"),
        (["x", "--max-tokens", "-1"], "max_new_tokens is -1; expected an integer above 0"),
        (["x", "--max-positions", "-1"], "max_positions is -1; expected an integer above 0"),
        (
            ["x", "--json", "--top-logprobs", "21"],
            "top_logprobs is 21; expected an integer from 0 to 20",
        ),
        (["x", "--top-logprobs", "-1"], "top_logprobs is -1; expected an integer from 0"),
        (["x", "--stop", ""], "stop has ''; expected strings that are not empty"),
        (["x", "--logit-bias", "3"], "argument --logit-bias: '3' is not a token id, =, and a"),
        (["x", "--logit-bias", "99999=1"], "logit_bias names token 99999; expected 0 to"),
        (["x", "--logit-bias", "3=nan"], "logit_bias has 3: nan; expected a token id and a"),
        (["x", "--prompts-file", "no/such"], "there is no file no/such; name one that exists"),
        (
            ["--chat", "--prompts-file", os.devnull],
            "/dev/null is a device; expected a regular file",
        ),
        (["x", "--top-logprobs", "2"], "--top-logprobs needs --json, the only output that"),
        (["x", "--sharding", "none"], "no sharding named 'none'; expected one of"),
        (["x", "--mesh", "tensor=2"], "mesh is {'tensor': 2} without a sharding; name one"),
        (["x", "--mesh", "tensor"], "'tensor' is not a list of mesh axes and their sizes"),
        (["x", "--sharding", "tensor", "--mesh", "data=2"], "has no mesh axis 'data'"),
        (["x", "--checkpoint", "no/such"], "no/such"),
        (["x", "--lora", "no/such"], "no/such has no adapter_model.safetensors and no lora."),
        (["x", "--merge"], "--merge is for --lora DIR; name the adapters to merge"),
        (["\udcff"], "the text has a lone surrogate"),
    ],
)
def test_mistakes_end_in_one_line(command, arguments, message):
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_source_folder_gets_the_command_that_converts_it(command, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    code, _, err = command("x", "--checkpoint", str(tmp_path))
    assert code == 2
    assert f"python -m mistral_jax.convert to-orbax {tmp_path} " in err


def test_a_checkpoint_without_a_tokenizer_is_refused(command, folder, tmp_path):
    model, params, _ = checkpoint.load(folder)
    checkpoint.save(tmp_path / "bare", model.config, params)
    code, _, err = command("x", "--checkpoint", str(tmp_path / "bare"))
    assert (code, err.count("has no tokenizer.model")) == (2, 1)


def test_version(command):
    assert command("--version") == (0, f"mistral_jax {mistral_jax.__version__}\n", "")


@pytest.mark.slow
def test_a_closed_pipe_ends_it_silently_and_programs_are_kept(folder, tmp_path):
    cache = tmp_path / "cache"
    with subprocess.Popen(
        [sys.executable, "-m", "mistral_jax.sample", "x", "--checkpoint", folder, *FLAGS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"},
    ) as run:
        run.stdout.close()
        said = run.stderr.read().decode()  # Nothing, or that it takes long.
        line = r"compiling (C\+\+ kernels and )?programs .*, once: later runs find them\n"
        assert re.fullmatch(f"({line})?", said)
    assert run.returncode == 0
    assert any((cache / "mistral_jax" / "xla").iterdir())
