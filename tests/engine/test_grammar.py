"""Answers follow their grammars, whatever runs beside them, and other answers do not change."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import jax
import jsonschema
import numpy as np
import processes
import pytest
import tiny
import tokenizer_samples

from mistral_jax.engine.engine import Engine
from mistral_jax.engine.grammar import Grammar, Grammars
from mistral_jax.parallel.sharding import abstract_params, read_layout

LENGTH = 300
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def chained(count):
    """Returns a schema of definitions of which each names the next."""
    names = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(count)}
    return {"$defs": names | {f"d{count}": {"type": "integer"}}, "$ref": "#/$defs/d0"}


FORMS = {
    "json": (
        Grammar.json_schema(PERSON),
        lambda text: jsonschema.validate(json.loads(text), PERSON),
    ),
    "regex": (Grammar.regex("abc[0-9]{1,5}"), lambda text: re.fullmatch("abc[0-9]{1,5}", text)[0]),
    "lark": (Grammar.lark('start: "x" ("yz")~2'), lambda text: ["xyzyz"].index(text)),
    "gbnf": (Grammar.gbnf('root ::= "a"{5,5}'), lambda text: ["aaaaa"].index(text)),
    "choice": (Grammar.choice(["one", 'tw"o']), lambda text: ["one", 'tw"o'].index(text)),
}


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    return tiny.with_tokenizer(tmp_path_factory.mktemp("tokenizer"), more=4)


@pytest.fixture(scope="module")
def engine(mistral):
    with Engine(*mistral, slots=4, length=LENGTH) as made:
        made.warm_up()
        yield made


def allowed(tokenizer, grammar, is_new=True, tokens=()):
    """Returns the ids of the tokens that may follow `tokens`."""
    matcher = Grammars(tokenizer, tokenizer.vocab_size, [tokenizer.eos_id]).start(grammar, is_new)
    for token in tokens:
        matcher.push(token)
    mask = np.full(-(-tokenizer.vocab_size // 32), -1, np.int32)
    matcher.fill(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_follows_its_grammar(engine, form, temperature):
    grammar, check = FORMS[form]
    answers = [
        engine.submit("one two", 200, grammar=grammar, temperature=temperature, seed=seed, top_p=1)
        for seed in range(3)
    ]
    for answer in answers:
        found = answer.result(300)
        assert found.finish_reason == "stop"
        check(found.text)


def test_rows_with_and_without_grammars_are_as_alone(engine):
    rng = random.Random(0)
    asked = [
        {
            "prompt": [rng.randrange(3, 300) for _ in range(rng.choice([2, 9, 40]))],
            "max_new_tokens": rng.randint(1, 40),
            "temperature": rng.choice([0, 1]),
            "repetition_penalty": rng.choice([1, 1.2]),
            "grammar": rng.choice([None, *(grammar for grammar, _ in FORMS.values())]),
            "seed": i,
            "top_logprobs": rng.choice([0, 2]),
        }
        for i in range(24)
    ]
    together = [answer.result(300) for answer in [engine.submit(**one) for one in asked]]
    for one, found in zip(asked, together, strict=True):
        alone = engine.submit(**one).result(300)
        assert (found.tokens, found.text, found.finish_reason) == (
            *(alone.tokens, alone.text, alone.finish_reason),
        )
        np.testing.assert_allclose(found.logprobs, alone.logprobs, atol=1e-4, rtol=1e-4)


def test_nothing_is_compiled_after_warming_up(engine):
    names = []

    def listen(event, _, **__):
        if event.startswith("/jax/core/compile/"):
            names.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for grammar, _ in FORMS.values():
            engine.submit("one", 9, grammar=grammar, n=3)[0].result(300)
            engine.submit("one", 9).result(300)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert names == []


def test_a_prompts_continuation_follows_its_grammar_exactly(engine, mistral):
    """An answer may begin with a space, which decoding removes; a continuation may not."""
    tokenizer = mistral[2]
    found = engine.submit("one", 60, grammar=Grammar.regex("abc[0-9]{3}"), temperature=0)
    assert re.fullmatch("abc[0-9]{3}", found.result(300).text)
    pieces = {tokenizer.piece(token) for token in allowed(tokenizer, Grammar.json(), False)}
    assert not any(piece.startswith("▁") for piece in pieces)
    pieces = {tokenizer.piece(token) for token in allowed(tokenizer, Grammar.json(), True)}
    assert any(piece.startswith("▁") for piece in pieces)


def test_blanks_end(mistral):
    tokenizer = mistral[2]
    encode = tokenizer.encode
    begun = encode('{"a":', continues=True)
    blank = encode(" ", continues=True)
    assert blank[-1] in allowed(tokenizer, Grammar.json(), False, begun + 4 * blank)
    with pytest.raises(ValueError, match="left its grammar"):
        allowed(tokenizer, Grammar.json(), False, begun + 12 * blank)


def test_a_grammar_may_begin_after_a_control_token(engine, mistral):
    tokenizer = mistral[2]
    mark = tokenizer.control("[INST]")
    grammar = Grammar(Grammar.regex("abc").source, after=mark)
    free = engine.submit("one two", 20, temperature=0, stop_ids=())
    held = engine.submit("one two", 20, temperature=0, stop_ids=(), grammar=grammar)
    assert mark not in free.result(300).tokens
    assert held.result(300).tokens == free.result().tokens
    forced = engine.submit("one", 9, temperature=0, grammar=grammar, logit_bias={mark: 100})
    tokens = forced.result(300).tokens
    assert tokens[0] == mark
    assert tokenizer.decode(tokens[1:]).strip() == "abc"
    begins = Grammar.lark(f'start: <[{mark}]> "abc"')
    tokens = engine.submit("one", 9, grammar=begins).result(300).tokens
    assert tokens[0] == mark
    assert tokenizer.decode(tokens[1:]).strip() == "abc"


def test_an_answer_that_is_cut_off_says_so(engine):
    found = engine.submit("one", 3, grammar=Grammar.regex("[a-z]{90}"), temperature=0).result(300)
    assert (len(found.tokens), found.finish_reason) == (3, "length")


def test_a_bias_against_the_grammar_fails_alone(engine, mistral):
    tokenizer = mistral[2]
    banned = dict.fromkeys(allowed(tokenizer, Grammar.regex("abc")), float("-inf"))
    bad = engine.submit("one", 9, grammar=Grammar.regex("abc"), logit_bias=banned)
    good = engine.submit("one", 9, grammar=Grammar.regex("abc"))
    assert bad.result(300).finish_reason == "error"
    assert "left its grammar" in bad.result().error or "not finite" in bad.result().error
    assert good.result(300).text == "abc"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grammar.regex("("), "the grammar is invalid: .*unclosed group"),
        (lambda: Grammar.lark("start: nothing"), "the grammar is invalid: .*nothing"),
        (lambda: Grammar.gbnf("root"), "the grammar is invalid"),
        (lambda: Grammar.json_schema({"type": "hiccup"}), "Invalid type: hiccup"),
        (lambda: Grammar.json_schema({"type": 123}), "type must be a string"),
        (lambda: Grammar.json_schema(123), "the JSON schema is 123; expected an object"),
        (lambda: Grammar.json_schema({"$ref": "http://x/y"}), "not present in a registry"),
        (lambda: Grammar.regex("a" * 9000), "has 9000 characters; expected at most 8192"),
        (lambda: Grammar.lark("start: a\n" * 1001), "has 1001 lines; expected fewer than 1000"),
        (lambda: Grammar.json_schema({"pattern": "a" * 9000}), "has 9000 characters"),
        (lambda: Grammar.json_schema(chained(3500)), "references; expected fewer"),
        (lambda: Grammar.regex(5), "the regex is 5; expected a text"),
    ],
)
def test_grammars_that_make_no_sense_are_refused(engine, make, message):
    with pytest.raises(ValueError, match=message) as caught:
        engine.submit("one", 5, grammar=make())
    assert "\n" not in str(caught.value)


LARGEST = """
import sys, threading
from mistral_jax.engine.grammar import Grammar, Grammars
from mistral_jax.tokens.tokenizer import Tokenizer
from test_grammar import chained

def compile_all():
    rules = "".join(f"r{i}: r{i + 1}\\n" for i in range(990))
    grammars = Grammars(Tokenizer.from_file(sys.argv[1]), 400, [2])
    for grammar in (
        Grammar.lark(f'start: r0\\n{rules}r990: "a"'),
        Grammar.gbnf("root ::= r0\\n" + rules.replace(":", " ::=") + 'r990 ::= "a"'),
        Grammar.json_schema(chained(990)),
    ):
        assert grammars.start(grammar, True).holds
    try:
        grammars.start(Grammar.regex("a?" * 2700 + "a" * 2700), True)
    except ValueError as error:
        assert "invalid" in str(error)
    print("all")

thread = threading.Thread(target=compile_all)
thread.start()
thread.join()
"""


@pytest.mark.slow
def test_the_largest_grammars_do_not_end_the_process(tmp_path):
    """An overflow of the stack inside the library cannot be caught."""
    path = tokenizer_samples.train_small_mistral(tmp_path / "tokenizer.model")
    command = [sys.executable, "-c", LARGEST, str(path)]
    here = Path(__file__).parent
    paths = f"{here}:{here.parent}:{os.environ.get('PYTHONPATH', '')}"
    environment = processes.environment() | {"PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "all\n"), done.stderr


def test_a_layout_follows_grammars_too(mistral):
    model, params, tokenizer = mistral
    layout = read_layout("data_tensor", model.config)
    places = jax.tree.map(lambda x: x.sharding, abstract_params(model, layout))
    laid = model.clone(rules=layout.rules), jax.device_put(params, places), tokenizer
    with Engine(*laid, slots=4, length=64) as engine:
        answers = [engine.submit("one", 40, grammar=g, temperature=0) for g, _ in FORMS.values()]
        other = engine.submit("one", 9, temperature=0)
        for answer, (_, check) in zip(answers, FORMS.values(), strict=True):
            if answer.result(300).finish_reason == "stop":
                check(answer.result().text)
        assert len(other.result(300).tokens) == 9
