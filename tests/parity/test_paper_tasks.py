"""The paper's tasks in lm-evaluation-harness, on questions and answers of our own."""

import collections
import json
import shutil
import types

import huggingface_hub.constants
import lm_eval.evaluator
import processes
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from mistral_jax.cli import evaluate as evaluate_command
from mistral_jax.evaluation import results, sandbox
from mistral_jax.evaluation.harness import MistralJax
from mistral_jax.evaluation.tasks.manager import task_manager

RECORDS = {
    "paper_nq": [{"question": f"what is {n}", "answer": [f"the {n}", str(n)]} for n in "abcdefg"],
    "paper_triviaqa": [
        {"question": f"What is {n}?", "answer": {"aliases": [f"The {n}", n.upper()]}}
        for n in "abcdefg"
    ],
    "paper_gsm8k": [
        {"question": f"What is {n} and {n}?", "answer": f"It is.\n#### {2 * n}"} for n in (1, 500)
    ],
    "paper_math_algebra": [
        {"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$."},
        {"problem": "What is half of $3$?", "solution": "It is $\\boxed{\\frac{3}{2}}$."},
    ],
    "paper_humaneval": [
        {
            "task_id": f"x/{n}",
            "prompt": f"def add_{n}(x):\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n",
            "entry_point": f"add_{n}",
        }
        for n in (1, 2)
    ],
    "paper_mbpp": [
        {
            "prompt": f"Write a function that adds {n}.",
            "code": f"def add(x):\n    return x + {n}",
            "test_imports": ["import math"],
            "test_list": [f"assert add(1) == {n + 1}", "assert math.pi > 3"],
        }
        for n in (1, 2, 3, 4, 5)
    ],
}


class Scripted(LM):
    """A model that gives each context the answers of a script, one after another."""

    def __init__(self, script):
        super().__init__()
        self.script, self.asked = script, collections.defaultdict(list)

    def generate_until(self, requests, disable_tqdm=False):
        answers = []
        for request in requests:
            context, options = request.args
            made = self.asked[context]
            made.append(options)
            answers.append(self.script(context, len(made) - 1))
        return answers

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    # It lists all installed packages, which takes seconds.
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, records in RECORDS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


def evaluate(task, data, script, **options):
    model = Scripted(script)
    manager = task_manager([task], data=data)
    results = lm_eval.simple_evaluate(
        model, tasks=[task], task_manager=manager, bootstrap_iters=0, **options
    )
    return results["results"][task], model.asked, results["samples"]


def last(context, mark):
    """Returns what follows the last `mark` of a context."""
    return context.rpartition(mark)[2]


@pytest.mark.parametrize(
    ("task", "mark", "wrong"), [("paper_nq", "what is ", "b"), ("paper_triviaqa", "What is ", "b")]
)
def test_facts_are_asked_after_five_examples(data, task, mark, wrong):
    def script(context, _):
        asked = last(context, mark)[0]
        return " X" if asked == wrong else f" {asked}" if task == "paper_nq" else f" {asked}!"

    found, asked, _ = evaluate(task, data, script)
    assert found["exact_match,remove_whitespace"] == pytest.approx(6 / 7)
    assert len(asked) == 7
    for context, options in asked.items():
        assert context.startswith("Answer these questions:\n\nQ: ")
        assert context.count("Q:") == context.count("?\nA:") == 6
        assert "??" not in context
        assert options[0]["until"] == ["\n", ".", ","]


def test_sums_are_voted_on(data):
    def script(context, draw):
        right = "2" if last(context, "What is ").startswith("1 ") else "1,000"
        return f" The answer is {right if draw in (1, 4, 7) else draw}." if draw else " None."

    found, asked, _ = evaluate("paper_gsm8k", data, script)
    assert found["exact_match,maj@8"] == 1
    for context, options in asked.items():
        assert context.count("The answer is") == 8
        assert context.startswith("Q: There are 15 trees")
        assert context.endswith("?\nA:")
        assert len(options) == 8
        assert {**options[0], "until": None} == {
            **{"do_sample": True, "temperature": 0.6, "top_p": 0.95, "max_gen_toks": 256},
            "until": None,
        }


def test_problems_are_voted_on(data, tmp_path):
    """The group has seven tasks, which get the same two problems here."""
    shutil.copy(data / "paper_math_algebra.jsonl", tmp_path / "paper_math.jsonl")

    def script(context, draw):
        right = "2" if "1+1" in last(context, "Problem:") else "1.5"
        answer = right if draw % 4 in (1, 3) else f"{draw % 4}"
        return f" So.\nFinal Answer: The final answer is ${answer}$. I hope it is correct."

    found, asked, samples = evaluate("paper_math", tmp_path, script)
    assert found["exact_match,maj@4"] == 1
    assert len(samples) == 7
    for context, options in asked.items():
        assert context.count("Problem:") == 5
        assert "boxed{[2,5)}" in context
        assert len(options) == 7 * 4


@pytest.mark.skipif(not processes.has_landlock(), reason="the kernel has no Landlock")
def test_programs_run_in_the_sandbox(data, monkeypatch):
    def script(context, _):
        return "    return x + 1" if "add_1" in context else "    import os\n    os._exit(0)"

    with pytest.raises(ValueError, match="unsafe"):
        evaluate("paper_humaneval", data, script)
    with monkeypatch.context() as changed:
        changed.setattr(sandbox, "sys", types.SimpleNamespace(platform="darwin"))
        with pytest.raises(ValueError, match="this machine cannot confine a program"):
            evaluate("paper_humaneval", data, script, confirm_run_unsafe_code=True)
    found, asked, samples = evaluate("paper_humaneval", data, script, confirm_run_unsafe_code=True)
    assert found["pass@1,create_test"] == 0.5
    assert set(asked) == {f"def add_{n}(x):\n" for n in (1, 2)}
    reasons = [sample["filtered_resps"] for sample in samples["paper_humaneval"]]
    assert reasons[0] == [["passed"]]
    assert "exits with code 0 before its tests" in reasons[1][0][0]

    def write(context, _):
        n = last(context, "adds ")[0]
        return f"def add(x):\n    return x + {n if n != '3' else 9}\n"

    found, asked, _ = evaluate("paper_mbpp", data, write, confirm_run_unsafe_code=True)
    assert found["pass@1,extract_code"] == 0.8
    for context in asked:
        assert context.count("[BEGIN]") == 4
        assert context.count("[DONE]") == 3
        assert context.endswith("math.pi > 3\n[BEGIN]\n")


def test_examples_may_have_a_file_of_their_own(tmp_path):
    (tmp_path / "paper_nq.jsonl").write_text(json.dumps(RECORDS["paper_nq"][0]) + "\n")
    others = [{"question": f"which {n}", "answer": ["x"]} for n in "stuvwxyz"]
    lines = "".join(json.dumps(one) + "\n" for one in others)
    (tmp_path / "paper_nq.examples.jsonl").write_text(lines)
    found, asked, _ = evaluate("paper_nq", tmp_path, lambda *_: " a")
    (context,) = asked
    assert context.count("which ") == 5
    assert context.endswith("Q: what is a?\nA:")
    assert found["exact_match,remove_whitespace"] == 1


def test_files_of_no_task_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*absent; expected one with files"):
        task_manager(["paper_nq"], data=tmp_path / "absent")
    with pytest.raises(ValueError, match=r"there is no folder .*absent; expected one with task"):
        task_manager(["paper_nq"], tmp_path / "absent")


def test_a_group_has_one_file_for_its_tasks(tmp_path):
    """A task's own file replaces that of its group; a user's task replaces ours."""
    (tmp_path / "mine.yaml").write_text("group: mine\ntask: [paper_nq, paper_triviaqa]\n")
    (tmp_path / "mine.jsonl").write_text("{}\n")
    (tmp_path / "paper_nq.jsonl").write_text("{}\n")
    manager = task_manager(["mine"], tmp_path, tmp_path)
    files = {
        name: json.loads(manager.task_index[name].yaml_path.read_text())["dataset_kwargs"]
        for name in ("paper_nq", "paper_triviaqa")
    }
    expected = {
        name: {split: str(tmp_path / f"{file}.jsonl") for split in ("train", "validation")}
        for name, file in (("paper_nq", "paper_nq"), ("paper_triviaqa", "mine"))
    }
    assert {name: own["data_files"] for name, own in files.items()} == expected


def test_drawn_answers_differ_and_are_the_same_again():
    """A vote needs answers of different draws, and a run that goes on needs the same ones."""
    model = MistralJax.create_from_arg_string("dtype=float32,max_length=200")
    options = {"do_sample": True, "temperature": 1.0, "until": ["\n\n"], "max_gen_toks": 12}

    def ask():
        contexts = ["import "] * 3 + ["def f("] * 3
        asked = [Instance("generate_until", {}, (own, dict(options)), 0) for own in contexts]
        return model.generate_until(asked, disable_tqdm=True)

    found = ask()
    assert len(set(found[:3])) == len(set(found[3:])) == 3
    assert ask() == found


def test_the_command_reads_local_data(data, tmp_path, capsys):
    flags = "--no-compilation-cache", "--json", "--dtype", "float32", "--limit", "2"
    flags += "--tasks", "paper_nq", "--data"
    assert evaluate_command.main([*flags, str(data)]) == 0
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (line["task"], line["metric"]) == ("paper_nq", "exact_match, remove_whitespace")
    assert evaluate_command.main([*flags, str(tmp_path / "absent")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_the_suite_runs_them_on_local_data(data, tmp_path, capsys):
    names = ["nq", "gsm8k", "humaneval"]
    flags = "--suite", "paper", "--data", str(data), "--results", str(tmp_path), "--limit", "1"
    flags += "--no-compilation-cache", "--dtype", "float32", "--batch", "16"
    flags += "--allow-code-execution", "--tasks", *names
    assert evaluate_command.main(list(flags)) == 0, capsys.readouterr().err
    found = results.read(tmp_path / "nano.paper.json")
    assert {column.task for column in found.columns.values()} == {f"paper_{own}" for own in names}
    assert found.not_run == {}
    assert {column.questions for column in found.columns.values()} == {1}
