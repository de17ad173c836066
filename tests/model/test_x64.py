"""JAX_ENABLE_X64 changes no number: neither what a seed draws nor what is computed."""

import subprocess
import sys
from pathlib import Path

import processes
import pytest

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np, optax, tiny
from mistral_jax import Sampling, generate
from mistral_jax.checkpoint import quantization
from mistral_jax.engine import prefill
from mistral_jax.engine.score import likelihoods
from mistral_jax.checkpoint.lora import Lora, attach, init_adapters
from mistral_jax.training.loss import make_loss_fn
from mistral_jax.training.pretraining import initial_params
from mistral_jax.training.states import create_state
from mistral_jax.training.step import Batch, make_train_step

def show(name, tree):
    for x in jax.tree.leaves(tree):
        print(name, np.asarray(x).dtype, np.asarray(x).tolist())

jax.config.update("jax_platforms", "cpu")
prefill.CHUNK = 16
rows = [[3, 1, 4, 1, 5], list(range(40))]
samplings = Sampling(1.0, seed=7), Sampling(0.9, top_k=9, top_p=0.8, min_p=0.01, seed=2**32 - 1,
    repetition_penalty=1.2, presence_penalty=0.1, frequency_penalty=0.1, logit_bias={3: 1.0})
model, params = tiny.build(sliding_window=[5, None])
copied = jax.tree.map(jnp.copy, params)
rounded = quantization.quantize(copied, "int8", quantization.matrices(params, output=True))
for clone, weights in ((model, params), (model.clone(kv_cache_dtype="int8"), rounded)):
    for one in samplings:
        for row in generate(clone, weights, rows, 12, sampling=one, stop_ids=(), top_logprobs=2):
            show("text", [row.tokens, row.logprobs])
    show("score", [list(pair) for pair in likelihoods(clone, weights, rows, 2)])
show("rounded", rounded)
show("params", initial_params(model, 2**32 - 1))
lora = Lora(rank=2)
adapters = init_adapters(lora, params, jax.random.key(5))
model = model.clone(dropout=0.5)
loss_fn = make_loss_fn(model, lambda adapters, params: attach(params, adapters, 2.0))
step = make_train_step(loss_fn, optax.sgd(0.5), 2, seed=9)
state = create_state(optax.sgd(0.5), adapters, params)
tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
batch = Batch(tokens, np.arange(12, dtype=np.int32)[None].repeat(2, 0), (tokens + 1) % 53)
for _ in range(3):
    state, metrics = step(state, batch)
    show("step", metrics)
show("adapters", state.trainable)
"""


def printed(wide):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[1],
        env=processes.environment() | {"JAX_ENABLE_X64": str(wide)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.mark.slow
def test_numbers_of_64_bits_change_nothing():
    plain, wide = printed(0), printed(1)
    assert len(plain) == len(wide) > 50
    for one, other in zip(plain, wide, strict=True):
        assert one == other
