"""Functions that the task files name: examples, votes, and programs.

A filter of the harness gets the texts that answer each question, `responses`, and the questions,
`docs`. The harness gives what it returns for a question to the function of `process_results`.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from mistral_jax.evaluation import sandbox
from mistral_jax.evaluation.votes import majority

Doc = Mapping[str, Any]
Responses = Sequence[Sequence[str]]

_INVALID = "[invalid]"
_NUMBER = re.compile(r"The answer is \$?(-?[0-9.,]*[0-9])")


def gsm8k_examples() -> list[dict[str, str]]:
    """Returns the eight worked examples of the harness's task gsm8k_cot."""
    import lm_eval.tasks
    import yaml

    path = Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k-cot.yaml"
    with open(path, encoding="utf-8") as file:
        return yaml.safe_load(file)["fewshot_config"]["samples"]


def gsm8k_answer(text: str) -> str | None:
    """Returns the number that a solution arrives at, without separators; None = none."""
    found = _NUMBER.search(text)
    return found and found[1].replace(",", "")


def gsm8k_vote(responses: Responses, docs: Sequence[Doc]) -> Iterator[str]:
    """Yields the number that most solutions to a question arrive at."""
    for texts in responses:
        yield majority(map(gsm8k_answer, texts)) or _INVALID


def gsm8k_results(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Compares the number with that of the question's solution."""
    expected = doc["answer"].split("####")[-1].strip().replace(",", "").removeprefix("$")
    return {"exact_match": float(results[0] == expected)}


@functools.cache
def _minerva() -> ModuleType:
    """Imports the functions of the harness's task minerva_math."""
    try:
        from lm_eval.tasks.minerva_math import utils
    except (ImportError, AssertionError):
        raise ValueError(
            "paper_math needs sympy, math_verify and antlr4-python3-runtime 4.11: "
            "pip install 'mistral-jax-flax[harness]'"
        ) from None
    # The first use takes seconds on a busy machine, and the harness gives a comparison five.
    utils.sympy.simplify(utils.parse_latex("\\frac{3}{2}") - utils.parse_latex("1.5"))
    return utils


def math_problems(dataset: Any) -> Any:
    """Adds the answer to each problem; `dataset` is one of the library `datasets`."""
    return _minerva().process_docs(dataset)


def math_examples() -> list[dict[str, str]]:
    """Returns the four worked examples of the paper on Minerva."""
    return _minerva().list_fewshot_samples()


def math_vote(responses: Responses, docs: Sequence[Doc]) -> Iterator[str]:
    """Yields the answer that most solutions to a problem give, normalized as by the harness."""
    utils = _minerva()
    invalid = utils.get_unnormalized_answer("")

    def answer(text: str) -> str | None:
        found = utils.get_unnormalized_answer(text)
        return None if found == invalid else utils.normalize_final_answer(found)

    for texts in responses:
        yield majority(map(answer, texts)) or _INVALID


def math_results(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Compares an answer with the problem's, as the harness does."""
    return {"exact_match": float(_minerva().is_equiv(results[0], doc["answer"]))}


def confined(dataset: Any) -> Any:
    """Returns a data set as it is, if this machine can confine the programs that it asks for.

    Raises:
      ValueError: it cannot; so the harness learns it before a model writes programs.
    """
    sandbox.check()
    return dataset


def humaneval_program(doc: Doc, text: str) -> str:
    """Returns the program that tests a function whose beginning is the question."""
    return f"{doc['prompt']}{text}\n{doc['test']}\ncheck({doc['entry_point']})\n"


def mbpp_program(doc: Doc, text: str) -> str:
    """Returns the program that tests a solution: up to [DONE], or the first block of Markdown."""
    code = text.split("[DONE]")[0]
    if block := re.search(r"```[^\n]*\n(.*?)(?:```|\Z)", code, re.DOTALL):
        code = block[1]
    return "\n".join([code, *doc.get("test_imports", ()), *doc["test_list"], ""])


def run_humaneval(responses: Responses, docs: Sequence[Doc]) -> list[list[str]]:
    """Runs the tests of all answers; returns how each ended."""
    return _run(responses, docs, humaneval_program)


def run_mbpp(responses: Responses, docs: Sequence[Doc]) -> list[list[str]]:
    """Runs the tests of all answers; returns how each ended."""
    return _run(responses, docs, mbpp_program)


def pass_at_1(doc: Doc, results: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns the share of the answers to a question that passed."""
    return {"pass@1": sum(reason == "passed" for reason in results[0]) / len(results[0])}


def _run(responses, docs, program) -> list[list[str]]:
    from tqdm import tqdm

    programs = [
        program(doc, text) for texts, doc in zip(responses, docs, strict=True) for text in texts
    ]
    with tqdm(desc="running programs", total=len(programs), disable=None) as bar:
        outcomes = sandbox.run_all(programs, report=lambda done, total: bar.update(done - bar.n))
    reasons = iter(outcome.reason for outcome in outcomes)
    return [[next(reasons) for _ in texts] for texts in responses]
