"""The curve in the real wandb, which writes to disk where it is told to be offline."""

import json

import pytest

from mistral_jax.training.loggers import open_loggers

wandb = pytest.importorskip("wandb")

ENTRIES = [
    {"step": 10, "steps": 40, "loss": 5.0},
    {"step": 20, "validation_loss": 4.5},
    {"step": 20, "samples": [{"prompt": "a", "text": "b"}]},
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_that_goes_on_is_one_run_offline_too(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for entries in (ENTRIES, ENTRIES[1:2]):
        with open_loggers(["wandb"], tmp_path, {"rows": 4, "lora": {"rank": 2}}) as report:
            for entry in entries:
                report(entry)
            assert wandb.run.config["lora"] == {"rank": 2}
            assert wandb.run.summary["validation/loss"] == 4.5
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    # offline-run-TIME-ID, and a number behind it if two began within a second.
    assert len({run.name.split("-")[3] for run in runs}) == 1
    (table,) = runs[0].glob("files/media/table/*.json")
    assert json.loads(table.read_text())["data"] == [[20, "a", "b"]]
