"""The suite of the paper's table, on the bundled model and stand-ins for the tasks' data."""

import json
import os
import signal
import subprocess
import sys

import huggingface_hub.constants
import pytest

from mistral_jax.cli import evaluate
from mistral_jax.config import CHECKOUT
from mistral_jax.evaluation import harness, results
from mistral_jax.evaluation.journal import Journal

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
fewshot_split: test
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
DRAW = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], do_sample: true, temperature: 0.8, max_gen_toks: 6}
repeats: 8
filter_list: [{name: "maj@8", filter: [{function: majority_vote}, {function: take_first}]}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
GROUP = "group: mmlu\ntask: [mmlu_a, mmlu_b]\naggregate_metric_list: [{metric: acc}]\n"
QUESTIONS = [
    ("def add(a, b):\n    return a", ["+ b", "- b", "* c"], 0),
    ("import numpy as", ["os", "np", "jnp"], 1),
    ("for i in", ["range(10):", "while True:", "None"], 0),
    ("if __name__ ==", ['"__main__":', "None:", "x + 1"], 0),
    ("class Stack(object):\n    def", ["import os", "return", "__init__(self):"], 2),
    ("try:\n    x = 1\nexcept", ["ValueError:", "pass", "finally:"], 0),
]
# More than the examples before a question of GSM8K.
QUESTIONS += [(f"# {n}\n{question}", *rest) for n in (1, 2) for question, *rest in QUESTIONS]
KILLED = """
import os, signal
from mistral_jax.cli import evaluate
from mistral_jax.evaluation.journal import Journal
add = Journal.add
def add_and_die(journal, *pair):
    add(journal, *pair)
    if len(journal) == {done}:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.add = add_and_die
evaluate.main({flags})
"""
COLUMNS = ["mmlu", "hellaswag", "gsm8k"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Asks the Hub nothing."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks with the names of the suite's columns; the data of one are absent."""
    home = tmp_path_factory.mktemp("tasks")
    forms = {"mmlu_a": CHOICE, "mmlu_b": CHOICE, "hellaswag": CHOICE, "paper_gsm8k": DRAW}
    for name, form in (forms | {"piqa": CHOICE, "paper_mbpp": DRAW}).items():
        (home / f"{name}.yaml").write_text(TASK.format(name=name, folder=home) + form)
        records = [dict(zip(("question", "choices", "answer"), q, strict=True)) for q in QUESTIONS]
        if name != "piqa":
            (home / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (home / "mmlu.yaml").write_text(GROUP)
    return home


@pytest.fixture
def command(tasks, tmp_path, capsys):
    """Runs the suite with its results in a temporary folder."""

    def run(*words, report=False):
        flags = ["--results", tmp_path] if "--results" not in words else []
        if not report:
            flags += ["--suite", "paper", "--include-path", tasks, "--no-compilation-cache"]
        code = evaluate.main([*map(str, (*flags, *words))])
        return code, *capsys.readouterr()

    return run


def scores(path):
    return {name: (own.value, own.stderr) for name, own in results.read(path).columns.items()}


def test_columns_become_results_and_a_table(command, tmp_path):
    page = tmp_path / "table.html"
    asked = [*COLUMNS, "piqa", "mbpp"]
    code, out, err = command("--tasks", *asked, "--limit", 4, "--table", page)
    assert code == 0, err
    found = results.read(tmp_path / "nano.paper.json")
    assert (found.suite, found.model, found.checkpoint) == ("paper", "nano", "nano")
    assert found.parameters > 1e6
    assert set(found.columns) == {"MMLU", "HellaSwag", "GSM8K"}
    assert found.not_run["MBPP"] == "needs --allow-code-execution"
    assert "the data of piqa cannot be read" in found.not_run["PIQA"]
    column = found.columns["MMLU"]
    assert (column.questions, column.shots, column.limit) == (8, 5, 4)
    assert (column.task, column.metric) == ("mmlu", "acc")
    assert column.value in {100 * n / 8 for n in range(9)}
    for line in ("nano, MMLU: ", "nano, GSM8K: ", "MBPP: not run: needs --allow-code-execution"):
        assert any(own.startswith(line) for own in err.splitlines()), err
    said = [line for line in err.splitlines() if "/s]" not in line and "s/it]" not in line]
    assert len(said) < 20, err
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert f"{column.value:.1f} ±" in rows["MMLU"]
    assert "60.1" in rows["MMLU"]
    assert f"{column.value - 60.1:+.1f}" in rows["MMLU"]
    assert "not run" in rows["PIQA"]
    assert "<table>" in page.read_text()
    # Another run adds its columns to those that are there.
    code, out, err = command("--tasks", "gsm8k,mmlu", "--limit", 3, "--json")
    assert code == 0
    record = json.loads(out)
    assert record["columns"]["GSM8K"]["limit"] == 3
    assert record["columns"]["HellaSwag"]["limit"] == 4
    code, out, err = command("--report", "table", "--table", tmp_path / "t.md", report=True)
    assert (code, err) == (0, "")
    assert "| MMLU \\[1\\] |" in (tmp_path / "t.md").read_text()


def test_a_run_in_which_nothing_can_be_run_fails(command, tmp_path):
    code, out, _ = command("--tasks", "piqa", "mbpp")
    assert code == 1
    assert out.count("not run") == 12
    assert not (tmp_path / "nano.paper.json").exists()


def test_a_column_that_fails_fails_the_run_and_not_the_rest(command, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no such device")

    monkeypatch.setattr(harness, "draws_of", fail)
    code, _, err = command("--tasks", "gsm8k", "mmlu", "--limit", 1)
    assert code == 1
    assert "GSM8K: failed: RuntimeError: no such device" in err
    assert set(scores(tmp_path / "nano.paper.json")) == {"MMLU"}


def test_a_killed_run_goes_on_where_it_was(command, tasks, tmp_path, monkeypatch):
    """By SIGKILL in the middle; the end of the journal is damaged, too."""
    places = [tmp_path / name for name in ("whole", "killed")]
    for place in places:
        place.mkdir()
    words = "--tasks", *COLUMNS
    assert command(*words, "--results", places[0])[0] == 0
    total = len((places[0] / "nano.paper.journal").read_text().splitlines())
    flags = ["--suite", "paper", "--include-path", tasks, "--no-compilation-cache", *words]
    done = total * 2 // 3
    program = KILLED.format(done=done, flags=[*map(str, flags), "--results", str(places[1])])
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    journal = places[1] / "nano.paper.journal"
    assert len(journal.read_bytes().splitlines()) == done
    with open(journal, "ab") as file:
        file.write(b'{"key": "1234')
    computed, add = [], Journal.add
    monkeypatch.setattr(Journal, "add", lambda own, *pair: (computed.append(pair), add(own, *pair)))
    assert command(*words, "--results", places[1])[0] == 0
    assert len(computed) == total - done
    whole, killed = (scores(place / "nano.paper.json") for place in places)
    assert whole == killed


def test_what_is_wrong_is_said_in_one_line(command, tmp_path):
    for words, message in (
        (["--tasks", "mmmlu"], "the suite 'paper' has no column 'mmmlu'"),
        (["--table", "x.txt"], "expected a file that ends with .md or .html"),
        (["--checkpoint", "absent"], "absent"),
        (["--results", tmp_path / "x.json", "--checkpoint", "nano", "nano"], "name a folder"),
        (["--results", "a", "b"], "give one path to --results"),
        (["x.txt"], "--suite paper does not take the file x.txt"),
        (["--report", "table"], "are two commands; give one of them"),
    ):
        code, out, err = command(*words)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert message in err
