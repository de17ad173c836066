"""Two processes with four devices each do what one does, and end together."""

import json
import shutil
import signal

import jax
import numpy as np
import processes
import pytest
import tiny
from processes import together

import mistral_jax as mj
from mistral_jax import config
from mistral_jax.checkpoint import checkpoint, zarr
from mistral_jax.parallel import distributed
from mistral_jax.training import curve

MODEL = """
vocab_size = 304
num_layers = 1
embed_dim = 32
mlp_dim = 48
num_heads = 8
num_kv_heads = 2
head_dim = 8
rope_theta = 1e4
sliding_window = 8
"""
RECIPE = """
model = "tiny"
corpus = { Any = 1 }
context = 24
rows = 3
steps = 20
warmup_steps = 2
learning_rate = 1e-2
final_learning_rate = 1e-3
validate_every = 10
save_every = 10
"""
PROGRAM = processes.__file__


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a tiny model."""
    model, params = tiny.build(vocab_size=96, n_heads=8, n_kv_heads=2, hidden_dim=48)
    path = tmp_path_factory.mktemp("saved") / "checkpoint"
    checkpoint.save(path, model.config, params)
    return path


@pytest.fixture(scope="module")
def on_one_device(saved, tmp_path_factory):
    return processes.work(saved, tmp_path_factory.mktemp("one") / "again", None, "null")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharding", "mesh"), [("tensor", {}), ("fsdp_tensor", {}), ("data_tensor", {"tensor": 4})]
)
def test_two_processes_compute_what_one_does(saved, on_one_device, tmp_path, sharding, mesh):
    """Load, generate, sample, score, and save again, over all eight devices."""
    again = tmp_path / "again"
    first, second = together(PROGRAM, "work", saved, again, sharding, json.dumps(mesh))
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert (second.out, second.err) == ("", "")
    found = json.loads(first.out)
    assert found["tokens"] == on_one_device["tokens"]
    np.testing.assert_allclose(found["logprobs"], on_one_device["logprobs"], atol=1e-5)
    assert found["score"] == pytest.approx(on_one_device["score"], rel=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (mj.load(again)[1], mj.load(saved)[1])), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["tensor", "fsdp"])
def test_each_process_reads_its_own_part(tmp_path, monkeypatch, sharding):
    """The files that hold a part of it are little more than it, and it reads no others."""
    chunk = 8 << 10
    monkeypatch.setattr(zarr, "_CHUNK_BYTES", chunk)
    fields = {"dim": 512, "hidden_dim": 1024, "vocab_size": 4096, "n_heads": 16, "n_kv_heads": 8}
    model, params = tiny.build(**fields, head_dim=32)
    checkpoint.save(tmp_path / "x", model.config, params)
    first, second = together(PROGRAM, "bytes", tmp_path / "x", sharding)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    found = json.loads(first.out)
    leaves = jax.tree.leaves(params)
    total = sum(leaf.nbytes for leaf in leaves)
    slack = len(leaves) * 4 * chunk
    counts = (found[name] for name in ("own", "files", "alone", "read"))
    for own, files, alone, read in zip(*counts, strict=True):
        assert total / 2 <= own < 0.51 * total
        assert own <= files < own + slack
        assert files <= read < alone + slack < 0.75 * total


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """A folder of configs with a recipe of 20 steps."""
    folder = tmp_path_factory.mktemp("configs")
    shutil.copytree(config.CONFIG_DIR / "sharding", folder / "sharding")
    (folder / "models").mkdir()
    (folder / "models" / "tiny.toml").write_text(MODEL)
    (folder / "tiny.toml").write_text(RECIPE)
    return folder


def train(configs, run, *options, process=None, number=0, count=2, devices=4):
    """Trains by the recipe; in step 13 a process gets a signal."""
    arguments = "train", configs, process, number, configs / "tiny.toml", "--run", run, *options
    return together(PROGRAM, *arguments, count=count, devices=devices)


@pytest.fixture(scope="module")
def losses_of_one(configs, tmp_path_factory):
    """The losses by step of a run of one process with one device."""
    run = tmp_path_factory.mktemp("runs") / "one"
    (alone,) = train(configs, run, count=1, devices=1)
    assert alone.status == 0, alone.err
    return losses(run)


def losses(run):
    return {
        (entry["step"], name): entry[name]
        for entry in curve.read(run / "curve.jsonl")
        for name in ("loss", "validation_loss")
        if name in entry
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dies", "before", "after"), [(0, "fsdp_tensor", "tensor"), (1, "fsdp", "data_tensor")]
)
def test_a_process_that_dies_ends_the_other_and_the_run_goes_on(
    configs, losses_of_one, tmp_path, dies, before, after
):
    """Under another layout, from the last saved state, to the losses of one device."""
    run = tmp_path / "run"
    ends = train(configs, run, "--sharding", before, process=dies, number=signal.SIGKILL.value)
    assert ends[dies].status == -9
    survivor = ends[1 - dies]
    assert survivor.status not in (0, -9)
    assert "another process ended" in survivor.err or "another task died" in survivor.err
    assert [state.name for state in (run / "states").iterdir()] == ["00000010"]

    first, second = train(configs, run, "--sharding", after)
    assert (first.status, second) == (0, (0, "", "")), first.err + second.err
    assert f"the model is in {run / 'checkpoint'}" in first.out.splitlines()
    assert losses(run) == pytest.approx(losses_of_one, rel=1e-4)
    assert len(losses_of_one) == 20 + 2
    assert mj.load(run / "checkpoint")[0].config.vocab_size == 304


@pytest.mark.slow
def test_a_run_that_one_process_is_told_to_stop_is_saved_by_all(configs, tmp_path):
    options = "--sharding", "fsdp"
    ends = train(configs, tmp_path, *options, process=1, number=signal.SIGTERM.value)
    assert [end.status for end in ends] == [0, 0], ends
    assert "stopped and saved; the same command goes on" in ends[0].err
    assert {state.name for state in (tmp_path / "states").iterdir()} == {"00000010", "00000014"}


@pytest.mark.slow
def test_the_command_reads_and_prints_in_the_first_process_alone():
    arguments = "--temperature", "0", "--max-tokens", "12"
    command = "-m", "mistral_jax.sample", "-", *arguments
    (alone,) = together(*command, count=1, devices=1, stdin="def f(x):\n")
    first, second = together(*command, "--sharding", "data_tensor", stdin="def f(x):\n")
    assert alone == (0, alone.out, "")
    assert len(alone.out) > 20
    assert first == alone
    assert second == (0, "", "")


@pytest.mark.slow
def test_a_conversation_is_held_by_the_first_process():
    command = "-m", "mistral_jax.sample", "--chat", "--max-tokens", "4", "--sharding", "data_tensor"
    first, second = together(*command, stdin="hello\n/reset\nagain\n/exit\n")
    assert (first.status, second) == (0, (0, "", "")), first.err
    assert first.out.count("\n") >= 2


@pytest.mark.slow
def test_a_conversion_is_made_once(tmp_path):
    convert = "-m", "mistral_jax.convert"
    for command in (
        ("to-torch", checkpoint.BUNDLED, tmp_path / "hf"),
        ("to-orbax", tmp_path / "hf", tmp_path / "orbax"),
    ):
        first, second = together(*convert, *command)
        assert (first.status, second) == (0, (0, "", "")), first.err
    equal = map(jax.tree.leaves, (mj.load(tmp_path / "orbax")[1], mj.load()[1]))
    for a, b in zip(*equal, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_the_others_wait_for_the_first_as_long_as_it_takes():
    first, second = together(PROGRAM, "late")
    assert (first, second) == ((0, "7\n", ""), (0, "", ""))


@pytest.mark.slow
def test_a_signal_ends_all(tmp_path):
    """SIGTERM, a scheduler's way to end a job, which JAX's runtime would keep to itself."""
    ends = together(PROGRAM, "wait", tmp_path, signal_once=lambda: len([*tmp_path.iterdir()]) == 2)
    assert [end.status for end in ends] == [-signal.SIGTERM] * 2


@pytest.mark.slow
def test_an_error_of_all_ends_all_with_its_sentence(tmp_path):
    command = "-m", "mistral_jax.sample", "x", "--sharding", "tensor"
    ends = together(*command, "--checkpoint", tmp_path / "absent")
    for index, end in enumerate(ends):
        assert (end.status, end.out) == (2, "")
        assert end.err.startswith(f"error: process {index} of 2: {tmp_path / 'absent'} is no fold")
        assert end.err.count("\n") == 1


@pytest.mark.slow
def test_prompts_that_cannot_be_read_end_all():
    ends = together("-m", "mistral_jax.sample", "--sharding", "tensor")
    assert [end.status for end in ends] == [2, 2]
    assert all("there is no prompt" in end.err for end in ends)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "there are 2 processes and no sharding that spreads the model over their devices"),
        (("--sharding", "single"), "lays a mesh over 1 of 8 devices, which leaves some of the 2"),
    ],
)
def test_a_layout_that_leaves_a_process_without_work_is_refused(options, message):
    for end in together("-m", "mistral_jax.sample", "x", *options):
        assert end.status == 2
        assert message in end.err


@pytest.mark.parametrize(
    ("address", "count", "index", "message"),
    [
        ("host:1", "2", None, "JAX_NUM_PROCESSES'] are set; set all three"),
        ("host:1", "2", "2", "JAX_PROCESS_ID '2'; expected whole numbers"),
        ("host:1", "two", "0", "JAX_NUM_PROCESSES is 'two'"),
        ("host", "2", "0", "expected host:port"),
    ],
)
def test_variables_that_do_not_fit_are_named(monkeypatch, address, count, index, message):
    for name, value in zip(
        (distributed.ADDRESS, distributed.COUNT, distributed.INDEX),
        (address, count, index),
        strict=True,
    ):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        distributed.initialize()
    assert message in str(error.value)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_NTASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
    ],
)
def test_one_process_has_nothing_to_initialise(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    distributed.initialize()
    assert (distributed.count(), distributed.is_first()) == (1, True)
    assert distributed.from_first(lambda: 7) == 7
    assert distributed.any_of(True)
    assert not distributed.any_of(False)


def test_a_launcher_of_several_is_joined_and_a_pod_where_asked(monkeypatch):
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: joined.append((a, k)))
    distributed.initialize(pods=False)  # A conversion on one host of a pod is alone.
    assert joined == []
    as_launched = ((), {"heartbeat_timeout_seconds": distributed.HEARTBEAT_SECONDS})
    distributed.initialize()
    assert joined == [as_launched]
    monkeypatch.setenv("SLURM_NTASKS", "2")
    distributed.initialize(pods=False)
    assert joined == [as_launched] * 2
