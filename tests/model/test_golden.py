"""Golden parity: two independent references, Transformers in float32 and NumPy in float64.

And a short training in PyTorch. The bound is 1e-5 of the largest logit, or of each step's loss.
Float32 sums of a few dozen terms leave some 1e-6, which is also how far apart the references stand;
a wrong window, base, layout or epsilon moves logits by far more.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import reference
import tiny
import training_case

import mistral_jax
from mistral_jax.training.loss import make_loss_fn

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(GOLDEN.glob("*.npz"))
TOLERANCE = 1e-5
# Cases from which the fast tests generate; in the others they look at the logits of the text.
GENERATED = {"windows_by_layer", "yarn_scaled_tied"}


@pytest.fixture(params=CASES, ids=lambda path: path.stem)
def golden(request):
    return read(request.param)


def read(path):
    with np.load(path) as file:
        arrays = dict(file)
    about = json.loads(str(arrays["about"]))
    tensors = reference.random_tensors(about["config"], about["seed"], about["tied"])
    return about["config"], tensors, arrays


def test_every_prompt_has_the_logits_of_both_references(golden):
    config, tensors, arrays = golden
    model, params = tiny.from_official(config, tensors)
    prompts = [arrays[name] for name in arrays if name.startswith("tokens_")]
    assert len(prompts) == 5
    greedy = arrays["greedy"].tolist()
    text = [*max(prompts, key=len), *greedy]
    ours = np.asarray(tiny.forward(model, params, *tiny.ragged([*prompts, text]))[0])
    assert ours.dtype == np.float32
    for row, prompt in zip(ours[:-1], prompts, strict=True):
        for theirs in (
            arrays[f"logits_{len(prompt)}"],
            reference.forward(config, tensors, prompt),
        ):
            error = np.abs(row[: len(prompt)] - theirs).max()
            assert error <= TOLERANCE * np.abs(theirs).max(), f"{len(prompt)} tokens"
    # And the likeliest token at each place of Transformers' greedy text is the next one.
    assert ours[-1, len(text) - len(greedy) - 1 : len(text) - 1].argmax(-1).tolist() == greedy


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=() if path.stem in GENERATED else pytest.mark.slow, id=path.stem)
        for path in CASES
    ],
)
def test_greedy_continuation_is_that_of_transformers(path):
    config, tensors, arrays = read(path)
    model, params = tiny.from_official(config, tensors)
    prompt = max((arrays[name] for name in arrays if name.startswith("tokens_")), key=len)
    expected = arrays["greedy"].tolist()
    (completion,) = mistral_jax.generate(
        model,
        params,
        [prompt.tolist()],
        len(expected),
        sampling=mistral_jax.Sampling(temperature=0.0),
        stop_ids=(),
    )
    assert completion.tokens == expected


def test_training_has_the_losses_of_pytorch_at_every_step():
    """Rounding leaves 1e-6; a wrong order, rate, decay or mean of microbatches far more."""
    golden = json.loads((GOLDEN / "training_curve.json").read_text())
    tensors = reference.random_tensors(training_case.CONFIG, golden["seed"])
    model, params = tiny.from_official(training_case.CONFIG, tensors)
    batches = training_case.batches(golden["seed"])
    losses, _ = training_case.train(make_loss_fn(model), params, {}, batches)
    assert losses[-1] < 0.5 * losses[0]
    np.testing.assert_allclose(losses, golden["losses"], rtol=TOLERANCE)
