"""lm-evaluation-harness finds the same scores on our model as by its own Transformers backend."""

import json
import textwrap

import hf_reference
import huggingface_hub.constants
import lm_eval
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from convert.to_torch import to_torch
from mistral_jax.checkpoint.checkpoint import BUNDLED
from mistral_jax.cli import evaluate
from mistral_jax.evaluation.harness import MistralJax

# Both compute in float32. A score is a sum of terms, each of which is rounded.
TOLERANCE = 1e-5
MAX_LENGTH = 160  # above the bundled model's window, and below some of the texts

QUESTIONS = [
    ("def add(a, b):\n    return a", ["+ b", "- b", "* c"], 0),
    ("import numpy as ", ["os", "np", "jnp"], 1),
    ("for i in", ["range(10):", "while True:", "日本"], 0),
    ("if __name__ ==", ['"__main__":', "None:", "x + 1"], 0),
    ("class Stack(object):\n    def", ["import os", "return", "__init__(self):"], 2),
    ("try:\n    x = 1\nexcept", ["ValueError:", "pass", "finally:"], 0),
    ("x = 1\n" * 60 + "y =", ["1", "x"], 1),  # loses its beginning; answered wrongly
    ("", ["import os", "os import"], 0),
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}, cache_dir: {folder}}}
test_split: test
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
"""
WRITE = """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["\\n\\n", "):"], max_gen_toks: 24}
metric_list: [{metric: exact_match}]
"""
READ = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""


class SameTokenizer(SentencePieceBackend):
    """A tokenizer of Transformers' on our file: it finds special tokens by itself."""

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [self.bos_token_id, *token_ids_0]

    def convert_tokens_to_string(self, tokens):
        is_special = set(tokens) <= set(self.all_special_tokens)
        return "".join(tokens) if is_special else self.sp_model.decode(tokens)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Asks the Hub nothing, of which the harness wants to know each model's commit."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The bundled model as the harness has it: by Transformers, and ours."""
    folder = tmp_path_factory.mktemp("models")
    to_torch(BUNDLED, folder / "hf")
    tokenizer = SameTokenizer(
        vocab_file=str(BUNDLED / "tokenizer.model"),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    theirs = HFLM(
        pretrained=hf_reference.load(folder / "hf"),
        tokenizer=tokenizer,
        max_length=MAX_LENGTH,
        batch_size=1,
        device="cpu",
    )
    ours = MistralJax.create_from_arg_string(f"dtype=float32,max_length={MAX_LENGTH}")
    return theirs, ours


@pytest.fixture(scope="module")
def texts():
    """Python source, some of it longer than what the model reads at once."""
    source = textwrap.__loader__.get_source("textwrap")
    return [source[start : start + length] for start, length in ((0, 90), (700, 3000), (5, 600))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, texts):
    """A folder of three tasks, on questions and texts of its own."""
    home = tmp_path_factory.mktemp("tasks")
    asked = [dict(zip(("context", "choices", "answer"), q, strict=True)) for q in QUESTIONS]
    begun = [{"context": text[:200], "text": text[200:]} for text in texts]
    for name, form, records in (
        ("nano_choose", CHOICE, asked),
        ("nano_write", WRITE, begun),
        ("nano_read", READ, [{"text": text} for text in texts]),
    ):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (home / f"{name}.jsonl").write_text(lines)
        (home / f"{name}.yaml").write_text(TASK.format(name=name, folder=home) + form)
    return home


def requests(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=pair, idx=i)
        for i, pair in enumerate(arguments)
    ]


def test_tokens_are_the_same(models, texts):
    theirs, ours = models
    assert (ours.eot_token_id, ours.prefix_token_id) == (
        theirs.eot_token_id,
        theirs.prefix_token_id,
    )
    assert ours.max_length == theirs.max_length
    assert ours.tok_encode("<s>x") == theirs.tok_encode("<s>x")  # one BOS
    for text in [*texts, "", " x", "  x ", "\n\nx", "Straße 日本\U0001f600", "a\tb"]:
        for special in (None, False):
            found = ours.tok_encode(text, add_special_tokens=special)
            assert found == theirs.tok_encode(text, add_special_tokens=special), text


def test_continuations_have_the_same_log_likelihoods(models, texts):
    pairs = [(context, f" {choice}") for context, choices, _ in QUESTIONS for choice in choices]
    pairs += [(texts[0], texts[1][:300]), (texts[1], texts[0]), ("x  ", "y"), ("x", "\n")]
    asked = requests("loglikelihood", *pairs)
    theirs, ours = (model.loglikelihood(asked, disable_tqdm=True) for model in models)
    found, expected = ([logprob for logprob, _ in scores] for scores in (ours, theirs))
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert len({greedy for _, greedy in ours}) == 2


def test_whole_texts_have_the_same_log_likelihoods(models, texts):
    asked = requests("loglikelihood_rolling", *((text,) for text in texts))
    assert len(models[1].tok_encode(texts[1])) > 3 * MAX_LENGTH
    theirs, ours = (model.loglikelihood_rolling(asked, disable_tqdm=True) for model in models)
    np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("until", [["\n"], ["zzz", ")", "):"], "return", []])
def test_texts_are_continued_alike(models, texts, until):
    contexts = [texts[1], *(context for context, _, _ in QUESTIONS if context)]
    options = {"max_gen_toks": 20, "do_sample": False, "until": until}
    asked = requests("generate_until", *((context, dict(options)) for context in contexts))
    theirs, ours = (model.generate_until(asked, disable_tqdm=True) for model in models)
    assert ours == theirs
    assert any(ours)


def test_local_tasks_have_the_same_scores(models, folder):
    tasks = ["nano_choose", "nano_write", "nano_read"]
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    theirs, ours = (
        lm_eval.simple_evaluate(
            model, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=False
        )["results"]
        for model in models
    )
    assert set(ours) == set(tasks)
    for task in tasks:
        found, expected = (
            {name: value for name, value in own[task].items() if isinstance(value, float)}
            for own in (ours, theirs)
        )
        assert len(found) >= 1
        assert found == pytest.approx(expected, rel=1e-5)
    assert 0 < ours["nano_choose"]["acc,none"] < 1


def test_the_command_runs_them_too(models, folder, capsys):
    theirs = HFLM(pretrained=models[0].model, tokenizer=models[0].tokenizer, device="cpu")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    expected = lm_eval.simple_evaluate(
        theirs, tasks=["nano_choose"], task_manager=manager, log_samples=False
    )["results"]["nano_choose"]
    flags = ["--no-compilation-cache", "--json", "--dtype", "float32", "--tasks", "nano_choose"]
    questions = folder / "nano_choose.jsonl"
    assert evaluate.main([*flags, "--include-path", str(folder), "--choices", str(questions)]) == 0
    own, *lines = map(json.loads, capsys.readouterr().out.splitlines())
    found = {line["metric"]: (line["value"], line["stderr"]) for line in lines}
    names = "acc", "acc_norm", "acc_bytes"
    assert found == {
        name: pytest.approx((expected[f"{name},none"], expected[f"{name}_stderr,none"]))
        for name in names
    }
    assert own["questions"] == len(QUESTIONS)
    for wrong, message in (
        (["--tasks", "nano_chose"], "lm-evaluation-harness has no task 'nano_chose'"),
        (["--tasks", "nano_choose", "--include-path", "absent"], "there is no folder absent"),
    ):
        assert evaluate.main(wrong) == 2
        assert message in capsys.readouterr().err
