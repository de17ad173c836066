"""The report of a run: what it says of a curve and of notes on data, and what is left out."""

import importlib.util
import json
from pathlib import Path

import pytest

from mistral_jax.training import summary

RECIPE = {"rows": 8, "context": 512, "lora": {"rank": 16, "alpha": 32.0}, "checkpoint": "base"}
SPLIT = {
    "examples": 1200, "rows": 300, "fill": 0.934, "tokens": 143_462, "learnt": 50_000,
    "bad": 3, "too_long": 0, "left_out": 1, "reasons": {},
}  # fmt: skip


def training(step, loss, **more):
    measured = {"tokens": step * 4096, "seconds": step * 2.0, "tokens_per_second": 2000.0 + step}
    return {"step": step, "steps": 30, "loss": loss, "memory": 3_210_000_000, **measured, **more}


def samples(step, *texts):
    return {"step": step, "samples": [{"prompt": f"p{i}", "text": t} for i, t in enumerate(texts)]}


CURVE = [
    {"step": 0, "validation_loss": 5.25},
    samples(0, "noise", "more\nnoise"),
    training(10, 4.0, skipped=1, mfu=0.31),
    {"step": 10, "validation_loss": 3.5, "validation_accuracy": 0.5},
    samples(10, "half", "half"),
    training(20, None, skipped=10, mfu=0.41),
    {"step": 20, "validation_loss": 3.0, "validation_accuracy": 0.75},
    training(30, 2.5, skipped=0, mfu=0.42),
    {"step": 30, "validation_loss": 3.25, "validation_accuracy": 0.625},
    samples(30, "```\nsense", ""),
]


@pytest.fixture
def written(tmp_path):
    """Writes the report of a run with these entries; returns it, and what was printed."""

    def write(entries, recipe=RECIPE, notes=None):
        folder = tmp_path / "signatures"
        (folder / "data").mkdir(parents=True)
        for name, content in (notes or {}).items():
            (folder / "data" / name).write_text(json.dumps(content))
        (folder / "curve.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
        told = summary.write(folder, recipe, Path("out/adapter"), 1020, "python -m x --lora 'a b'")
        return (folder / "report.md").read_text(), told.splitlines(), folder

    return write


def table(report):
    """Returns the rows of all tables by their first cell, without heads."""
    rows = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows if len(row) > 1}


def test_a_report_has_facts_losses_texts_and_the_command(written):
    report, told, folder = written(CURVE, notes={"data.json": {"train": SPLIT, "prompts": []}})
    assert report.startswith("# signatures\n")
    found = table(report)
    assert found["model"] == ["base"]
    assert found["trained"] == ["LoRA adapters of rank 16"]
    assert found["train data"] == [
        "1,200 examples in 300 rows, 93% filled; 50,000 of 143,462 tokens learnt; 3 bad; 1 left out"
    ]
    assert found["steps"] == ["30 of 8 x 512 tokens"]
    assert found["tokens"] == ["122,880"]
    assert found["time"] == ["1:00"]
    assert found["speed"] == ["2.02k tokens/s"]
    assert found["utilisation"] == ["41.0% of the devices' peak (MFU)"]
    assert found["memory"] == ["3.21 GB at most"]
    assert found["skipped steps"] == ["11, not finite"]
    assert found["training loss"] == ["4 (step 10)", "2.5 (step 30)", "2.5 (step 30)"]
    assert found["validation loss"] == ["5.25 (step 0)", "3.25 (step 30)", "3 (step 20)"]
    assert found["validation accuracy"] == ["0.5 (step 10)", "0.625 (step 30)", "0.75 (step 20)"]
    assert "The result, of step 1,020, is in `out/adapter`:\n\n    python -m x --lora" in report
    before_and_after = report[report.index("## Samples") : report.index("## Use")]
    assert "Step 0:\n\n    more\n    noise\n" in before_and_after
    assert "Step 30:\n\n    ```\n    sense\n" in before_and_after
    assert "Step 30:\n\n(nothing)\n" in before_and_after
    assert "half" not in before_and_after
    assert told == [
        "30 steps, 123k tokens in 1:00: loss 4 -> 2.5, validation 5.25 -> 3 at best, step 20",
        f"report: {folder / 'report.md'}",
        "the adapters are in out/adapter",
        "to use it: python -m x --lora 'a b'",
    ]


@pytest.mark.parametrize("installed", [True, False])
def test_the_curve_is_drawn_where_matplotlib_is_installed(written, monkeypatch, installed):
    if not installed:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    report, _, folder = written(CURVE)
    assert ("![loss](curve.png)" in report) == (folder / "curve.png").is_file() == installed


@pytest.mark.parametrize(
    ("recipe", "model", "trained"),
    [
        ({"model": "nano"}, "nano, from nothing", "all parameters"),
        (
            {"lora": {"rank": 2}, "quantize": "nf4"},
            "the bundled model",
            "LoRA adapters of rank 2, beside weights in nf4",
        ),
        (
            {"dpo": {"beta": 0.1}},
            "the bundled model",
            "all parameters, on preferences (DPO, beta 0.1)",
        ),
    ],
)
def test_a_report_says_what_was_trained(written, recipe, model, trained):
    report, told, _ = written([training(5, 1.0)], {"rows": 1, "context": 2, **recipe})
    assert table(report)["model"] == [model]
    assert table(report)["trained"] == [trained]
    assert table(report)["skipped steps"] == ["none"]
    noun = "adapters are" if "lora" in recipe else "model is"
    assert told[-2] == f"the {noun} in out/adapter"


def test_a_corpus_is_named(written):
    sources = [
        {"name": "jax", "version": "0.10", "license": "Apache-2.0", "files": 1000, "bytes": 2e6},
        {"name": "rich", "version": "14", "license": "MIT", "files": 1, "bytes": 5e5},
    ]
    report, _, _ = written([training(5, 1.0)], notes={"corpus.json": sources})
    assert table(report)["data"] == ["1,001 files of Python, 2.5 MB, of jax 0.10, rich 14"]


def test_what_was_not_measured_is_left_out(written):
    report, told, _ = written([{"step": 1, "loss": None, "tokens": 9, "seconds": 1.0}])
    assert "## Samples" not in report
    assert not table(report).keys() & {"speed", "memory", "utilisation", "training loss"}
    assert len(told) == 3
