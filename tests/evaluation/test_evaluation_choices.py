"""Multiple choice: what is chosen by which rule, what is encoded, and what is refused."""

import json
import math

import numpy as np
import pytest

import mistral_jax as mj
from mistral_jax.evaluation import choices
from mistral_jax.evaluation.choices import Question


@pytest.fixture(scope="module")
def loaded():
    return mj.load(dtype="float32")


@pytest.fixture
def write(tmp_path):
    def write(*lines):
        path = tmp_path / "questions.jsonl"
        path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
        return path

    return write


def test_each_way_to_write_a_question_reads_the_same(write):
    both = ["yes", "no"]
    path = write(
        {"question": "Is it?", "choices": both, "answer": 1},
        {"query": "Is it?", "choices": both, "gold": "B"},
        "",
        {"prompt": "Is it?", "choices": both, "answer": "b", "source": "elsewhere"},
        {"context": "Is it?", "choices": both, "gold": 1},
    )
    assert choices.read(path) == [Question("Is it?", ("yes", "no"), 1)] * 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: character 2 is not JSON"),
        ("[1]", "line 2: it begins a JSON list; expected JSON Lines"),
        ({"choices": ["a", "b"], "answer": 0}, "line 2 has none of question, query"),
        (
            {"question": "x", "query": "x", "choices": ["a", "b"], "answer": 0},
            r"line 2 has \['question', 'query'\] of",
        ),
        ({"question": 3, "choices": ["a", "b"], "answer": 0}, "the question is 3; expected a str"),
        ({"question": "x", "choices": "ab", "answer": 0}, "\"choices\" is 'ab'; expected a list"),
        ({"question": "x", "choices": ["a", ""], "answer": 0}, "expected a list of strings"),
        ({"question": "x", "choices": ["a"], "answer": 0}, "has 1 entries; expected at least 2"),
        ({"question": "x", "choices": ["a", "b"]}, "line 2 has none of answer, gold"),
        *(
            (
                {"question": "x", "choices": ["a", "b"], "answer": answer},
                "expected an index from 0 to 1, or a letter from A to B",
            )
            for answer in (2, -1, "C", "", "1", "yes", True, None, 0.0)
        ),
    ],
)
def test_a_bad_line_is_named(write, line, message):
    path = write({"question": "x", "choices": ["a", "b"], "answer": 0}, line)
    with pytest.raises(ValueError, match=message) as error:
        choices.read(path)
    assert str(error.value).startswith(f"{path}, line 2")


def test_each_rule_divides_by_its_own_length():
    """The first question is right by the sum alone, the others by one more rule each."""
    questions = [
        Question("", ("ab", "abcdefgh"), 0),
        Question("", ("ab", "abcdefgh"), 1),
        Question("", ("äöüß", "abcdef"), 0),
    ]
    found = [[-4.0, -6.0], [-4.0, -6.0], [-4.0, -5.5]]
    accuracy = choices.accuracy(questions, found)
    assert accuracy.questions == 3
    assert accuracy.acc == pytest.approx(2 / 3)
    assert accuracy.acc_norm == pytest.approx(1 / 3)
    assert accuracy.acc_bytes == pytest.approx(2 / 3)
    for right, error in (
        ([1, 0, 1], accuracy.acc_stderr),
        ([0, 1, 0], accuracy.acc_norm_stderr),
        ([0, 1, 1], accuracy.acc_bytes_stderr),
    ):
        assert error == pytest.approx(np.std(right, ddof=1) / math.sqrt(3))
    assert choices.accuracy(questions[:1], found[:1]).acc_stderr is None


@pytest.mark.parametrize("context", ["x =", "x = ", "x =\n", "", "\n"])
def test_an_answer_has_the_tokens_that_it_adds(loaded, context):
    tokenizer = loaded[2]
    first, rest = choices.encode(tokenizer, context, "y + 1")
    space = "" if not context or context[-1].isspace() else " "
    assert tokenizer.decode(first + rest) == f"{context}{space}y + 1"
    assert first[0] == tokenizer.bos_id
    assert tokenizer.decode(first) == context.rstrip()
    assert "y" not in tokenizer.decode(first)


def test_the_probability_of_an_answer_is_that_of_the_text_given_the_question(loaded):
    model, params, tokenizer = loaded
    questions = [
        Question("import numpy as", ("np", "os", "jnp.array"), 0),
        Question("", ("import os", "os import"), 0),
    ]
    found = choices.logprobs(*loaded, questions, batch=3)
    assert [len(row) for row in found] == [3, 2]
    score = {
        text: mj.score(model, params, tokenizer, text).logprob
        for text in ["import numpy as", "import numpy as jnp.array", "import os", "os import"]
    }
    whole = score["import numpy as jnp.array"] - score["import numpy as"]
    assert found[0][2] == pytest.approx(whole, abs=1e-3)
    assert found[1] == pytest.approx([score["import os"], score["os import"]], abs=1e-3)
    assert choices.accuracy(questions, found).acc == 1
