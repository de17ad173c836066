"""Votes among answers, and what the paper's tasks make of the texts of a model."""

import re
import sys
import tomllib
from pathlib import Path

import processes
import pytest

from mistral_jax.evaluation import sandbox
from mistral_jax.evaluation.tasks import functions
from mistral_jax.evaluation.votes import majority

HUMANEVAL = {
    "prompt": 'def add(a, b):\n    """Adds."""\n',
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    "entry_point": "add",
}
MBPP = {"test_list": ["assert f(4) == 2"], "test_imports": ["import math"]}


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([], None),
        ([None, None], None),
        (["a"], "a"),
        (["a", "b", "b"], "b"),
        (["a", "b", "b", "a"], "a"),  # the earliest of the most frequent
        (["c", "b", "a", "a", "b"], "b"),
        ([None, None, None, "a", "b", "b"], "b"),  # a text without an answer does not vote
        (["", None, ""], ""),
        (("1" for _ in range(3)), "1"),
    ],
)
def test_the_most_frequent_answer_wins(answers, expected):
    assert majority(answers) == expected


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 5 + 4 = 9. The answer is 9.", "9"),
        ("The answer is $1,234.", "1234"),
        ("The answer is -3.50", "-3.50"),
        ("The answer is 7. The answer is 8.", "7"),
        ("The answer is nine.", None),
        ("9", None),
        ("", None),
    ],
)
def test_the_number_of_a_solution_is_found(text, answer):
    assert functions.gsm8k_answer(text) == answer


def test_solutions_of_sums_vote():
    said = "So it is {}. The answer is {}."
    texts = [
        [said.format(n, n) for n in ("1,000", "2", "1000", "2", "$1000")],
        ["I do not know."] * 5,
        ["I do not know."] * 4 + [said.format(3, 3)],
    ]
    docs = [{"answer": "x #### 1,000"}, {"answer": "x\n#### 4"}, {"answer": "#### 3"}]
    found = list(functions.gsm8k_vote(texts, docs))
    assert found == ["1000", "[invalid]", "3"]
    scores = [functions.gsm8k_results(doc, [one]) for doc, one in zip(docs, found, strict=True)]
    assert [score["exact_match"] for score in scores] == [1, 0, 1]


def test_programs_are_made_of_answers_and_tests():
    assert functions.humaneval_program(HUMANEVAL, "    return a + b") == (
        'def add(a, b):\n    """Adds."""\n    return a + b\n'
        "def check(candidate):\n    assert candidate(1, 2) == 3\n\ncheck(add)\n"
    )
    expected = "def f(x):\n    return math.isqrt(x)\n"
    for text in (
        expected,
        f"{expected}[DONE]\nfor f(",
        f"Here it is:\n```python\n{expected}```\nIt takes a root.",
        f"```\n{expected}",
    ):
        program = functions.mbpp_program(MBPP, text)
        assert program.replace("\n\n", "\n") == f"{expected}import math\nassert f(4) == 2\n"
    assert functions.mbpp_program({"test_list": ["assert x"]}, "x = 1") == "x = 1\nassert x\n"


def test_programs_are_refused_where_they_cannot_be_confined():
    if processes.has_landlock():
        sandbox.check()
    else:
        with pytest.raises(ValueError, match="this machine cannot confine a program"):
            sandbox.check()


@pytest.mark.skipif(not processes.has_landlock(), reason="the kernel has no Landlock")
def test_the_share_of_programs_that_pass_is_counted(capfd):
    texts = [
        ["    return a + b", "    return a - b"],
        ["    import os; os._exit(0)", "    return 3"],
    ]
    reasons = functions.run_humaneval(texts, [HUMANEVAL, HUMANEVAL])
    assert [[reason == "passed" for reason in row] for row in reasons] == [
        [True, False],
        [False, True],
    ]
    assert [functions.pass_at_1(HUMANEVAL, [row]) for row in reasons] == [{"pass@1": 0.5}] * 2
    assert functions.run_mbpp([["def f(x): return 2"]], [MBPP]) == [["passed"]]


def test_missing_libraries_of_math_are_named(monkeypatch):
    functions._minerva.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.minerva_math", None)
    with pytest.raises(ValueError, match="paper_math needs sympy, math_verify and antlr4") as error:
        functions.math_examples()
    assert str(error.value).endswith("pip install 'mistral-jax-flax[harness]'")


def test_task_files_name_functions_that_exist_and_say_how_they_differ():
    folder = Path(functions.__file__).parent
    files = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.yaml")}
    tasks = {name for name in files if not name.startswith("paper_math_")}
    assert tasks == {
        f"paper_{name}" for name in ("gsm8k", "humaneval", "math", "mbpp", "nq", "triviaqa")
    }
    for name, text in files.items():
        assert f"task: {name}\n" in text or f"group: {name}\n" in text
        for function in re.findall(r"!function (\S+)", text):
            module, _, attribute = function.rpartition(".")
            assert module == functions.__name__
            assert callable(getattr(functions, attribute))
        if "include:" not in text and "group:" not in text:
            assert "\n  differs: >-\n" in text
        # The harness runs such a task only if the user permits it.
        assert ("unsafe_code: true" in text) == (name in ("paper_humaneval", "paper_mbpp"))


def test_a_wheel_holds_the_task_files():
    """Hatch packs every file of a folder that git does not ignore."""
    root = Path(__file__).parents[2]
    built = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert "mistral_jax" in built["targets"]["wheel"]["only-include"]
    assert set(built["targets"]["wheel"]) == {"only-include", "dev-mode-dirs", "sources"}
