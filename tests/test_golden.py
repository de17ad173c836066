"""Golden parity: two independent references, Transformers in float32 and NumPy in float64.

The bound is 1e-5 of the largest logit. Float32 sums of a few dozen terms leave some 1e-6, which is
also how far apart the references stand; a wrong window, base, layout or epsilon moves logits by far
more.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny

import mistral_jax

CASES = sorted((Path(__file__).parent / "golden").glob("*.npz"))
TOLERANCE = 1e-5


@pytest.fixture(params=CASES, ids=lambda path: path.stem)
def golden(request):
    with np.load(request.param) as file:
        arrays = dict(file)
    about = json.loads(str(arrays["about"]))
    tensors = reference.random_tensors(about["config"], about["seed"], about["tied"])
    return about["config"], tensors, arrays


def test_every_prompt_has_the_logits_of_both_references(golden):
    config, tensors, arrays = golden
    model, params = tiny.from_official(config, tensors)
    prompts = [arrays[name] for name in arrays if name.startswith("tokens_")]
    assert len(prompts) == 5
    ours = tiny.forward(model, params, *tiny.ragged(prompts))[0]
    assert ours.dtype == jnp.float32
    for row, prompt in zip(ours, prompts, strict=True):
        for theirs in (
            arrays[f"logits_{len(prompt)}"],
            reference.forward(config, tensors, prompt),
        ):
            error = np.abs(row[: len(prompt)] - theirs).max()
            assert error <= TOLERANCE * np.abs(theirs).max(), f"{len(prompt)} tokens"


def test_greedy_continuation_is_that_of_transformers(golden):
    config, tensors, arrays = golden
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
