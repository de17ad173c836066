"""The command line of evaluation: what it prints where, and what it refuses."""

import json
import math
import sys

import jax
import numpy as np
import pytest
import tiny
import tokenizer_samples
from processes import together

import mistral_jax as mj
from mistral_jax.checkpoint import adapters, checkpoint
from mistral_jax.checkpoint.lora import Lora, init_adapters
from mistral_jax.cli import evaluate
from mistral_jax.engine.score import likelihoods
from mistral_jax.evaluation import choices
from mistral_jax.tokens.tokenizer import Tokenizer

TEXTS = ["import os\r\n\n" * 9, "Straße 日本", "def f(x):\n    return x"]
QUESTIONS = [
    {"question": "import numpy as", "choices": ["np", "os"], "answer": 0},
    {"question": "for i in", "choices": ["range", "x", "def"], "answer": "C"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny model, texts as files and as records, and questions."""
    home = tmp_path_factory.mktemp("evaluate")
    tokenizer = tokenizer_samples.train_small_mistral(home / "tokenizer.model")
    size = Tokenizer.from_file(tokenizer).vocab_size
    fields = {"n_layers": 1, "n_heads": 8, "n_kv_heads": 2, "hidden_dim": 48}
    model, params = tiny.build(vocab_size=size + -size % 8, **fields)
    checkpoint.save(home / "tiny", model.config, params, tokenizer)
    (home / "a.txt").write_bytes(TEXTS[0].encode())
    records = [{"text": text, "id": i} for i, text in enumerate(TEXTS[1:])]
    (home / "b.jsonl").write_text("\n".join(map(json.dumps, records)))
    (home / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    return home


@pytest.fixture(scope="module")
def loaded(folder):
    return mj.load(folder / "tiny", dtype="float32")


@pytest.fixture
def command(folder, capsys):
    """Runs the command; returns its exit code, standard output and standard error."""

    def run(*arguments):
        try:
            flags = ["--checkpoint", str(folder / "tiny"), "--no-compilation-cache"]
            code = evaluate.main([*flags, *map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def records(out):
    return [json.loads(line) for line in out.splitlines()]


def expected(name, scores):
    nats = -math.fsum(score.logprob for score in scores)
    tokens, size = sum(score.tokens for score in scores), sum(score.bytes for score in scores)
    return {
        "file": str(name),
        "documents": len(scores),
        "tokens": tokens,
        "bytes": size,
        "loss": pytest.approx(nats / tokens, abs=1e-5),
        "perplexity": pytest.approx(math.exp(nats / tokens), rel=1e-4),
        "bits_per_byte": pytest.approx(nats / math.log(2) / size, rel=1e-4),
    }


def test_each_file_has_the_loss_of_its_texts_and_all_have_that_of_all(command, folder, loaded):
    a, b = folder / "a.txt", folder / "b.jsonl"
    code, out, err = command(a, b, "--json", "--batch", 2)
    assert (code, err) == (0, "")
    scores = [mj.score(*loaded, text) for text in TEXTS]
    assert records(out) == [
        expected(a, scores[:1]),
        expected(b, scores[1:]),
        expected("all", scores),
    ]
    assert records(command(a, "--json")[1]) == records(out)[:1]


def test_adapters_change_the_loss_to_that_of_the_adapted_model(command, folder, loaded):
    model, params, _ = loaded
    lora = Lora(rank=2, alpha=4.0)
    made = jax.tree.map(lambda x: x + 0.3, init_adapters(lora, params, jax.random.key(0)))
    adapters.save(folder / "adapters", model.config, lora, made, overwrite=True)
    path = folder / "a.txt"
    code, out, err = command(path, "--json", "--lora", folder / "adapters")
    assert (code, err) == (0, "")
    adapted = mj.load(folder / "tiny", dtype="float32", lora=folder / "adapters")
    scores = [mj.score(*own, TEXTS[0]) for own in (adapted, loaded)]
    assert records(out) == [expected(path, scores[:1])]
    assert abs(scores[0].logprob - scores[1].logprob) > 1


def test_a_table_has_a_line_a_file_however_long_its_name(command, folder):
    path = folder / ("long" * 40 + ".txt")
    path.write_bytes((folder / "a.txt").read_bytes())
    head, line = command(path)[1].splitlines()
    assert head.split() == [
        *("file", "documents", "tokens", "bytes", "loss", "perplexity", "bits", "per", "byte")
    ]
    (record,) = records(command(path, "--json")[1])
    figures = [f"{record[name]:.4f}" for name in ("loss", "perplexity", "bits_per_byte")]
    assert line.split() == [str(path), "1", str(record["tokens"]), "108", *figures]


@pytest.mark.parametrize(("option", "starts"), [((), [1, 2, 4, 8, 16, 32, 64]), ((4,), None)])
def test_positions_share_out_all_tokens(command, folder, option, starts):
    path = folder / "a.txt"
    whole, *buckets = records(command(path, "--json", "--positions", *option)[1])
    assert sum(bucket["tokens"] for bucket in buckets) == whole["tokens"]
    nats = sum(bucket["tokens"] * bucket["loss"] for bucket in buckets)
    assert nats / whole["tokens"] == pytest.approx(whole["loss"])
    if starts:
        assert [bucket["first_position"] for bucket in buckets] == starts
    else:
        assert len(buckets) == 4


def test_a_circle_has_the_same_tokens_in_all_buckets(command, folder, loaded):
    path = folder / "a.txt"
    code, out, err = command(path, "--json", "--positions", 4, "--circle", 80)
    assert (code, err) == (0, "")
    buckets = records(out)[1:]
    assert [bucket["tokens"] for bucket in buckets] == [80] * 4
    tokenizer = loaded[2]
    ids = tokenizer.encode(TEXTS[0])[:80]
    rows = [[tokenizer.bos_id, *ids[i:], *ids[:i]] for i in (0, 20, 40, 60)]
    found = [row.logprobs[60:] for row in likelihoods(*loaded[:2], rows, 1)]
    assert buckets[3]["loss"] == pytest.approx(-np.mean(found), rel=1e-5)


def test_a_plot_is_drawn(command, folder, tmp_path):
    pytest.importorskip("matplotlib")
    code, out, err = command(folder / "a.txt", "--plot", tmp_path / "loss.png", "--json")
    assert (code, err) == (0, "")
    assert records(out)[1]["first_position"] == 1
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "not supported" in command(folder / "a.txt", "--plot", tmp_path / "loss.xyz")[2]


def test_a_missing_library_is_named_with_what_installs_it(command, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = command(folder / "a.txt", "--plot", "loss.png")
    assert (code, out) == (2, "")
    assert err.endswith("pip install 'mistral-jax-flax[train]'\n")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "mistral_jax.evaluation.harness", raising=False)
    code, out, err = command("--tasks", "x")
    assert (code, out) == (2, "")
    assert err.endswith("pip install 'mistral-jax-flax[harness]'\n")


def test_choices_are_judged(command, folder, loaded):
    path = folder / "questions.jsonl"
    code, out, err = command("--choices", path, "--json")
    assert (code, err) == (0, "")
    questions = choices.read(path)
    accuracy = choices.accuracy(questions, choices.logprobs(*loaded, questions))
    (record,) = records(out)
    assert record["choices"] == str(path)
    assert record["questions"] == 2
    assert record["acc_norm"] == accuracy.acc_norm
    assert record["acc_stderr"] == accuracy.acc_stderr
    assert "acc norm" in command("--choices", path)[1].splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nothing to evaluate; give a FILE, --choices or --tasks"),
        (["absent.txt"], "there is no file absent.txt; name one that exists"),
        ([".", "good.txt"], ". is a folder; expected a regular file"),
        (["empty.txt"], "empty.txt is empty; expected a text"),
        (["empty.jsonl"], "empty.jsonl is empty; expected JSON objects"),
        (["latin.txt"], "latin.txt is not UTF-8: byte 0xdf at offset 4"),
        (["bad.jsonl"], 'bad.jsonl, line 3: "text" is None; expected a string'),
        (["void.jsonl"], "void.jsonl, line 1 is empty; expected a text"),
        (["--choices", "latin.txt"], "latin.txt, line 1: byte 5 (0xdf) is not UTF-8"),
        (["--choices", "bad.jsonl"], "bad.jsonl, line 1 has none of question"),
        (["good.txt", "--batch", "0"], "--batch: '0' is not a whole number above 0"),
        (["good.txt", "--positions", "x"], "--positions: 'x' is not a whole number above 0"),
        (["--choices", "good.txt", "--positions"], "--positions and --plot need texts"),
        (["good.txt", "--positions", "3", "--circle", "8"], "--circle is 8; expected a multiple"),
        (["good.txt", "--positions", "--circle", "8"], "--circle is 8; expected a multiple"),
        (["good.txt", "--positions", "2", "--circle", "8"], "the longest text has 2 tokens"),
        (["good.txt", "--limit", "3"], "--limit is for --tasks; name some"),
        (["good.txt", "--sharding", "nothing"], "no sharding named 'nothing'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(command, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name, data in {
        "empty.txt": b"",
        "empty.jsonl": b"\n \n",
        "latin.txt": b"Stra\xdfe",
        "bad.jsonl": b'{"text": "a"}\n\n{"txt": "b"}\n',
        "void.jsonl": b'{"text": ""}',
        "good.txt": b"x",
    }.items():
        (tmp_path / name).write_bytes(data)
    code, out, err = command(*arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert message in err
    assert out == ""


def test_a_checkpoint_without_a_tokenizer_is_refused(folder, tmp_path, capsys):
    model, params = tiny.build(n_layers=1)
    checkpoint.save(tmp_path / "bare", model.config, params)
    flags = ["--no-compilation-cache", "--checkpoint", str(tmp_path / "bare")]
    assert evaluate.main([*flags, str(folder / "a.txt")]) == 2
    assert "has no tokenizer.model" in capsys.readouterr().err


@pytest.mark.slow
def test_several_processes_find_what_one_does(command, folder):
    """Over eight devices; the first alone prints."""
    given = folder / "a.txt", folder / "b.jsonl", "--choices", folder / "questions.jsonl", "--json"
    expected = records(command(*given)[1])
    flags = "--checkpoint", folder / "tiny", "--sharding", "data_tensor", "--mesh", "tensor=4"
    program = "-m", "mistral_jax.evaluate", "--no-compilation-cache"
    first, second = together(*program, *flags, *given)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert (second.out, second.err) == ("", "")
    for found, own in zip(records(first.out), expected, strict=True):
        (name, *figures), (own_name, *own_figures) = found.values(), own.values()
        assert (name, list(found)) == (own_name, list(own))
        assert figures == pytest.approx(own_figures, rel=1e-4)
