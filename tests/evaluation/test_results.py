"""Files of results, and the suites that they belong to."""

import json
import os

import pytest

from mistral_jax.config import CHECKOUT, CONFIG_DIR
from mistral_jax.evaluation import results, suite
from mistral_jax.evaluation.results import Column, Results

COLUMN = Column(60.1, 0.4, 14042, "mmlu", "acc", 5, None, 12.3)
RESULTS = Results(
    *("paper", "mine", "models/mine", 7_241_732_096),
    {"MMLU": COLUMN, "PIQA": Column(80, None, 1, "piqa", "acc_norm", 0, 1, 0.0)},
    {"MBPP": "needs --allow-code-execution"},
)


def test_results_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "new" / "mine.json"
    results.write(path, RESULTS)
    assert results.read(path) == RESULTS
    stored = json.loads(path.read_text())
    assert stored["format"] == 1
    assert stored["columns"]["MMLU"] == {
        **{"value": 60.1, "stderr": 0.4, "questions": 14042, "task": "mmlu", "metric": "acc"},
        **{"shots": 5, "limit": None, "seconds": 12.3},
    }
    assert os.listdir(path.parent) == ["mine.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "mine.json"
    results.write(path, RESULTS)

    def fail(*_):
        raise OSError("full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="full"):
        results.write(path, Results("paper", "other", "x", 1, {}))
    assert results.read(path) == RESULTS
    assert os.listdir(tmp_path) == ["mine.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": None}, "has no format; expected the results of a suite"),
        ({"format": 2}, "has format 2; expected 1"),
        ({"format": True}, "has format True; expected 1"),
        ({"suite": 3}, "has suite 3; expected a string"),
        ({"parameters": 0}, "has parameters 0; expected an integer of at least 1"),
        ({"columns": []}, r"has columns \[\]; expected an object"),
        ({"columns": {"MMLU": 60}}, "expected an object, each value an object"),
        ({"columns": {"MMLU": {"value": 1}}}, "missing columns.MMLU.stderr"),
        ({"models": "x"}, "unknown key 'models'; the nearest known one is 'model'"),
        ({"not_run": {"MMLU": "x"}}, "'MMLU' is in columns and in not_run"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, change, message):
    path = tmp_path / "bad.json"
    whole = results.as_json(RESULTS) | change
    path.write_text(json.dumps({k: v for k, v in whole.items() if v is not None}))
    with pytest.raises(ValueError, match=message) as caught:
        results.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("value", None),
        ("value", 100.5),
        ("value", float("nan")),
        ("value", "60"),
        ("stderr", -1),
        ("questions", 0),
        ("questions", 1.5),
        ("task", None),
        ("shots", -1),
        ("limit", 0),
        ("seconds", -1),
        ("seconds", float("inf")),
    ],
)
def test_a_value_out_of_range_is_refused(tmp_path, field, value):
    path = tmp_path / "bad.json"
    whole = results.as_json(RESULTS)
    whole["columns"]["MMLU"][field] = value
    path.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=rf"bad.json: {field} is .*; expected"):
        results.read(path)


def test_a_suite_names_its_columns_by_name_and_by_task():
    paper = suite.read("paper")
    assert (paper.name, len(paper.choose([]))) == ("paper", 12)
    assert paper.choose(["gsm8k", "MMLU", "arc_easy", "mmlu"]) == ["MMLU", "ARC-e", "GSM8K"]
    assert paper.choose(["boolq"]) == ["BoolQ"]
    with pytest.raises(ValueError, match="'paper' has no column 'mmmu'; it has MMLU, HellaSwag"):
        paper.choose(["mmmu"])


def test_the_published_table_is_complete():
    paper = suite.read("paper")
    table = set(paper.choose([]))
    whole = [own.model for own in paper.published if set(own.scores) == table]
    assert "Mistral 7B" in whole
    assert {"Llama 2 7B", "Llama 2 13B", "CodeLlama 7B"} < set(whole)
    assert all(own.source for own in paper.published)
    assert {name for name, own in paper.columns.items() if own.executes} == {"HumanEval", "MBPP"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("shots = 5", "shots = -5", "shots is -5; expected an integer of at least 0"),
        ("MMLU = 60.1", "MMMU = 60.1", "the scores of Mistral 7B names 'MMMU'"),
        ("MMLU = 60.1", "MMLU = 601", "expected an object, each value a finite number"),
        ('columns = ["BoolQ"]', 'columns = ["Bool"]', "categories.comprehension names 'Bool'"),
        ('reference = "Mistral 7B"', 'reference = "Mistral"', "expected a published model"),
        ("[columns.MMLU]\n", "[columns.MMLU]\ntasks = 3\n", "the nearest known one is"),
    ],
)
def test_a_suite_that_is_wrong_is_refused(tmp_path, old, new, message):
    text = (CONFIG_DIR / "suites" / "paper.toml").read_text()
    assert old in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        suite.read(path)


def test_the_documents_table_has_the_published_figures():
    """And names the tasks and numbers of examples of the suite."""
    paper = suite.read("paper")
    again = paper.model("Mistral 7B, second measurement")
    text = (CHECKOUT / "docs" / "evaluation.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    found = {row[0]: row[1:] for row in rows if len(row) == 7 and row[0] in paper.columns}
    assert list(found) == paper.choose([])
    for name, (shots, task, _, figure, _, other) in found.items():
        assert int(shots) == paper.columns[name].shots
        assert task.startswith(f"`{paper.columns[name].task}`")
        assert float(figure) == paper.model("Mistral 7B").scores[name]
        assert float(other) == again.scores[name]
