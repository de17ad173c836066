"""Copies of the curve: TensorBoard's files read back, and what wandb is told."""

import importlib.util
import struct
import sys
from types import ModuleType

import pytest

from mistral_jax.training.loggers import open_loggers

TRAINING = {"step": 10, "steps": 40, "loss": 5.0, "skipped": 1, "tokens_per_second": 100.0}
NOT_FINITE = {"step": 20, "steps": 40, "loss": None, "skipped": 10}
VALIDATION = {"step": 20, "validation_loss": 4.5, "validation_accuracy": 0.75}
SAMPLES = {
    "step": 20,
    "samples": [{"prompt": "# a\n```", "text": " *b*\n"}, {"prompt": "", "text": "c"}],
}


def log(names, folder, *entries):
    with open_loggers(names, folder, {"rows": 4, "lora": None}) as report:
        for entry in entries:
            report(entry)


def events(folder):
    """Yields the events of each file in a folder, TensorFlow's records that hold a proto each."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted((folder / "tensorboard").iterdir()):
        data, found = path.read_bytes(), []
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
        yield found


def values(events):
    return {(e.step, v.tag): v for e in events if e.HasField("summary") for v in e.summary.value}


def test_tensorboard_has_every_number_under_its_name(tmp_path):
    log(["tensorboard"], tmp_path, TRAINING, NOT_FINITE, VALIDATION, SAMPLES)
    (found,) = events(tmp_path)
    found = values(found)
    scalars = {
        key: v.simple_value for key, v in found.items() if v.WhichOneof("value") == "simple_value"
    }
    assert scalars == {
        (10, "train/loss"): 5.0,
        (10, "train/skipped"): 1.0,
        (10, "train/tokens_per_second"): 100.0,
        (20, "train/skipped"): 10.0,
        (20, "validation/loss"): 4.5,
        (20, "validation/accuracy"): 0.75,
    }
    texts = {key: v.tensor.string_val[0].decode() for key, v in found.items() if key not in scalars}
    assert {step: text for (step, tag), text in texts.items() if tag.startswith("recipe")} == {
        10: "    rows = 4\n"
    }
    samples = {tag.split("/text")[0]: t for (step, tag), t in texts.items() if step == 20}
    assert samples == {"samples/0": "    # a\n    ``` *b*\n    \n", "samples/1": "    c\n"}


def test_tensorboard_forgets_what_a_resumed_run_does_again(tmp_path):
    log(["tensorboard"], tmp_path, TRAINING, NOT_FINITE)
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.rename(f"{file}.1")  # its name has but seconds
    log(["tensorboard"], tmp_path, NOT_FINITE)
    starts = [
        event.step
        for found in events(tmp_path)
        for event in found
        if event.session_log.status == event.session_log.START
    ]
    assert sorted(starts) == [10, 20]  # TensorBoard drops what other files have from there on


def test_loggers_begin_with_the_first_entry(tmp_path):
    folder = tmp_path / "run"
    log(["tensorboard"], folder)
    assert not folder.exists()
    log(["tensorboard"], folder, TRAINING)
    assert folder.exists()


def test_a_logger_that_is_named_twice_writes_once(tmp_path):
    log(["tensorboard", "tensorboard"], tmp_path, TRAINING)
    (found,) = events(tmp_path)
    losses = [e for e in found if any(v.tag == "train/loss" for v in e.summary.value)]
    assert len(losses) == 1


def test_no_logger_is_no_trouble(tmp_path):
    log([], tmp_path, TRAINING, SAMPLES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_library_that_is_missing_is_told_at_once(tmp_path, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = rf"{name} is not installed: pip install 'mistral-jax-flax\[{name}\]'"
    with pytest.raises(ValueError, match=message):
        log([name], tmp_path)


def test_an_unknown_logger_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no logger 'mlflow'; expected tensorboard or wandb"):
        log(["mlflow"], tmp_path)


class Run:
    def __init__(self, calls):
        self.calls = calls
        self.log = lambda values: calls.append(("log", values))
        self.define_metric = lambda *names, **options: calls.append(("define", names, options))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.calls.append(("finish", kind))


@pytest.fixture
def wandb(monkeypatch):
    """Puts a module in wandb's place that notes what it is called with, and returns it."""
    module, calls = ModuleType("wandb"), []
    module.__spec__ = importlib.util.spec_from_loader("wandb", None)
    module.calls = calls
    module.Error = type("Error", (Exception,), {})
    module.Table = lambda columns, data: (columns, data)
    module.init = lambda **options: calls.append(("init", options)) or Run(calls)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_wandb_is_told_every_number_and_text(tmp_path, wandb):
    log(["wandb"], tmp_path, TRAINING, VALIDATION, SAMPLES)
    (_, options), (_, names, steps), *logs, end = wandb.calls
    expected = {"project": "mistral_jax", "name": tmp_path.name, "dir": str(tmp_path)}
    assert expected.items() <= options.items()
    assert (names, steps) == (("*",), {"step_metric": "step"})
    rows = [[20, "# a\n```", " *b*\n"], [20, "", "c"]]
    assert [values for _, values in logs] == [
        {"step": 10, "train/loss": 5.0, "train/skipped": 1, "train/tokens_per_second": 100.0},
        {"step": 20, "validation/loss": 4.5, "validation/accuracy": 0.75},
        {"step": 20, "samples": (["step", "prompt", "text"], rows)},
    ]
    assert end == ("finish", None)


def test_wandb_goes_on_with_the_run_of_the_folder(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    log(["wandb"], tmp_path, TRAINING)
    log(["wandb"], tmp_path, NOT_FINITE)
    (tmp_path / "other").mkdir()
    log(["wandb"], tmp_path / "other", TRAINING)
    first, again, other = [call[1] for call in wandb.calls if call[0] == "init"]
    assert first["id"] == again["id"] != other["id"]
    assert {options["resume"] for options in (first, again, other)} == {"allow"}
    assert first["project"] == "mine"


def test_wandb_learns_of_a_failure(tmp_path, wandb):
    with pytest.raises(KeyError), open_loggers(["wandb"], tmp_path, {}) as report:  # noqa: PT012
        report(TRAINING)
        raise KeyError
    assert wandb.calls[-1] == ("finish", KeyError)


def test_wandb_that_does_not_begin_is_one_sentence(tmp_path, wandb):
    def refuse(**options):
        raise wandb.Error("api_key not configured (no-tty)")

    wandb.init = refuse
    with pytest.raises(ValueError, match=r"wandb does not start: api_key .*; or set WANDB_MODE"):
        log(["wandb"], tmp_path, TRAINING)
