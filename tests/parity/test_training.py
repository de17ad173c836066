"""Live parity of training: beside PyTorch's AdamW on Transformers' Mistral, and on PEFT's adapters.

Losses agree to 1e-5 at every step, ten times what rounding leaves. What was trained agrees to a
thousandth of how far it has moved: Adam divides by the size of gradients, and so the rounding of
those that are nearly zero counts for more.
"""

import json
from pathlib import Path

import hf_reference
import hf_training
import jax
import numpy as np
import peft
import pytest
import reference
import tiny
import torch
import training_case as case
from flax.traverse_util import flatten_dict, unflatten_dict

import mistral_jax
from mistral_jax.checkpoint import adapters, checkpoint, names
from mistral_jax.checkpoint.lora import PROJECTIONS, Lora, attach, init_adapters
from mistral_jax.training import curve, finetuning, run
from mistral_jax.training.data import packing
from mistral_jax.training.data.records import Example
from mistral_jax.training.loss import IGNORED, make_loss_fn, make_preference_loss_fn
from mistral_jax.training.recipe import Data, Recipe
from mistral_jax.training.step import Batch

TOLERANCE, MOVED = 1e-5, 1e-3
LORAS = {
    "attention": Lora(rank=4, alpha=8.0, targets=("q_proj", "v_proj")),
    "rslora of all": Lora(rank=8, alpha=4.0, rslora=True),
    "the output too": Lora(rank=2, alpha=6.0, targets=("k_proj", "o_proj", "up_proj", "lm_head")),
}


@pytest.fixture(autouse=True)
def one_thread():
    """More of them cost tiny products time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tensors(seed):
    return reference.random_tensors(case.CONFIG, seed)


def assert_same(found, expected, start, bound=MOVED, rounded=False):
    """Compares what was trained by how far it is from where it began.

    What was `rounded` to bfloat16 may be off by half a unit in the last of its eight places more.
    """
    found, expected, start = (flatten_dict(x, sep="/") for x in (found, expected, start))
    assert found.keys() == expected.keys()
    for path, array in found.items():
        error = np.abs(array - expected[path])
        if rounded:
            error = error - 2.0 ** (np.frexp(expected[path])[1] - 9)
        moved = np.abs(expected[path] - start[path]).max()
        assert error.max() <= bound * moved, f"{path}: {error.max()} of {moved}"


def assert_learnt(losses):
    """Each batch has a loss of its own: the last few are compared with the first few."""
    assert np.mean(losses[-4:]) < 0.95 * np.mean(losses[:4])


def tree_of(config, state):
    """Puts arrays by Hugging Face's names into our tree."""
    found = {}
    for row in names.weights(config):
        array = np.asarray(state[row.name(official=False)].detach())
        found[row.path] = row.from_file(array, config, official=False)
    return unflatten_dict(found, sep="/")


def beside(lora):
    return lambda trainable, frozen: attach(frozen, trainable, lora.scale)


def with_peft(tensors, config, lora, made, folder):
    """Returns PEFT's model with the adapters that ours begins with."""
    adapters.save(folder, config, lora, made)
    base = hf_reference.build(case.CONFIG, tensors)
    return peft.PeftModel.from_pretrained(base, folder, is_trainable=True)


def test_all_parameters(tensors, seed):
    model, params = tiny.from_official(case.CONFIG, tensors)
    batches = case.batches(seed)
    losses, trained = case.train(make_loss_fn(model), params, {}, batches)
    theirs = hf_reference.build(case.CONFIG, tensors).train()
    expected = hf_training.train(
        theirs, batches, case.rates(), **case.ADAMW, microbatches=case.MICROBATCHES
    )
    assert_learnt(losses)
    np.testing.assert_allclose(losses, expected, rtol=TOLERANCE)
    assert_same(trained, tree_of(model.config, theirs.state_dict()), params)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize("kind", LORAS)
def test_adapters(tensors, seed, kind, tmp_path):
    lora = LORAS[kind]
    model, params = tiny.from_official(case.CONFIG, tensors)
    made, batches = init_adapters(lora, params, jax.random.key(seed)), case.batches(seed)
    losses, trained = case.train(make_loss_fn(model, beside(lora)), made, params, batches)
    theirs = with_peft(tensors, model.config, lora, made, tmp_path / "ours").train()
    expected = hf_training.train(
        theirs, batches, case.rates(), **case.ADAMW, microbatches=case.MICROBATCHES
    )
    assert_learnt(losses)
    np.testing.assert_allclose(losses, expected, rtol=TOLERANCE)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(trained, adapters.read(tmp_path / "theirs", model.config)[1], made)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_preferences(tensors, seed, tmp_path):
    """The reference is the base: PEFT's model with its adapters switched off."""
    lora, beta, steps = Lora(rank=4, alpha=8.0, targets=PROJECTIONS), 0.3, 8
    model, params = tiny.from_official(case.CONFIG, tensors)
    made = init_adapters(lora, params, jax.random.key(seed))
    batches = [
        Batch(*(x.reshape(4, 2, -1) for x in (each.tokens, each.positions, each.targets)))
        for each in case.batches(seed, steps, rows=8)
    ]
    loss_fn = make_preference_loss_fn(model, beside(lora), beta)
    losses, trained = case.train(loss_fn, made, params, batches)
    theirs = with_peft(tensors, model.config, lora, made, tmp_path / "ours").train()
    expected = hf_training.train(
        theirs,
        batches,
        case.rates(steps),
        **case.ADAMW,
        microbatches=case.MICROBATCHES,
        loss_fn=hf_training.preference(beta),
    )
    assert losses[0] == pytest.approx(np.log(2))
    assert_learnt(losses)
    np.testing.assert_allclose(losses, expected, rtol=TOLERANCE)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(trained, adapters.read(tmp_path / "theirs", model.config)[1], made)


def test_packed_rows_have_the_gradients_of_a_text_a_row(tensors, seed, tmp_path):
    rng = np.random.default_rng(seed)
    texts = [rng.integers(case.CONFIG["vocab_size"], size=n) for n in (24, 9, 2, 14, 6, 17)]
    learnt = [rng.random(len(text)) < 0.7 for text in texts]
    examples = [
        Example(text.astype(np.int32), chosen.astype(np.float32))
        for text, chosen in zip(texts, learnt, strict=True)
    ]
    summary = packing.write_rows(tmp_path / "rows", examples, 30)
    assert summary.rows < len(texts) == summary.examples
    packed = packing.PackedRows(tmp_path / "rows")
    fields = ("tokens", "positions", "targets", "weights")
    batch = Batch(*(np.stack([row[name] for row in packed]) for name in fields))
    model, params = tiny.from_official(case.CONFIG, tensors)
    differentiate = jax.jit(jax.value_and_grad(make_loss_fn(model), has_aux=True))
    (loss, sums), grads = differentiate(params, {}, batch, None)

    theirs = hf_reference.build(case.CONFIG, tensors).train()
    expected, count = 0.0, 0
    for text, chosen in zip(texts, learnt, strict=True):
        alone = Batch(
            tokens=text[None, :-1],
            positions=np.arange(len(text) - 1)[None],
            targets=np.where(chosen, text, IGNORED)[None, 1:],
        )
        part, targets = hf_training.cross_entropy(theirs, alone)
        part.backward()
        expected, count = expected + part.item(), count + targets
    assert sums["targets"] == count
    np.testing.assert_allclose(loss, expected, rtol=TOLERANCE)
    theirs_grads = {name: p.grad for name, p in theirs.named_parameters()}
    zeros = jax.tree.map(np.zeros_like, params)
    assert_same(grads, tree_of(model.config, theirs_grads), zeros, TOLERANCE)


def test_a_run_from_a_file_to_a_checkpoint(seed, tmp_path, monkeypatch):
    """By its recipe: its rows in its order, its rates, and the checkpoint that it exports."""
    vocab_size = mistral_jax.load()[0].config.vocab_size
    config = case.CONFIG | {"vocab_size": vocab_size}
    tensors = reference.random_tensors(config, seed)
    model, params = tiny.from_official(config, tensors)
    base = tmp_path / "base"
    checkpoint.save(base, model.config, params, checkpoint.BUNDLED / "tokenizer.model")
    lines = Path(__file__).read_text().split("\n\n")
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    # Most of the many embeddings have small gradients: an epsilon well above their rounding.
    adamw = case.ADAMW | {"eps": 1e-5}
    recipe = Recipe(
        context=48,
        rows=4,
        microbatches=2,
        steps=case.STEPS,
        checkpoint=str(base),
        data=Data(train=(str(file),), pack=False),
        dtype="float32",
        seed=seed,
        beta1=adamw["b1"],
        beta2=adamw["b2"],
        weight_decay=adamw["weight_decay"],
        clip_norm=adamw["clip_norm"],
        optimizer_options={"eps": adamw["eps"]},
        **case.RATES,
    )
    outcome = run.train(recipe, tmp_path / "run", lambda entry: None)
    losses = [loss for _, loss in curve.points(curve.read(tmp_path / "run/curve.jsonl"), "loss")]
    batches = list(finetuning.make_job(recipe, tmp_path / "run").feed(range(case.STEPS)))
    theirs = hf_reference.build(config, tensors).train()
    expected = hf_training.train(
        theirs, batches, case.rates(), **adamw, microbatches=recipe.microbatches
    )
    assert_learnt(losses)
    np.testing.assert_allclose(losses, expected, rtol=TOLERANCE)
    exported = mistral_jax.load(outcome.result, dtype="float32")[1]
    assert_same(exported, tree_of(model.config, theirs.state_dict()), params, rounded=True)
