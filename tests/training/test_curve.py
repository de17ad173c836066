"""The curve: what a line tells, what its rate counts, what a resumed run keeps, and its plot."""

import json
import math
import time

import jax.numpy as jnp
import numpy as np
import pytest

from mistral_jax.base import memory
from mistral_jax.training import curve
from mistral_jax.training.curve import Curve


class Clock:
    """Stands for `time`, and stands still."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(curve, "time", clock)
    return clock


@pytest.fixture
def path(tmp_path):
    return tmp_path / "curve.jsonl"


def metrics(loss=1.0, skipped=0.0, **more):
    names = {"grad_norm": 2.0, "loss": loss, "skipped": skipped, "targets": 7.0, **more}
    return {name: jnp.float32(value) for name, value in names.items()}


def train(found, clock, steps, seconds=2.0):
    for step in steps:
        clock.now += seconds
        found.add(step, metrics(loss=step), 100, 1e-3)


def test_a_line_tells_what_a_step_was_like(path, clock):
    reported = []
    found = Curve(path, 0, reported.append, steps=20)
    clock.now += 1.0
    found.add(1, metrics(5.5, 1.0, accuracy=0.75, margin=-2.0), 100, 1e-3)
    (entry,) = curve.read(path)
    assert reported == [entry]
    entry.pop("memory")
    assert entry == {
        "step": 1, "steps": 20, "loss": 5.5, "grad_norm": 2.0, "skipped": 1, "accuracy": 0.75,
        "margin": -2.0, "learning_rate": 1e-3, "tokens": 100, "seconds": 1.0}  # fmt: skip
    assert list(entry)[:3] == ["step", "steps", "loss"]  # what people look at first


def test_lines_are_json_whatever_the_loss(path):
    found = Curve(path, 0, lambda entry: None)
    for step, loss in enumerate((3.0, math.nan, -math.inf), 1):
        found.add(step, metrics(loss, grad_norm=math.inf), 1, 0.1)
    found.write({"step": 20, "validation_loss": math.nan})

    def refuse(constant):
        raise AssertionError(constant)

    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert [line["loss"] for line in lines[:3]] == [3.0, None, None]
    assert lines[0]["grad_norm"] is None
    assert lines[3] == {"step": 20, "validation_loss": None}
    assert curve.points(curve.read(path), "loss") == [(1, 3.0)]


def test_the_rate_is_of_the_last_steps_without_the_first_and_pauses(path, clock):
    found = Curve(path, 0, lambda entry: None, flops_per_token=6.0, peak_flops=1200.0)
    with found.pause():  # validates before the first step
        clock.now += 500.0
    train(found, clock, [1], seconds=60.0)  # compiles
    train(found, clock, range(2, 8))
    with found.pause():
        clock.now += 500.0
    train(found, clock, [8])
    clock.now += 5.0  # waits for data
    train(found, clock, range(9, 30))
    entries = curve.read(path)
    assert "tokens_per_second" not in entries[0]
    assert (entries[7]["tokens_per_second"], entries[7]["mfu"]) == (50.0, 0.25)
    assert entries[8]["tokens_per_second"] == round(800 / 21, 2)
    assert entries[-1]["tokens_per_second"] == 50.0
    assert entries[-1]["seconds"] == 500 + 60 + 12 + 500 + 2 + 5 + 42


def test_what_reports_take_is_not_counted(path, clock):
    def report(entry):
        clock.now += 100.0

    train(Curve(path, 0, report), clock, range(1, 31))
    assert {entry["tokens_per_second"] for entry in curve.read(path)[1:]} == {50.0}


def test_nothing_is_told_that_is_not_known(path, clock, monkeypatch):
    monkeypatch.setattr(memory, "peak", lambda: None)
    train(Curve(path, 0, lambda entry: None, flops_per_token=6.0), clock, range(1, 11))
    last = curve.read(path)[-1]
    assert last["tokens_per_second"] == 50.0
    assert not {"mfu", "memory"} & last.keys()


def test_a_resumed_curve_goes_on_as_if_never_stopped(path, tmp_path, clock):
    train(Curve(tmp_path / "whole.jsonl", 0, lambda entry: None), clock, range(1, 42))

    found = Curve(path, 0, lambda entry: None)
    train(found, clock, range(1, 14))  # saved here
    found.write({"step": 13, "validation_loss": 9.0})
    train(found, clock, range(14, 26))  # killed here, in the middle of a line
    with path.open("a") as file:
        file.write('{"step": 25, "lo')
    clock.now += 1e5
    found = Curve(path, 13, lambda entry: None)
    assert [entry["step"] for entry in curve.read(path)] == [*range(1, 14), 13]
    train(found, clock, range(14, 42))

    def comparable(path):
        entries = [entry for entry in curve.read(path) if "loss" in entry]
        return [
            (entry["step"], entry["loss"], entry["tokens"], entry["seconds"]) for entry in entries
        ]

    assert comparable(path) == comparable(tmp_path / "whole.jsonl")
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["curve.jsonl", "whole.jsonl"]


def test_a_run_from_the_start_leaves_nothing_of_another(path, clock):
    train(Curve(path, 0, lambda entry: None), clock, range(1, 11))
    Curve(path, 0, lambda entry: None)
    assert curve.read(path) == []


def test_texts_are_kept_as_they_are(path):
    reported = []
    texts = [("a\nb", 'é "\u2028\x85 \ud83d'), ("", "")]
    Curve(path, 0, reported.append).write_samples(5, texts)
    (entry,) = curve.read(path)
    assert entry == {"step": 5, "samples": [{"prompt": p, "text": t} for p, t in texts]}
    assert reported == [entry]


def test_other_processes_write_and_report_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = Curve(None, 0, pytest.fail)
    found.add(10, metrics(), 100, 0.1)
    found.write_samples(10, [("a", "b")])
    assert list(tmp_path.iterdir()) == []


def test_smoothing_keeps_what_is_straight_and_quiets_what_alternates():
    line = [0.5 * i for i in range(200)]
    assert curve._smooth(line)[5:-5] == pytest.approx(line[5:-5])
    assert curve._smooth((1.0, 5.0, 2.0)) == [1.0, 5.0, 2.0]  # too few to be averaged
    assert max(abs(value - 2) for value in curve._smooth((1.0, 3.0) * 100)) < 0.2


def test_smoothing_many_values_takes_no_time():
    """To sum 10,000 for each of 200,000 takes seven seconds."""
    values = np.random.default_rng(0).normal(size=200_000) + 3
    began = time.process_time()
    smoothed = curve._smooth(values.tolist())
    assert time.process_time() - began < 1
    for i in (0, 17, 50_000, 199_999):
        near = values[max(0, i - 5000) : i + 5001]
        assert smoothed[i] == pytest.approx(near.mean(), rel=1e-9)


def test_a_curve_is_drawn_with_its_best_validation_marked():
    losses = [{"step": 10 * i, "loss": None if i == 7 else 9.0 - i % 2} for i in range(1, 61)]
    validations = [
        {"step": s, "validation_loss": v} for s, v in ((200, 3.0), (400, 2.0), (600, 4.0))
    ]
    samples = [{"step": 600, "samples": []}]
    (axes,) = curve.draw(losses + validations + samples).axes
    raw, smoothed, validation, best = [line.get_xydata().tolist() for line in axes.lines]
    assert len(raw) == len(smoothed) == 59
    assert raw[:2] == [[10, 8], [20, 9]]
    assert abs(smoothed[-1][1] - 8.5) < 0.25
    assert validation == [[200, 3], [400, 2], [600, 4]]
    assert best == [[400, 2]]
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts[0] == "training, 9 (step 600) at the end"
    assert texts[-1] == "validation, 2 (step 400) at best"


def test_a_plot_is_an_image_even_of_nothing(path, tmp_path):
    curve.plot(path, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "line",
    [
        *(
            "[]",
            "3",
            "{",
            "\xff",
            '{"loss": 1}',
            '{"step": null}',
            '{"step": true}',
            '{"step": -1}',
        ),
        *('{"step": 1, "loss": "x"}', '{"step": 1, "loss": NaN}', '{"step": 1, "loss": 1e400}'),
        *(
            '{"step": 1, "samples": [1]}',
            '{"step": 1, "tokens": 0.5}',
            '{"step": 1, "seconds": null}',
        ),
        '{"step": 1, "samples": [{"prompt": "x"}]}',
    ],
)
def test_a_damaged_line_is_named(path, line):
    path.write_bytes(b'{"step": 1, "loss": null}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=r"curve\.jsonl, line 2(:| has) .*; expected"):
        curve.read(path)
