"""The report of equivalent sizes: which files are the family, what is printed, what is refused."""

import json

import pytest

from mistral_jax.cli import evaluate
from mistral_jax.cli.sizes import split
from mistral_jax.evaluation import results
from mistral_jax.evaluation.results import Column, Results

FAMILY = {"llama-2-7b": 6.738, "llama-2-13b": 13.016, "llama-2-70b": 68.977}


def made(name, billions, **values):
    columns = {
        column: Column(value, 0.5, 100, "task", "acc", 0, None, 1.0)
        for column, value in values.items()
    }
    return Results("paper", name, f"/models/{name}", round(billions * 1e9), columns)


@pytest.fixture
def write(tmp_path):
    """Writes results; returns the path."""

    def write(name, billions, **values):
        path = tmp_path / f"{name}.json"
        results.write(path, made(name, billions, **values))
        return path

    return write


@pytest.fixture
def report(capsys):
    """Runs the report; returns its exit code, standard output and standard error."""

    def run(*arguments):
        try:
            code = evaluate.main(["--report", "equivalent-sizes", *map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def records(out):
    return {each["category"]: each for each in map(json.loads, out.splitlines())}


@pytest.fixture
def family(write):
    """The files of a family, whose scores are those of table 2 for 7B and 13B."""
    scores = [(44.4, 24.7, 63.8), (55.6, 29.0, 69.6), (69.9, 40.0, 80.0)]
    return [
        write(name, size, MMLU=a, NQ=b, TriviaQA=c)
        for (name, size), (a, b, c) in zip(FAMILY.items(), scores, strict=True)
    ]


def test_published_scores_need_no_files(report):
    code, out, err = report("--json")
    assert (code, err) == (0, "")
    found = records(out)
    assert {name: each["paper"] for name, each in found.items()} == {
        "MMLU": 23,
        "reasoning": 38,
        "knowledge": 13,
        "comprehension": 21,
    }
    assert found["MMLU"]["equivalent"] == pytest.approx(22.08, abs=0.01)
    assert found["reasoning"]["times"] == pytest.approx(5.39, abs=0.01)
    assert found["comprehension"]["difference"] == pytest.approx(0.567, abs=0.001)
    assert found["comprehension"]["at_paper"] == pytest.approx(82.6, abs=0.05)
    assert report("--published", "--json")[1] == out
    table = report()[1]
    assert "37.7B" in table
    assert "without SIQA, OBQA, CSQA" in table
    assert "no figure of Mistral 7B for QuAC is published" in table


def test_a_family_is_told_by_its_names_in_any_order(report, write, family):
    model = write("mistral-7b-v0.1", 7.242, MMLU=60.1, NQ=28.8, TriviaQA=69.9)
    code, out, err = report(family[0], model, *family[:0:-1], "--json")
    assert (code, err) == (0, "")
    found = records(out)
    names = {"MMLU", "reasoning", "knowledge", "comprehension"}
    assert set(found) == {*names, "aggregated"}  # MMLU is part of that.
    assert found["MMLU"]["model"] == "mistral-7b-v0.1"
    assert found["MMLU"]["equivalent"] == pytest.approx(22.0, abs=0.1)
    assert found["MMLU"]["times"] == pytest.approx(22.0 / 7.242, abs=0.02)
    assert found["MMLU"]["low"] < found["MMLU"]["equivalent"] < found["MMLU"]["high"]
    assert found["knowledge"]["columns"] == "NQ, TriviaQA"
    assert found["reasoning"]["equivalent"] is None
    assert found["reasoning"]["missing"].startswith("HellaSwag, WinoGrande")
    assert records(report(model.parent, "--json")[1]) == found
    assert records(report("--results", model.parent, "--json")[1]) == found
    table = report(*family, model)[1]
    assert "reasoning: not compared, without HellaSwag" in table


def test_names_tell_a_family():
    sizes = [made(name, size) for name, size in FAMILY.items()]
    for name in ("mistral-7b-v0.1", "checkpoints/mistral", "Mixtral 8x7B", "7b"):
        model = made(name, 7)
        assert split([model, *sizes]) == (sizes, [model])
    two = [made("mistral-7b-v0.1", 7), made("mistral-7b-v0.3", 7.2)]
    assert split([*sizes, *two]) == (sizes, two)
    others = [made("a", 1), made("b", 2), made("c", 3)]
    assert split(others) == (others[:2], others[2:])
    both = [*sizes, made("m-1b", 1), made("m-2b", 2)]
    assert split(both) == (both[:-1], both[-1:])
    assert split(sizes) == (sizes[:2], sizes[2:])


def test_one_model_is_compared_with_the_published_family(report, write):
    model = write("mine", 7.242, MMLU=60.1, BoolQ=90.0)
    code, out, err = report(model, "--published", "--json")
    assert (code, err) == (0, "")
    found = records(out)
    assert found["MMLU"]["equivalent"] == pytest.approx(22.08, abs=0.01)
    assert found["comprehension"]["equivalent_text"] == "above 70B"
    assert found["comprehension"]["equivalent"] is None
    assert found["comprehension"]["times"] is None
    assert found["knowledge"]["missing"] == "NQ, TriviaQA"
    table = report(model, "--published")[1]
    assert "above 70B" in table


def test_scores_that_fall_with_the_size_are_told(report, write):
    paths = [
        write(name, size, MMLU=score)
        for (name, size), score in zip(FAMILY.items(), (40.0, 60.0, 50.0), strict=True)
    ]
    code, out, _ = report(*paths, write("m", 7, MMLU=55.0))
    assert code == 0
    assert "MMLU: the family's scores do not rise with the size" in out


def test_a_plot_is_drawn(report, write, family, tmp_path):
    pytest.importorskip("matplotlib")
    model = write("mistral", 7.242, MMLU=60.1, NQ=28.8, TriviaQA=69.9)
    for arguments in ([], [*family, model]):
        target = tmp_path / "plot.svg"
        assert report(*arguments, "--plot", target)[0] == 0
        assert "<svg" in target.read_text()
        target.unlink()


def test_mistakes_end_in_one_line(report, write, family, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    other = write("other", 3, GSM8K=10.0)
    for arguments, message in (
        ([family[0]], "there are results of 1 models; expected at least two of a family and one"),
        (family[:2], "there are results of 2 models"),
        ([empty], "has no .json file; expected the results of a suite"),
        ([tmp_path / "none.json"], "there is no file"),
        ([*family, other], "the results have no column in common"),
        ([family[0], family[0], other], "both have 6.738 billion parameters"),
        (["--table", "x.md"], "--report equivalent-sizes does not take --table; leave it out"),
        (["--choices", "x"], "--report equivalent-sizes does not take --choices"),
        (["--plot", tmp_path / "x.unknown"], "unknown"),
    ):
        code, _, err = report(*arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err


def test_published_is_for_the_report_only(capsys):
    assert evaluate.main(["--published", "x.txt"]) == 2
    assert "--published is for --suite and --report" in capsys.readouterr().err
