"""Training a checkpoint on examples: what it learns, what it keeps, and how it goes on."""

import json
import signal
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import tiny
import tokenizer_samples

import mistral_jax as mj
from mistral_jax.checkpoint import adapters, checkpoint
from mistral_jax.training import curve, finetuning, run
from mistral_jax.training.data import examples
from mistral_jax.training.recipe import Recipe

WORDS = ("red", "green", "blue", "grey")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer, and files of conversations and pairs."""
    folder = tmp_path_factory.mktemp("finetuning")
    file = tokenizer_samples.train_small_mistral(folder / "tokenizer.model")
    model, params = tiny.build(vocab_size=400, n_heads=8, n_kv_heads=4, hidden_dim=48)
    source = {"source": f"acme/tiny@{'0' * 40}"}
    checkpoint.save(folder / "base", model.config, params, file, source)

    def chat(i, answer):
        return [
            {"role": "user", "content": f"say {WORDS[i % 4]} {i}"},
            {"role": "assistant", "content": answer},
        ]

    with (folder / "train.jsonl").open("w") as train, (folder / "pairs.jsonl").open("w") as pairs:
        for i in range(60):
            right, wrong = chat(i, WORDS[i % 4]), chat(i, WORDS[(i + 1) % 4])
            train.write(json.dumps({"messages": right}) + "\n")
            pairs.write(json.dumps({"chosen": right, "rejected": wrong}) + "\n")
    with (folder / "validation.jsonl").open("w") as file:
        for i in range(60, 70):
            file.write(json.dumps({"messages": chat(i, WORDS[i % 4])}) + "\n")
    return folder


def recipe(folder, **fields):
    data = {
        "train": [str(folder / "train.jsonl")],
        "validation": [str(folder / "validation.jsonl")],
    }
    table = {
        "checkpoint": str(folder / "base"),
        "data": data,
        "context": 48,
        "rows": 4,
        "steps": 12,
        "warmup_steps": 2,
        "learning_rate": 1e-2,
        "validate_every": 6,
        "save_every": 4,
    }
    return Recipe.from_dict(table | fields)


LORA = {"lora": {"rank": 4, "dropout": 0.1, "targets": ["q_proj", "v_proj", "down_proj"]}}


def train(recipe, path, *layout):
    entries = []
    return run.train(recipe, path, entries.append, *layout), entries


def losses(path, name="loss"):
    return [(e["step"], e[name]) for e in curve.read(path / "curve.jsonl") if name in e]


@pytest.fixture(scope="module")
def adapted(folder):
    """The folder of a run that trained adapters, and how it ended."""
    path = folder / "adapted"
    outcome, _ = train(recipe(folder, **LORA), path)
    return path, outcome


def test_adapters_learn_and_the_base_stays(folder, adapted):
    path, outcome = adapted
    validation = losses(path, "validation_loss")
    assert [step for step, _ in validation] == [0, 6, 12]
    assert validation[2][1] < validation[1][1] < 0.9 * validation[0][1]
    assert outcome.stopped is None
    assert outcome.result == path / "adapter"
    assert f"--checkpoint {folder / 'base'} --lora {path / 'adapter'}" in outcome.command
    assert not (path / "checkpoint").exists()
    size = sum(file.stat().st_size for file in (path / "adapter").iterdir())
    assert size < 30_000  # of a model of 200 kB
    described = json.loads((path / "adapter" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == "acme/tiny"
    lora, found = adapters.read(path / "adapter", mj.load(folder / "base")[0].config)
    assert lora.rank == 4
    assert set(lora.targets) == set(LORA["lora"]["targets"])
    job = finetuning.make_job(recipe(folder, **LORA), path)
    state = run.restore_state(path, job.state)
    chex.assert_trees_all_equal(found, jax.device_get(state.trainable))


def test_a_result_is_the_model_that_was_trained(folder, adapted):
    path, _ = adapted
    job = finetuning.make_job(recipe(folder, **LORA), path)
    trained = job.params(run.restore_state(path, job.state))
    model, beside, _ = mj.load(folder / "base", lora=path / "adapter")
    _, merged, _ = mj.load(folder / "base", lora=path / "adapter", merge=True)
    ids = list(range(1, 30))
    expected = tiny.alone(job.model, trained, ids)
    np.testing.assert_allclose(tiny.alone(model, beside, ids), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(tiny.alone(model, merged, ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_all_parameters_learn_in_float32_and_are_saved_as_a_checkpoint(folder):
    path = folder / "full"
    outcome, _ = train(recipe(folder), path)
    assert outcome.result == path / "checkpoint"
    validation = losses(path, "validation_loss")
    assert validation[-1][1] < 0.7 * validation[0][1]
    _, params, tokenizer = mj.load(path / "checkpoint")
    _, base, _ = mj.load(folder / "base")
    changed = [(a != b).any() for a, b in zip(*map(jax.tree.leaves, (params, base)), strict=True)]
    assert all(changed)
    assert tokenizer.vocab_size == 400
    notes = json.loads((path / "checkpoint" / "config.json").read_text())["provenance"]
    assert notes["recipe"]["data"]["train"] == [str(folder / "train.jsonl")]


@pytest.mark.slow
def test_it_learns_to_stop(folder):
    """EOS is an answer's last token, and learnt as such."""
    outcome, _ = train(recipe(folder, steps=60, learning_rate=2e-2), folder / "stops")
    model, params, tokenizer = mj.load(outcome.result)
    prompts = [tokenizer.encode_chat([{"role": "user", "content": f"say red {i}"}]) for i in (1, 5)]
    for completion in mj.generate(model, params, prompts, 40, sampling=mj.Sampling(0)):
        assert completion.finish_reason == "stop"


def test_how_it_is_computed_does_not_matter(folder):
    plain = {"steps": 4, "lora": {"rank": 4}, "weight_decay": 0.1}
    fields = {"scan": True, "remat": "nothing_saveable", "microbatches": 2}
    train(recipe(folder, **plain), folder / "plain")
    train(recipe(folder, **plain, **fields), folder / "otherwise")
    for found, expected in zip(losses(folder / "otherwise"), losses(folder / "plain"), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


KILLED = """
import os, signal, sys, json
import mistral_jax.training.run as run
from mistral_jax.training import curve
from mistral_jax.training.recipe import Recipe
fields, path, number, at = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
add = curve.Curve.add
def add_and_signal(self, step, *rest, **named):
    add(self, step, *rest, **named)
    if step == at:
        os.kill(os.getpid(), number)
curve.Curve.add = add_and_signal
outcome = run.train(Recipe.from_dict(fields), path, lambda entry: None)
print(outcome.stopped)
"""


def interrupted(recipe, path, number, step):
    """Trains in a process of its own, which gets a signal after a step."""
    arguments = json.dumps(recipe.to_dict()), str(path), str(int(number)), str(step)
    return subprocess.run(
        [sys.executable, "-c", processes.BEGIN + KILLED, *arguments],
        env=processes.environment(),
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 7, 9])
def test_killed_at_any_step_it_goes_on_to_the_bit(folder, adapted, tmp_path, step):
    """Order of data and dropout included."""
    changed = recipe(folder, **LORA)
    assert interrupted(changed, tmp_path / "run", signal.SIGKILL, step).returncode == -9
    train(changed, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(adapted[0])
    assert losses(tmp_path / "run", "validation_loss") == losses(adapted[0], "validation_loss")
    first, second = (
        path / "adapter/adapter_model.safetensors" for path in (tmp_path / "run", adapted[0])
    )
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_told_to_stop_it_saves_and_goes_on_to_the_bit(folder, adapted, tmp_path):
    changed = recipe(folder, **LORA)
    ended = interrupted(changed, tmp_path / "run", signal.SIGTERM, 5)
    assert (ended.returncode, ended.stdout) == (0, "15\n"), ended.stderr
    assert (tmp_path / "run/states/00000005").is_dir()
    train(changed, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(adapted[0])


@pytest.mark.slow
def test_it_goes_on_under_another_layout(folder, adapted, tmp_path):
    changed = recipe(folder, **LORA)
    interrupted(changed, tmp_path / "run", signal.SIGTERM, 5)
    train(changed, tmp_path / "run", "fsdp_tensor", {"fsdp": 2, "tensor": 4})
    for found, expected in zip(losses(tmp_path / "run"), losses(adapted[0]), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    assert losses(tmp_path / "run", "validation_loss")[-1] == pytest.approx(
        losses(adapted[0], "validation_loss")[-1], rel=1e-4
    )


@pytest.mark.slow
def test_two_processes_train_as_one(folder, adapted, tmp_path):
    """Each reads its own rows, and the first alone writes what comes of them."""
    arguments = (
        json.dumps(recipe(folder, sample_every=6, **LORA).to_dict()),
        tmp_path / "run",
        "fsdp",
    )
    first, second = processes.together(processes.__file__, "finetune", *arguments)
    assert (first.status, second) == (0, (0, "", "")), first.err
    for found, expected in zip(losses(tmp_path / "run"), losses(adapted[0]), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    (_, one), (_, two) = (
        adapters.read(path / "adapter", mj.load(folder / "base")[0].config)
        for path in (adapted[0], tmp_path / "run")
    )
    chex.assert_trees_all_close(one, two, rtol=1e-3, atol=1e-4)


def test_parameters_are_float32_and_what_is_frozen_is_of_the_dtype_of_computation(folder, adapted):
    def dtypes(tree):
        return {leaf.dtype for leaf in jax.tree.leaves(tree)}

    job = finetuning.make_job(recipe(folder, dtype="bfloat16", **LORA), adapted[0])
    assert job.model.dtype == jnp.bfloat16
    assert dtypes(job.state.trainable) == {jnp.dtype(jnp.float32)}
    assert dtypes(job.state.frozen) == {jnp.dtype(jnp.bfloat16)}
    job = finetuning.make_job(recipe(folder, dtype="bfloat16"), adapted[0])
    assert dtypes(job.state.trainable) == {jnp.dtype(jnp.float32)}
    assert not jax.tree.leaves(job.state.frozen)


@pytest.mark.slow
def test_the_latest_states_are_kept_and_the_best(folder, tmp_path, monkeypatch):
    values = iter([5.0, 4.0, 3.0, 6.0, 7.0, 8.0, 9.0])

    def validate(self, step):
        loss = next(values)
        improved = loss < self._best.loss
        self._best = run._Best(loss, step) if improved else self._best
        self._curve.write({"step": step, "validation_loss": loss})
        return improved

    monkeypatch.setattr(run._Run, "_validate", validate)
    fields = {"validate_every": 2, "save_every": 3, "keep": 2, **LORA}
    train(recipe(folder, **fields), tmp_path / "run")
    kept = sorted(int(path.name) for path in (tmp_path / "run/states").iterdir())
    assert kept == [4, 9, 12]


@pytest.mark.slow
def test_the_result_may_be_the_best(folder, tmp_path):
    """With a rate that first helps and then destroys."""
    fields = {
        "validate_every": 1,
        "steps": 8,
        "schedule": "linear",
        "learning_rate": 1e-3,
        "final_learning_rate": 5.0,
        "warmup_steps": 0,
        "export_best": True,
    }
    outcome, _ = train(recipe(folder, **fields), tmp_path / "run")
    validation = dict(losses(tmp_path / "run", "validation_loss"))
    best = min(validation, key=validation.get)
    assert 0 < best < 8
    notes = json.loads((outcome.result / "config.json").read_text())["provenance"]
    assert notes["step"] == best


@pytest.mark.slow
def test_steps_that_are_not_finite_are_skipped_and_too_many_end_the_run(folder, tmp_path):
    growing = {"learning_rate": 1e3, "weight_decay": 1e3, "clip_norm": 0, "warmup_steps": 0}
    wild = recipe(folder, most_skipped=3, **growing)
    with pytest.raises(ValueError, match=r"of 3 steps in a row, up to step \d+, are not finite"):
        train(wild, tmp_path / "run")
    job = finetuning.make_job(wild, tmp_path / "run")
    state = run.restore_state(tmp_path / "run", job.state)
    assert int(state.step) >= 3
    chex.assert_tree_all_finite((state.trainable, state.opt_state))
    assert sum(e.get("skipped", 0) for e in curve.read(tmp_path / "run/curve.jsonl")) == 3


@pytest.mark.parametrize("adapted", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_preferences_are_learnt_from_where_the_model_began(folder, tmp_path, adapted):
    pairs = {"train": [str(folder / "pairs.jsonl")], "validation": [str(folder / "pairs.jsonl")]}
    fields = {"data": pairs, "dpo": {"beta": 0.5}, "learning_rate": 1e-2 if adapted else 1e-3}
    fields |= {"lora": {"rank": 4}} if adapted else {}
    train(recipe(folder, **fields), tmp_path / "run")
    validation = losses(tmp_path / "run", "validation_loss")
    assert validation[0][1] == pytest.approx(np.log(2), rel=1e-4)
    assert validation[-1][1] < 0.5
    assert losses(tmp_path / "run", "validation_accuracy")[-1][1] > 0.8
    assert losses(tmp_path / "run", "validation_margin")[-1][1] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_adapters_learn_beside_quantised_weights(folder, tmp_path, kind):
    outcome, _ = train(recipe(folder, quantize=kind, **LORA), tmp_path / "run")
    validation = losses(tmp_path / "run", "validation_loss")
    assert validation[-1][1] < 0.95 * validation[0][1]
    model, params, _ = mj.load(folder / "base", lora=outcome.result)
    assert jnp.isfinite(tiny.alone(model, params, [1, 5, 9])).all()


@pytest.mark.slow
def test_epochs_count_rows_of_the_data(folder, tmp_path):
    fields = {"steps": None, "epochs": 2, "warmup_steps": 0, **LORA}
    train(recipe(folder, **fields), tmp_path / "run")
    notes = json.loads((tmp_path / "run/data/data.json").read_text())
    assert losses(tmp_path / "run")[-1][0] == -(-2 * notes["train"]["rows"] // 4)


@pytest.mark.parametrize(
    "layout", [(), pytest.param(("fsdp", {"fsdp": 4}), marks=pytest.mark.slow)]
)
def test_a_step_is_compiled_once(folder, tmp_path, monkeypatch, layout):
    made, make_train_step = [], run.make_train_step

    def make(*arguments):
        made.append(make_train_step(*arguments))
        return made[-1]

    monkeypatch.setattr(run, "make_train_step", make)
    train(recipe(folder, steps=3, **LORA), tmp_path / "run", *layout)
    train(recipe(folder, steps=5, **LORA), tmp_path / "run", *layout)
    assert [step._cache_size() for step in made] == [1, 1]


@pytest.mark.slow
def test_samples_are_written_as_it_goes(folder, tmp_path):
    fields = {"sample_every": 6, "sample_prompts": ["say"], **LORA}
    _, entries = train(recipe(folder, **fields), tmp_path / "run")
    samples = [entry for entry in entries if "samples" in entry]
    assert [entry["step"] for entry in samples] == [0, 6, 12]
    assert all(entry["samples"][0]["prompt"] == "say" for entry in samples)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context": 40_000}, r"context is 40000; expected at most 32768"),
        ({"steps": None, "epochs": 0.1}, r"warmup_steps is 2; expected less than the run's"),
        ({"checkpoint": "absent"}, "absent is no folder; expected a checkpoint"),
        ({"data": {"train": ["absent.jsonl"]}}, r"absent\.jsonl"),
    ],
)
def test_what_does_not_fit_is_refused(folder, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        train(recipe(folder, **fields), tmp_path / "run")


def test_a_bad_line_is_named_and_nothing_is_left_behind(folder, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text((folder / "train.jsonl").read_text() + '{"text": 7}\n')
    data = {"train": [str(bad)]}
    with pytest.raises(ValueError, match=r"bad\.jsonl.*61"):
        train(recipe(folder, data=data), tmp_path / "run")
    assert not (tmp_path / "run" / "data").exists()
    mended = recipe(folder, data=data | {"skip_bad": True}, **LORA)
    with run.prepared(mended, tmp_path / "run"):
        first, *rest = examples.describe(tmp_path / "run")
    assert first.startswith("train: 60 examples in ")
    assert rest[0] == "  1 bad lines were left out, such as"
    assert "bad.jsonl, line 61: " in rest[1]


@pytest.mark.slow
def test_nothing_trained_yet_a_run_takes_another_recipe_and_other_files(folder, tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text((folder / "train.jsonl").read_text())
    fields = {"data": {"train": [str(file)]}, "epochs": 1, "steps": None, **LORA}
    with pytest.raises(ValueError, match="warmup_steps is 99"):
        train(recipe(folder, **fields, warmup_steps=99), tmp_path / "run")
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:20]))
    train(recipe(folder, **fields, warmup_steps=1), tmp_path / "run")
    assert next(examples.describe(tmp_path / "run")).startswith("train: 20 examples")
    with pytest.raises(ValueError, match="holds a run with warmup_steps = 1, and this recipe"):
        train(recipe(folder, **fields, warmup_steps=2), tmp_path / "run")
    file.write_text((folder / "train.jsonl").read_text())
    with pytest.raises(ValueError, match=r"train\.jsonl has changed since the run in .* began: re"):
        train(recipe(folder, **fields, warmup_steps=1), tmp_path / "run")
    file.unlink()  # It is not needed any more.
    train(recipe(folder, **fields, warmup_steps=1), tmp_path / "run")


def test_a_folder_is_for_one_process_at_a_time(folder, tmp_path):
    wanted = recipe(folder, **LORA)
    with (
        run.prepared(wanted, tmp_path / "run"),
        pytest.raises(ValueError, match=r"another process trains in .*run: wait for it"),
    ):
        train(wanted, tmp_path / "run")


def test_a_run_that_goes_on_holds_one_state(folder, adapted):
    job = finetuning.make_job(recipe(folder, **LORA), adapted[0])
    before = jax.tree.leaves((job.state.trainable, job.state.opt_state))
    state = run.restore_state(adapted[0], job.state)
    assert all(array.is_deleted() for array in before)
    assert int(state.step) == 12
    assert not any(array.is_deleted() for array in jax.tree.leaves(state))


def test_stopped_before_its_first_step_it_ends_at_once(folder, tmp_path):
    signal_handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        outcome = run.train(
            recipe(folder, **LORA),
            tmp_path / "run",
            lambda entry: None,
            tell=lambda line: signal.raise_signal(signal.SIGTERM) if "train" in line else None,
        )
    finally:
        signal.signal(signal.SIGTERM, signal_handler)
    assert outcome.stopped == signal.SIGTERM
    assert not (tmp_path / "run" / "states").exists()


@pytest.mark.slow
def test_the_best_is_that_of_a_run_never_stopped(folder, tmp_path):
    """Whose first state, which is not kept, was better than all others."""
    fields = {"learning_rate": 0.3, "warmup_steps": 0, "validate_every": 2, "export_best": True}
    whole, _ = train(recipe(folder, **fields), tmp_path / "whole")
    interrupted(recipe(folder, **fields), tmp_path / "run", signal.SIGTERM, 4)
    assert 4 not in dict(losses(tmp_path / "run", "validation_loss"))  # It did not wait for that.
    resumed, _ = train(recipe(folder, **fields), tmp_path / "run")
    assert resumed.step == whole.step
    assert losses(tmp_path / "run", "validation_loss") == losses(
        tmp_path / "whole", "validation_loss"
    )


def test_the_rate_that_is_told_is_the_one_of_the_step(folder, tmp_path, monkeypatch):
    """A step that is skipped does not move it."""

    def spoil(loss_fn, *rest):
        def sometimes(trainable, frozen, batch, key):
            loss, sums = loss_fn(trainable, frozen, batch, key)
            return jnp.where(jax.random.uniform(key) < 0.5, jnp.nan, loss), sums

        return make_train_step(sometimes, *rest)

    make_train_step = run.make_train_step
    monkeypatch.setattr(run, "make_train_step", spoil)
    train(recipe(folder, schedule="linear", **LORA), tmp_path / "run")
    entries = [e for e in curve.read(tmp_path / "run/curve.jsonl") if "loss" in e]
    skipped = [entry["skipped"] for entry in entries]
    assert 0 < sum(skipped) < 12
    schedule, _ = run.optimizer_of(recipe(folder, schedule="linear"), 12)
    expected = [float(schedule(i - sum(skipped[:i]))) for i in range(12)]
    assert [entry["learning_rate"] for entry in entries] == pytest.approx(expected)
