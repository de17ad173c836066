"""A training run: stopped and gone on equals uninterrupted, to the bit; and its command line."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import shlex
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import tiny

import mistral_jax
from mistral_jax import config
from mistral_jax.checkpoint.lora import Lora
from mistral_jax.cli import train
from mistral_jax.model.transformer import Transformer
from mistral_jax.parallel.sharding import on_mesh, read_layout
from mistral_jax.training import curve, pretraining, run
from mistral_jax.training.data import corpus
from mistral_jax.training.data.batches import spread, window_batch
from mistral_jax.training.job import optimizer_of
from mistral_jax.training.loss import make_loss_fn
from mistral_jax.training.recipe import Data, Recipe
from mistral_jax.training.states import create_state, restore_state
from mistral_jax.training.step import make_train_step

MODEL = """
vocab_size = 500
num_layers = 1
embed_dim = 32
mlp_dim = 48
num_heads = 4
num_kv_heads = 2
head_dim = 8
rope_theta = 1e4
sliding_window = 8
"""
RECIPE = """
model = "tiny"
corpus = { Any = 2 }
context = 24
rows = 2
steps = 20
warmup_steps = 2
learning_rate = 1e-2
final_learning_rate = 1e-3
validate_every = 10
save_every = 10
"""
TESTS = sorted(Path(__file__).parent.glob("test_*.py"))
SOURCE = corpus.Source("any", "1", "MIT", {path.name: path.read_text() for path in TESTS})


@pytest.fixture(scope="module", autouse=True)
def recipe_file(tmp_path_factory):
    """Puts the tiny model among the known ones, and these tests in the place of a corpus."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "models").mkdir()
    (folder / "models" / "tiny.toml").write_text(MODEL)
    (folder / "tiny.toml").write_text(RECIPE)
    shutil.copytree(config.CONFIG_DIR / "sharding", folder / "sharding")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "CONFIG_DIR", folder)
        patch.setattr(corpus, "gather", lambda roots: [SOURCE])
        # One document in a few, of so few.
        patch.setattr(corpus, "_VALIDATION_SHARE", 5)
        yield folder / "tiny.toml"


@pytest.fixture(scope="module")
def printed(recipe_file, tmp_path_factory):
    """Trains by the command, uninterrupted; returns the run's folder and what was printed."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        assert command(recipe_file, "--run", path, "--plot") == 0
    return path, output.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def finished(printed):
    """Returns the folder of a run that nothing interrupted."""
    return printed[0]


def command(*arguments):
    return train.main(["--no-compilation-cache", *map(str, arguments)])


def final_state(path, recipe):
    return restore_state(path, pretraining.make_job(recipe, path).state)


def losses(path):
    return [(e["step"], e["loss"]) for e in curve.read(path / "curve.jsonl") if "loss" in e]


def stop_at(step, number):
    def report(entry):
        if entry["step"] == step and "loss" in entry:
            signal.raise_signal(number)

    return report


def test_stopped_and_gone_on_equals_uninterrupted(finished, recipe_file, tmp_path):
    recipe = dataclasses.replace(Recipe.from_file(recipe_file), save_every=20)

    def stop_at_10(entry):
        if entry["step"] == 10:
            signal.raise_signal(signal.SIGTERM)

    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # for the validation's entry
    try:
        assert run.train(recipe, tmp_path / "run", stop_at_10).stopped == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert [path.name for path in (tmp_path / "run/states").iterdir()] == ["00000010"]
    assert not (tmp_path / "run/checkpoint").exists()
    assert run.train(recipe, tmp_path / "run", lambda entry: None).stopped is None
    chex.assert_trees_all_equal(
        final_state(tmp_path / "run", recipe), final_state(finished, recipe)
    )
    assert losses(tmp_path / "run") == losses(finished)


def test_a_killed_run_goes_on_from_its_last_state(finished, recipe_file, tmp_path):
    recipe = Recipe.from_file(recipe_file)
    killed = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(killed / "states" / "00000020")
    (killed / "states" / ".00000020.partial-ab").mkdir()
    with (killed / "curve.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')
    assert run.train(recipe, killed, lambda entry: None).stopped is None
    chex.assert_trees_all_equal(final_state(killed, recipe), final_state(finished, recipe))
    assert losses(killed) == losses(finished)


def damage(kind, folder):
    """Cuts, removes or changes the largest file in a folder."""
    file = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    if kind == "missing":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data)


@pytest.mark.parametrize(
    ("kind", "sums", "message"),
    [
        ("cut", True, "is not the file that was written"),
        ("cut", False, "bytes; expected"),
        ("missing", True, "is missing: "),
        ("missing", False, "has no file"),
        ("changed", True, "is not the file that was written"),
    ],
)
def test_a_damaged_state_gives_way_to_the_one_before(
    finished, recipe_file, tmp_path, kind, sums, message
):
    """States from before there were checksums are told by the sizes of their files."""
    recipe, path, told = Recipe.from_file(recipe_file), tmp_path / "run", []
    shutil.copytree(finished, path)
    if not sums:
        [file.unlink() for file in path.rglob("checksums.json")]
    damage(kind, path / "states/00000020/state")
    state = restore_state(path, pretraining.make_job(recipe, path).state, tell=told.append)
    assert state.step == 10
    (warning,) = told
    assert warning.startswith(f"warning: {path / 'states/00000020'}")
    assert message in warning


def test_a_run_goes_on_from_the_last_whole_state(finished, recipe_file, tmp_path):
    recipe, told = Recipe.from_file(recipe_file), []
    path = shutil.copytree(finished, tmp_path / "run")
    damage("cut", path / "states/00000020/state")
    assert run.train(recipe, path, lambda entry: None, tell=told.append).stopped is None
    assert "going on at step 10 of 20" in told
    chex.assert_trees_all_equal(final_state(path, recipe), final_state(finished, recipe))
    assert losses(path) == losses(finished)


def test_a_run_without_a_whole_state_says_how_to_go_on(finished, recipe_file, tmp_path):
    path = shutil.copytree(finished, tmp_path / "run")
    for state in (path / "states").iterdir():
        damage("cut", state / "state")
    with pytest.raises(ValueError, match=r"the state is damaged; to go on .* remove .*/00000010$"):
        run.train(Recipe.from_file(recipe_file), path, lambda entry: None)


@pytest.mark.parametrize("kind", ["cut", "missing", "changed"])
def test_damaged_data_are_named_and_made_again(finished, recipe_file, tmp_path, kind):
    path = shutil.copytree(finished, tmp_path / "run")
    recipe = Recipe.from_file(recipe_file)
    damage(kind, path / "data")
    with pytest.raises(
        ValueError, match=r"data/train\.npy .*remove .*/data, and it is made again$"
    ):
        run.train(recipe, path, lambda entry: None)
    shutil.rmtree(path / "data")
    assert run.train(recipe, path, lambda entry: None).stopped is None
    assert (path / "data/train.npy").read_bytes() == (finished / "data/train.npy").read_bytes()


def test_a_run_that_was_killed_before_its_data_were_made_goes_on(recipe_file, tmp_path):
    recipe, path = Recipe.from_file(recipe_file), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "prepare", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.train(recipe, path, lambda entry: None)
    stop = stop_at(1, signal.SIGTERM)
    assert run.train(recipe, path, stop).stopped == signal.SIGTERM


@pytest.mark.slow
def test_a_run_can_be_in_any_thread(finished, recipe_file, tmp_path):
    path = shutil.copytree(finished, tmp_path / "run")
    with ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(run.train, Recipe.from_file(recipe_file), path, print).result()
    assert outcome.result == path / "checkpoint"


def test_the_command_works_without_standard_streams(finished, recipe_file, tmp_path, monkeypatch):
    path = shutil.copytree(finished, tmp_path / "run")
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert train._run(train._parser().parse_args([str(recipe_file), "--run", str(path)])) == 0


@pytest.mark.slow
def test_a_run_goes_on_under_another_layout(finished, recipe_file, tmp_path):
    recipe, path = Recipe.from_file(recipe_file), tmp_path / "run"
    with contextlib.suppress(KeyboardInterrupt):
        run.train(recipe, path, stop_at(10, signal.SIGINT), "fsdp", {"fsdp": 4})
    assert [folder.name for folder in (path / "states").iterdir()] == ["00000010"]
    outcome = run.train(recipe, path, lambda entry: None, "tensor", {"tensor": 2})
    assert outcome.stopped is None
    for (step, loss), (_, expected) in zip(losses(path), losses(finished), strict=True):
        assert loss == pytest.approx(expected, rel=1e-4), step


def one_step(recipe, layout):
    """Takes a step on 3 rows; returns the shardings before it, the state and the metrics."""
    tokens = np.random.default_rng(0).integers(0, 500, 200)
    batch = window_batch(0, tokens, context=24, rows=3, seed=0)
    model = Transformer(recipe.model_config, rules=layout.rules if layout else ())
    _, optimizer = optimizer_of(recipe, recipe.steps)
    params = pretraining.initial_params(model, 0, layout)
    state = create_state(optimizer, params, layout=layout)
    places = jax.tree.map(lambda x: x.sharding, state) if layout else None
    step = make_train_step(make_loss_fn(model), optimizer, 1, places)
    with on_mesh(state.trainable):
        return places, *step(state, spread(batch, layout) if layout else batch)


@pytest.fixture(scope="module")
def on_one_device(recipe_file):
    return one_step(Recipe.from_file(recipe_file), None)[1:]


@pytest.mark.parametrize(
    ("sharding", "mesh"),
    [
        pytest.param("tensor", {"tensor": 4}, marks=pytest.mark.slow),
        pytest.param("fsdp", {}, marks=pytest.mark.slow),
        ("fsdp_tensor", {}),
        pytest.param("data_tensor", {"tensor": 4}, marks=pytest.mark.slow),
        ("long", {"sequence": 4}),
    ],
)
def test_a_step_on_any_layout_is_that_of_one_device(on_one_device, recipe_file, sharding, mesh):
    recipe = Recipe.from_file(recipe_file)
    layout = read_layout(sharding, recipe.model_config, mesh=mesh)
    places, state, metrics = one_step(recipe, layout)
    assert jax.tree.map(lambda x: x.sharding, state) == places
    assert places.opt_state[1][0].mu == places.opt_state[1][0].nu == places.trainable
    # Moments, not parameters: AdamW's first step turns their every rounding into +-1.
    expected = on_one_device[0].opt_state[1][0], on_one_device[1]
    found = jax.device_get((state.opt_state[1][0], metrics))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-7)


def test_exports_what_it_trained(finished, recipe_file):
    recipe = Recipe.from_file(recipe_file)
    model, params, tokenizer = mistral_jax.load(finished / "checkpoint", dtype="bfloat16")
    state = final_state(finished, recipe)
    expected = jax.tree.map(lambda p: p.astype(model.dtype), state.trainable)
    chex.assert_trees_all_equal(params, expected)
    assert model.config == recipe.model_config
    assert tokenizer.vocab_size == recipe.model_config.vocab_size
    provenance = json.loads((finished / "checkpoint/config.json").read_text())["provenance"]
    assert Recipe.from_dict(provenance["recipe"]) == recipe
    assert provenance["step"] == 20


def test_writes_a_curve_that_falls(finished):
    entries = curve.read(finished / "curve.jsonl")
    assert [entry["step"] for entry in entries if "loss" in entry] == [*range(1, 21)]
    first, last = (entry["validation_loss"] for entry in entries if "loss" not in entry)
    assert last < first
    assert entries[-2]["loss"] < entries[0]["loss"]


def test_validates_with_the_mean_over_all_windows(finished, recipe_file):
    recipe = Recipe.from_file(recipe_file)
    model, _, _ = mistral_jax.load(finished / "checkpoint")
    params = final_state(finished, recipe).trainable
    tokens = np.load(finished / "data" / "validation.npy").astype(np.int32)
    losses = []
    for start in range(0, (len(tokens) - 1) // 24 * 24, 24):
        window = tokens[start : start + 25]
        logits, _ = tiny.forward(model, params, window[None, :-1], np.arange(24)[None])
        logprobs = jax.nn.log_softmax(logits[0])
        losses += [-float(logprobs[i, token]) for i, token in enumerate(window[1:])]
    entry = curve.read(finished / "curve.jsonl")[-1]
    np.testing.assert_allclose(entry["validation_loss"], np.mean(losses), rtol=1e-4)


@pytest.mark.slow
def test_a_finished_run_trained_longer_goes_on(finished, recipe_file, tmp_path):
    recipe = dataclasses.replace(Recipe.from_file(recipe_file), steps=30)
    longer = shutil.copytree(finished, tmp_path / "run")
    assert run.train(recipe, longer, lambda entry: None).stopped is None
    assert [step for step, _ in losses(longer)] == [*range(1, 31)]
    assert [p.name for p in sorted((longer / "states").iterdir())] == ["00000020", "00000030"]
    assert json.loads((longer / "checkpoint/config.json").read_text())["provenance"]["step"] == 30


@pytest.mark.slow
def test_losses_that_are_no_numbers_end_the_run(recipe_file, tmp_path):
    wild = {"learning_rate": 1e3, "weight_decay": 1e3}
    recipe = dataclasses.replace(Recipe.from_file(recipe_file), **wild)
    with pytest.raises(ValueError, match=r"of 10 steps in a row.* not finite .* below 1000"):
        run.train(recipe, tmp_path / "run", lambda entry: None)


def test_rows_beyond_the_memory_are_refused_before_anything_is_trained(recipe_file, tmp_path):
    recipe = dataclasses.replace(Recipe.from_file(recipe_file), rows=1 << 20, context=1 << 20)
    with pytest.raises(ValueError, match=r"1048576 rows .* need more than .* of this machine"):
        run.train(recipe, tmp_path / "run", lambda entry: None)


def test_another_recipe_is_refused(finished, recipe_file):
    recipe = dataclasses.replace(Recipe.from_file(recipe_file), learning_rate=1e-4)
    with pytest.raises(ValueError, match=r"holds a run with learning_rate = 0\.01"):
        run.train(recipe, finished, lambda entry: None)


def test_a_folder_of_something_else_is_refused(recipe_file, tmp_path):
    (tmp_path / "precious").touch()
    with pytest.raises(ValueError, match=r"exists and is no run: name another folder with --run$"):
        run.train(Recipe.from_file(recipe_file), tmp_path, lambda entry: None)
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_the_command_says_where_the_model_is_and_draws_the_curve(printed):
    path, output, errors = printed
    assert f"the model is in {path / 'checkpoint'}" in output.splitlines()
    assert output.splitlines()[-1].startswith("to use it: python -m mistral_jax.sample ")
    lines = errors.splitlines()
    assert [line.split("  ")[:2][0] for line in lines] == [
        "compiling the training step; the first step waits for it",
        "step 10",
        "step 10",
        "step 20",
        "step 20",
    ]
    assert lines[2].startswith("step 10  validation loss ")
    assert (path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "![loss](curve.png)" in (path / "report.md").read_text()


def test_a_curve_without_entries_is_drawn_too(tmp_path):
    curve.plot(tmp_path / "absent.jsonl", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 0


def test_a_terminal_gets_a_bar_and_every_validation(recipe_file, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def quick(recipe, path, report, *layout, **options):
        report({"step": 10, "loss": 5.0})
        report({"step": 10, "validation_loss": 4.5})
        return run.Outcome(signal.SIGTERM)

    monkeypatch.setattr(run, "train", quick)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    assert command(recipe_file, "--run", tmp_path / "run") == 0
    shown = sys.stderr.getvalue()
    assert "10/20" in shown
    assert "validation loss 4.5" in shown


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_the_command_says_how_to_go_on(recipe_file, tmp_path, capsys, monkeypatch, number, status):
    stopped = run.Outcome(stopped=number)
    monkeypatch.setattr(run, "train", lambda recipe, path, report, *layout, **options: stopped)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "x", "--set", "steps = 'a b'"])
    assert command(recipe_file, "--run", tmp_path / "run") == status
    out, err = capsys.readouterr()
    assert out == f"training tiny in {tmp_path / 'run'} (20 steps)\n"
    assert err.startswith("stopped and saved; the same command goes on: ")
    assert shlex.split(err)[-5:] == sys.orig_argv


def test_the_command_spreads_a_run(recipe_file, tmp_path, monkeypatch):
    layouts = []
    stopped = run.Outcome(signal.SIGTERM)
    monkeypatch.setattr(
        run, "train", lambda a, b, c, *layout, tell: layouts.append(layout) or stopped
    )
    run_folder = "--run", tmp_path / "run"
    assert command(recipe_file, *run_folder, "--sharding", "tensor", "--mesh", "tensor=2") == 0
    assert command(recipe_file, *run_folder) == 0
    assert layouts == [("tensor", {"tensor": 2}), (None, None)]


def test_the_command_puts_runs_under_runs(recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = []
    stopped = run.Outcome(signal.SIGTERM)
    monkeypatch.setattr(run, "train", lambda _, path, *rest, tell: paths.append(path) or stopped)
    command(recipe_file)
    assert paths == [Path("runs/tiny")]


def test_the_command_finds_a_recipe_by_its_name(recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").write_text("not the recipe")
    named = recipe_file.parent / "training" / "tiny.toml"
    named.parent.mkdir()
    shutil.copy(recipe_file, named)
    found = []
    stopped = run.Outcome(signal.SIGTERM)
    monkeypatch.setattr(run, "train", lambda *given, tell: found.append(given[:2]) or stopped)
    assert command("tiny") == 0
    assert command(recipe_file) == 0
    assert found == [(Recipe.from_file(recipe_file), Path("runs/tiny"))] * 2


def test_errors_are_one_line(recipe_file, tmp_path, capsys, monkeypatch):
    assert command(tmp_path / "absent.toml") == 2
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command(recipe_file, "--run", tmp_path / "run", "--plot") == 2
    assert not (tmp_path / "run").exists()
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: no recipe named ")
    assert "expected one of" in first
    assert second.startswith("error: no plot without matplotlib")


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        command("--help")
    text = capsys.readouterr().out
    assert all(option in text for option in ("--run", "--plot", "train nano"))


def test_an_epoch_reads_a_source_as_often_as_the_recipe_says(finished):
    tokens = np.load(finished / "data" / "train.npy")
    once, twice = np.split(tokens, 2)
    np.testing.assert_array_equal(once, twice)
    assert np.sum(tokens == 1) == 2 * len(corpus.split("any", SOURCE.files)[0])


@pytest.fixture
def trained(monkeypatch):
    """The recipes that the command would train by."""
    recipes = []

    def remember(recipe, *rest, **named):
        recipes.append(recipe)
        return run.Outcome(signal.SIGTERM)

    monkeypatch.setattr(run, "train", remember)
    return recipes


def test_the_command_line_overrides_the_recipe(trained, tmp_path):
    file = tmp_path / "r.toml"
    file.write_text("context = 8\nrows = 2\nlearning_rate = 1e-3\nepochs = 1\n[lora]\nrank = 4\n")
    options = "--checkpoint", "base", "--data", "a", "b", "--validation", "c", "--skip-bad"
    settings = "steps=7", "lora.rank=9", "optimizer=lion", "lora.targets=['q_proj']"
    command(file, *options, *(part for setting in settings for part in ("--set", setting)))
    (recipe,) = trained
    assert recipe.checkpoint == "base"
    assert recipe.data == Data(train=("a", "b"), validation=("c",), skip_bad=True)
    assert (recipe.steps, recipe.epochs, recipe.optimizer) == (7, None, "lion")
    assert recipe.lora == Lora(rank=9, targets=("q_proj",))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (".".join("abc" * 2000) + "=1", "unknown key 'a'"),
        ("lora=3", "lora is 3; expected a table"),
        ("data.train=[1]", "data.train is (1,); expected a list of strings"),
        ("rows=" + "9" * 6000, "rows is '999"),
        ("context=1e999", "context is inf; expected an integer"),
        ("=3", "'=3' is not KEY=VALUE"),
        ("steps=" + "[" * 50_000, "steps is nested too deeply"),
        ("optimizer_options.eps=2020-01-01", "optimizer_options.eps is datetime.date"),
    ],
)
def test_a_hostile_setting_is_refused_before_anything_is_done(
    recipe_file, tmp_path, capsys, setting, message
):
    options = "--run", tmp_path / "run", "--set", setting
    with contextlib.suppress(SystemExit):
        assert command(recipe_file, *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_setting_that_is_none_is_refused(recipe_file, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(recipe_file, "--set", "steps")
    assert command(recipe_file, "--set", "steps.x=1") == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "'steps' is not KEY=VALUE, such as epochs=2" in first
    assert second == "error: --set steps.x: steps is no table"


def test_a_preview_shows_what_is_learnt_and_trains_nothing(trained, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"prompt": "def f(", "completion": "x):"}\n' * 3)
    file = tmp_path / "r.toml"
    file.write_text("context = 8\nrows = 2\nlearning_rate = 1e-3\nepochs = 1\n")
    assert command(file, "--data", tmp_path / "a.jsonl", "--preview", "2") == 0
    shown = capsys.readouterr().out
    assert shown.count("def f(") == 2
    assert "⟦x):" in shown
    assert not trained
    for text, message in (("", "there are no examples in"), ("[]\n", "all records are bad, 1")):
        (tmp_path / "b.jsonl").write_text(text)
        assert command(file, "--data", tmp_path / "b.jsonl", "--skip-bad", "--preview", "1") == 2
        assert message in capsys.readouterr().err
    assert command(config.CHECKOUT / "configs/training/nano.toml", "--preview", "1") == 2
    assert "trains on a corpus" in capsys.readouterr().err
