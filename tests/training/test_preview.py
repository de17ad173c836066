"""Laws of the preview: what is learnt, and nothing else, is set apart; texts are as they are."""

import io
import json
import random
import re

import numpy as np
import pytest
import tokenizer_samples as samples
from rich.console import Console

from mistral_jax.tokens.tokenizer import Tokenizer
from mistral_jax.training.data import examples as printed
from mistral_jax.training.data import records
from mistral_jax.training.data.records import Example, Pair

TOKENIZER = Tokenizer.from_file(samples.FILES["v3"])
TERMINAL = {"force_terminal": True, "color_system": "standard", "no_color": False}


def shown(examples, **options):
    file = io.StringIO()
    printed.show(examples, TOKENIZER, Console(file=file, width=40, **options))
    return file.getvalue()


def prompt_completion(prompt, completion):
    begin = TOKENIZER.encode(prompt, bos=True)
    learnt = TOKENIZER.encode(completion, eos=True, continues=bool(prompt))
    weights = [0.0] * len(begin) + [1.0] * len(learnt)
    return Example(np.int32(begin + learnt), np.float32(weights))


@pytest.fixture
def conversation(tmp_path):
    path = tmp_path / "data.jsonl"
    messages = [
        {"role": "user", "content": "Who?\nWho [bold]are[/bold] you?"},
        {"role": "assistant", "content": "I am :smile: [1] </s>", "weight": 0},
        {"role": "user", "content": "What?" + " word" * 30},
        {"role": "assistant", "content": "I am 日本 😀", "weight": 0.5},
    ]
    path.write_text(json.dumps({"messages": messages}))
    (example,) = records.read([path], TOKENIZER)
    return example


def test_a_file_gets_marks_around_what_is_learnt(conversation):
    learnt = int((conversation.weights > 0).sum())
    assert shown([conversation]) == (
        f"Example 1: {len(conversation.tokens)} tokens, {learnt} learnt with weight 0.5\n"
        "<s>[INST]Who?\nWho [bold]are[/bold] you?[/INST] I am :smile: [1] </s></s>[INST] What?"
        + " word" * 30
        + "[/INST]⟦ I am 日本 😀</s>⟧\n\n"
    )


def test_a_terminal_gets_colours(conversation):
    output = shown([conversation], **TERMINAL)
    assert "\x1b[1;32m I am 日本 😀\x1b[0m\x1b[1;7;32m</s>\x1b[0m" in output
    # A token of control differs from the same characters in a text.
    assert "[1] </s>\x1b[0m\x1b[2;7m</s>[INST]\x1b[0m" in output
    assert "⟦" not in output


def test_a_terminal_without_colours_gets_marks(conversation):
    output = shown([conversation], force_terminal=True, no_color=True)
    assert "⟦ I am 日本 😀</s>⟧" in re.sub(r"\x1b\[[\d;]*m", "", output)


def test_what_is_shown_is_what_was_encoded():
    rng = random.Random(0)
    for _ in range(200):
        prompt, completion = (samples.random_text(rng) for _ in range(2))
        output = shown([prompt_completion(prompt, completion)])
        # SentencePiece's own spelling of a space decodes to one.
        expected = f"<s>{prompt}⟦{completion}</s>⟧\n\n".replace("▁", " ")
        body = output.split("\n", 1)[1]
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", body)
        pictures = {chr(code): chr(0x2400 + code) for code in range(0x20) if code != 0x0A}
        assert body == expected.translate(str.maketrans(pictures)), (prompt, completion)


def test_both_sides_of_a_pair_are_shown():
    pair = Pair(prompt_completion("a", " yes"), prompt_completion("a", " no, no"))
    assert shown([pair, pair]).splitlines()[:6] == [
        "Pair 1, chosen: 4 tokens, 2 learnt",
        "<s>a⟦ yes</s>⟧",
        "",
        "Pair 1, rejected: 6 tokens, 4 learnt",
        "<s>a⟦ no, no</s>⟧",
        "",
    ]
