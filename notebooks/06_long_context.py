# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Long context
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mistral-jax/mistral_jax/blob/main/notebooks/06_long_context.ipynb)
#
# A model with a sliding window looks at the last W tokens in each layer, however long its text
# is. So its cache stops growing, a token costs the same at any place, and a prompt costs as much
# as it is long. You will measure all three, with the same weights run with a window and without,
# and see what the window does to the loss.

# %%
# On Colab this installs the package; where it is installed already, it does nothing.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("mistral_jax") is None:
    source = "mistral-jax-flax[hub,train] @ git+https://github.com/mistral-jax/mistral_jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)

# %%
import dataclasses
import functools
import statistics
import sysconfig
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from mistral_jax.convert.prepare import prepare
from rich.filesize import decimal

import mistral_jax as mj
from mistral_jax.config import ModelConfig
from mistral_jax.evaluation.perplexity import row_losses
from mistral_jax.evaluation.positions import by_position, turns
from mistral_jax.generation.prefill import CHUNK
from mistral_jax.model.cache import write

# The bundled model; or a checkpoint's folder, or a name on the Hub: "mistralai/Mistral-7B-v0.1".
MODEL = None

model, params, tokenizer = mj.load(prepare(MODEL))

# %% [markdown]
# The window is a number of the model's config, and no weight depends on it. So two models can
# share one set of weights: one with the window, one without. A model that was trained without
# one, such as v0.3, gets a window of an eighth of its positions here, which is v0.1's.

# %%
L = model.config.num_layers
W = next((window for window in model.config.windows if window), model.config.max_positions // 8)
windowed = model.clone(config=dataclasses.replace(model.config, sliding_window=W))
unwindowed = model.clone(config=dataclasses.replace(model.config, sliding_window=None))
BOTH = {f"window of {W:,}": windowed, "no window": unwindowed}
STYLES = dict(zip(BOTH, ({"ls": "-", "marker": "o"}, {"ls": "--", "marker": "s"}), strict=True))

print(f"{L} layers; the window is {model.config.sliding_window} as trained, and {W} or none here")
print("device:", jax.devices()[0].device_kind)

# %% [markdown]
# ## The cache is a ring
#
# To write the next token, a layer needs the keys and values of the tokens that it may look at.
# With a window of W these are never more than W, so the cache has W slots, and token p lies in
# slot p mod W ([Mistral 7B](https://arxiv.org/abs/2310.06825), section 2, "Rolling Buffer
# Cache"). Here is a ring of 4 slots that reads a text in chunks of 3 tokens. The numbers are the
# tokens' positions.

# %%
tiny = dataclasses.replace(model.config, num_layers=1, sliding_window=4)
(ring,) = mj.init_cache(tiny, batch_size=1, length=12)
for start in range(0, 12, 3):
    positions = jnp.arange(start, start + 3)[None]
    nothing = jnp.zeros((1, 3, *ring.k.shape[2:]))  # where tokens lie does not depend on their keys
    ring = write(ring, nothing, nothing, positions)
    print("chunk", positions[0], "-> slots", ring.positions[0])

# %% [markdown]
# ## What the cache takes
#
# Keys and values take 2 L K H numbers a token: K key-value heads of width H in each of L layers.
# On the left, the bytes of caches that were really made. On the right, Mistral 7B in bfloat16:
# `jax.eval_shape` gives the shapes of what a function would return, and allocates nothing.

# %%
SIZES = [model.config.max_positions // 2**i for i in reversed(range(9))]


def cache_bytes(config, length, dtype, run=lambda function: function()):
    """Counts the bytes of a cache for one row."""
    cache = run(lambda: mj.init_cache(config, 1, length, dtype))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


made = {
    label: [cache_bytes(each.config, length, each.dtype) for length in SIZES]
    for label, each in BOTH.items()
}
planned = {}
for version in ("v0.1", "v0.3"):
    config = ModelConfig.from_name(f"mistral-7b-{version}")
    window = f"window of {config.sliding_window:,}" if config.sliding_window else "no window"
    sizes = [cache_bytes(config, length, jnp.bfloat16, jax.eval_shape) for length in SIZES]
    planned[f"{version}, {window}"] = sizes
for label, sizes in (made | planned).items():
    print(f"{label:24}", *(f"{decimal(size):>10}" for size in sizes[::2]))


# %%
def draw(axes, lines, lengths, unit):
    """Draws two lines, the second of them dashed."""
    for (label, values), style in zip(lines.items(), STYLES.values(), strict=True):
        axes.plot(lengths, np.array(values) / unit, color="black", label=label, **style)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("length of the text (tokens)")
    axes.grid(color="0.9")
    axes.legend(loc="upper left")


figure, both = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
draw(both[0], made, SIZES, 1e6)
both[0].set(title="Cache of the model loaded, one row", ylabel="MB")
draw(both[1], planned, SIZES, 1e6)
both[1].set(title="Cache of Mistral 7B, one row", ylabel="MB")
for axes in both:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(SIZES[::2], [f"{length:,}" for length in SIZES[::2]])
    axes.yaxis.set_major_formatter("{x:,.4g}")
plt.show()

# %% [markdown]
# Up to the window both grow alike; from there on one line is flat. At the longest text:

# %%
first, second = planned.values()
print(f"without a window, Mistral 7B's cache is {second[-1] / first[-1]:.2f} times as large")

# %% [markdown]
# ## Time for a token
#
# A step of decoding reads all weights, and all of the cache. To measure it far into a text we
# need not read the text: time does not depend on what keys and values are. So `full_cache` makes
# a cache whose slots hold zeros and claim to be the last tokens before a place. The cache is
# donated to the step, as in generation: JAX writes the new token into the same memory.
#
# These are measurements of the machine that runs this notebook, and of all else that runs on it:
# the median of 15 steps, after two that are not counted.


# %%
@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def advance(model, params, tokens, positions, cache):
    """Reads tokens [1, T] behind those in the cache; returns the logits of the last."""
    last = jnp.array([tokens.shape[1] - 1])
    return model.apply({"params": params}, tokens, positions, cache, logits_at=last)


def empty_cache(model, length):
    """Makes a cache for one row where the weights are: placed elsewhere, a step compiles anew."""
    return jax.device_put(mj.init_cache(model.config, 1, length, model.dtype), jax.devices()[0])


def full_cache(model, length):
    """Makes a cache with room for `length` tokens, of which all but the last are there."""

    def fill(layer):
        positions = np.full(layer.positions.shape, -1, np.int32)
        slots = positions.shape[1]
        seen = np.arange(max(0, length - 1 - slots), length - 1)
        positions[0, seen % slots] = seen
        return layer.replace(positions=jax.device_put(positions, jax.devices()[0]))

    return tuple(map(fill, empty_cache(model, length)))


def token_seconds(model, length, steps=15):
    """Measures how long the model takes for the last token of a text."""
    cache, seconds = full_cache(model, length), []
    token, position = np.full((2, 1, 1), [[[model.config.bos_id]], [[length - 1]]], np.int32)
    for _ in range(2 + steps):
        began = time.perf_counter()
        _, cache = jax.block_until_ready(advance(model, params, token, position, cache))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


LENGTHS = [W, *(model.config.max_positions // n for n in (4, 2, 1))]
decoding = {
    label: [token_seconds(each, length) for length in LENGTHS] for label, each in BOTH.items()
}

# %%
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
draw(axes, decoding, LENGTHS, 1e-3)
axes.set(title="One more token, after a text of this length", ylabel="ms a token", ylim=(0, None))
plt.show()

# %% [markdown]
# Without a window, long texts are bound by the cache: it must be read whole for every token. The
# key-value heads are few for the same reason (grouped-query attention, [arXiv
# 2305.13245](https://arxiv.org/abs/2305.13245)): the cache is N / K times smaller than with a key
# and a value for each query head.
#
# ## Time for a prompt
#
# A prompt is read in chunks, for its activations would not fit at once. Each chunk attends to
# what the cache holds and to itself. With a window that is the same work for each chunk, and a
# prompt's time is linear in its length. Without, the n-th chunk attends to n chunks, and time is
# quadratic.

# %%
longest = min(32 * W, model.config.max_positions)
PROMPTS = [longest // 4, longest // 2, longest]
path = Path(sysconfig.get_path("stdlib"), "_pydecimal.py")
ids = np.array(tokenizer.encode(path.read_text(encoding="utf-8"), bos=True), np.int32)
print(f"{path.name} has {len(ids):,} tokens")


def prompt_seconds(model, length):
    """Measures how long the model takes to read a prompt, without compilation."""

    def read(count):
        cache = empty_cache(model, length)
        for start in range(0, count, CHUNK):
            positions = np.arange(start, min(start + CHUNK, length), dtype=np.int32)
            tokens = ids[positions % len(ids)]
            logits, cache = advance(model, params, tokens[None], positions[None], cache)
        return jax.block_until_ready(logits)

    read(1)  # one chunk, to compile
    began = time.perf_counter()
    read(length)
    return time.perf_counter() - began


reading = {
    label: [prompt_seconds(each, length) for length in PROMPTS] for label, each in BOTH.items()
}

# %%
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
draw(axes, reading, PROMPTS, 1)
axes.set(title="Reading a prompt of this length", ylabel="seconds", xlim=(0, None), ylim=(0, None))
plt.show()

for label, seconds in reading.items():
    print(f"{label:16} twice the prompt takes {seconds[-1] / seconds[-2]:.1f} times as long")

# %% [markdown]
# ## Chunks do not matter
#
# Where a prompt is cut must not change what the model says ("Pre-fill and Chunking" in section 2
# of the paper). It is easy to get wrong. The late tokens of a chunk overwrite slots whose keys
# its early tokens still have to see. So a chunk attends to the ring and to itself, and writes
# afterwards (`mistral_jax/model/layers.py`). Here the logits of every token, read in chunks of
# several sizes, beside those of one pass over the whole text without a cache.

# %%
text = jnp.asarray(ids[None, : min(4 * W, len(ids))])
places = jnp.arange(text.shape[1])[None]
apply = jax.jit(windowed.apply)
whole, _ = apply({"params": params}, text, places)
print(f"{text.shape[1]:,} tokens; logits from {whole.min():.1f} to {whole.max():.1f}")

for size in (W // 2 + 1, 2 * W):
    cache = empty_cache(windowed, text.shape[1])
    worst = 0.0
    for start in range(0, text.shape[1], size):
        chunk = slice(start, start + size)
        logits, cache = apply({"params": params}, text[:, chunk], places[:, chunk], cache)
        worst = max(worst, float(jnp.max(jnp.abs(logits - whole[:, chunk]))))
    print(f"chunks of {size:,}: largest difference {worst:.1e}")

# %% [markdown]
# What remains is rounding: sums of other lengths are added up in another order.
#
# ## How far a token is heard
#
# A layer looks at W tokens, its own included, and the next layer looks at what these have
# gathered. So a token can be heard L (W - 1) tokens on, far more than a window, as in a stack of
# convolutions (section 2, "Sliding Window Attention"; before it,
# [Longformer](https://arxiv.org/abs/2004.05150), section 3.1). To see it, we change one token,
# and look for logits that change. The window is 8 here, so that the reach is short. In bfloat16
# the faintest changes are rounded away.

# %%
short = model.clone(config=dataclasses.replace(model.config, sliding_window=8))
reach = L * (8 - 1)
row = jnp.asarray(ids[None, : reach + 16])
changed = row.at[0, 0].set(ids[1])
places = jnp.arange(row.shape[1])[None]
one, other = (short.apply({"params": params}, each, places)[0][0] for each in (row, changed))
change = np.asarray(jnp.max(jnp.abs(one - other), axis=-1))
print(f"the last token that hears of it is {np.flatnonzero(change).max()}; {L} x (8 - 1) = {reach}")

figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
axes.semilogy(np.arange(len(change)), np.where(change > 0, change, np.nan), "ko", markersize=4)
for layer in range(1, L + 1):
    axes.axvline(layer * 7 + 0.5, color="0.6", ls=":")
axes.set(title="What a change of token 0 does to later logits (dotted: reach of each layer)")
axes.set(xlabel="position (tokens)", ylabel="largest change of a logit", xlim=(-1, len(change)))
plt.show()

# %% [markdown]
# ## What the window does to the loss
#
# A model that was trained with a window has never seen more than W keys at once. Without it, it
# must cope with distances that it does not know. The loss by position shows it. The parts of a
# text differ in how hard they are, so `turns` reads it as a circle, from 16 places on: then all
# positions have the same tokens, and only what was read before them differs.

# %%
length = min(8 * W, len(ids)) // 16 * 16
rows = turns(ids[1:].tolist(), length, 16)[:16]
rows = [[model.config.bos_id, *row] for row in rows]
buckets = {}
for label, each in BOTH.items():
    losses = row_losses(each, params, rows, batch=max(1, 4096 // length))
    buckets[label] = by_position(losses, 16)

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for label, found in buckets.items():
    middles = [(bucket.first_position + bucket.last_position) / 2 for bucket in found]
    axes.plot(middles, [bucket.loss for bucket in found], "k", label=label, **STYLES[label])
axes.axvline(W, color="0.5", ls=":", label="one window")
axes.set(title=f"Loss of the same {length:,} tokens at every position")
axes.set(xlabel="position (tokens)", ylabel="nats a token")
axes.legend()
plt.show()

# %% [markdown]
# This is how an implementation that forgets the window can be told from one that keeps it: both
# agree up to W tokens, and only a longer text shows the difference. `python -m
# mistral_jax.evaluate FILE --positions 16 --circle 1024` makes the same table of any text; see
# [docs/evaluation.md](../docs/evaluation.md).
#
# ## Further
#
# - [05_shard](05_shard.ipynb) splits weights and cache over devices.
# - [docs/architecture.md](../docs/architecture.md) draws the ring and the way of a prompt.
# - Read [mistral_jax/model/cache.py](../mistral_jax/model/cache.py) and the mask in
#   [mistral_jax/model/attention.py](../mistral_jax/model/attention.py): a page each.
