"""Answers to many prompts: each is what it would be alone, in whatever company it is generated."""

import pytest
import tiny
import tokenizer_samples

from mistral_jax.engine.sampling import Sampling
from mistral_jax.engine.text import completions
from mistral_jax.evaluation import drawing
from mistral_jax.evaluation.drawing import Prompt
from mistral_jax.tokens.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    path = tmp_path_factory.mktemp("drawing") / "tokenizer.model"
    tokenizer = Tokenizer.from_file(tokenizer_samples.train_small_mistral(path))
    model, params = tiny.build(vocab_size=tokenizer.vocab_size, n_layers=1)
    return model, params, tokenizer


def prompt(ids, new_tokens, temperature=0.0, stop=()):
    return Prompt(tuple(ids), new_tokens, stop, Sampling(temperature, seed=7))


def test_answers_are_those_of_each_prompt_alone(loaded):
    """More prompts than slots, of other lengths and stop strings, and several answers to one."""
    (alone,) = completions(*loaded, [[1, 5]], 12, sampling=Sampling(0), is_new=True)
    stop = alone.text[3:5]
    asked = [
        (prompt([1, 5], 12), {0: 10}),
        (prompt([1, 5], 12, stop=(stop,)), {0: 11}),
        (prompt([1, 9, 8, 7, 6], 3), {0: 12}),
        (prompt([1, 6], 6, temperature=2.0), {0: 13, 1: 14, 2: 15}),
    ]
    found = dict(drawing.draws_of(*loaded, asked, 2))
    assert set(found) == {10, 11, 12, 13, 14, 15}
    assert found[10] == alone.text
    assert found[11] == alone.text[: alone.text.index(stop)]
    assert len({found[13], found[14], found[15]}) == 3
    assert dict(drawing._in_turn(*loaded, asked)) == found
    # A journal may have some of the answers.
    rest = [(prompt([1, 6], 6, temperature=2.0), {1: 3})]
    assert dict(drawing.draws_of(*loaded, rest, 2)) == {3: found[14]}


def test_a_model_whose_logits_are_not_finite_gives_no_answer(loaded):
    model, params, tokenizer = loaded
    table = params["embed"]["embedding"].at[9].set(float("nan"))
    broken = params | {"embed": {"embedding": table}}
    with pytest.raises(ValueError, match="logits are not finite"):
        list(drawing.draws_of(model, broken, tokenizer, [(prompt([1, 9], 2), {0: 0})], 1))
