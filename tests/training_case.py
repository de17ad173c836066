"""A short training run in plain values: model, batches, optimizer and learning rates.

`hf_training.py` runs it in PyTorch, and `train` runs it with our training.
"""

import math

import jax
import numpy as np

from mistral_jax.training.loss import IGNORED
from mistral_jax.training.optimizers import make_optimizer, make_schedule
from mistral_jax.training.states import create_state
from mistral_jax.training.step import Batch, make_train_step

# Grouped queries, heads whose total width is not dim, and a window far shorter than a row.
CONFIG = {
    "dim": 32,
    "n_layers": 2,
    "head_dim": 10,
    "hidden_dim": 44,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 57,
    "rope_theta": 1e4,
    "sliding_window": 5,
}
STEPS, MICROBATCHES = 20, 2
RATES = {"warmup_steps": 4, "learning_rate": 1e-2, "final_learning_rate": 1e-3}
# A larger epsilon than usual: Adam divides by the size of a gradient, which magnifies the rounding
# errors of gradients near zero. It is small compared with other gradients, and equal in all runs.
ADAMW = {"b1": 0.9, "b2": 0.95, "eps": 1e-6, "weight_decay": 0.1, "clip_norm": 1.0}


def batches(seed: int, steps: int = STEPS, rows: int = 4, length: int = 24) -> list[Batch]:
    """Returns two batches of ragged rows in turns, whose microbatches have unequal target counts.

    With only two batches, the loss falls within a few steps.
    """
    rng = np.random.default_rng(seed)
    both = []
    for _ in range(2):
        lengths = rng.integers(length // 2, length + 1, rows)
        places = np.arange(length)
        inside = places < lengths[:, None]
        ids = rng.integers(CONFIG["vocab_size"], size=(rows, length + 1))
        learnt = inside & (rng.random((rows, length)) < 0.8)
        learnt[: rows // 2, 3:] = False
        both.append(
            Batch(
                tokens=np.where(inside, ids[:, :-1], 0).astype(np.int32),
                positions=np.where(inside, places, -1).astype(np.int32),
                targets=np.where(learnt, ids[:, 1:], IGNORED).astype(np.int32),
            )
        )
    return [both[step % 2] for step in range(steps)]


def rates(steps: int = STEPS) -> list[float]:
    """Returns the learning rate of each step, by formula: linear warmup, then half a cosine."""
    peak, end, rise = RATES["learning_rate"], RATES["final_learning_rate"], RATES["warmup_steps"]
    down = [(step - rise) / (steps - rise) for step in range(steps)]
    return [
        peak * step / rise
        if step < rise
        else end + (peak - end) * (1 + math.cos(math.pi * down[step])) / 2
        for step in range(steps)
    ]


def train(loss_fn, trainable, frozen, batches, microbatches: int = MICROBATCHES, **optimizer):
    """Trains with our training step; returns the loss of each step, and the trained parameters."""
    schedule = make_schedule("cosine", len(batches), **RATES)
    optimizer = make_optimizer("adamw", schedule, **ADAMW | optimizer)
    step = make_train_step(loss_fn, optimizer, microbatches)
    copies = (jax.tree.map(lambda x: x.copy(), tree) for tree in (trainable, frozen))
    state, losses = create_state(optimizer, *copies), []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, state.trainable
