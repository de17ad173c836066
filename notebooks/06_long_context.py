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
# A model with a sliding window attends to the last W tokens in each layer, however long its text
# is. Its cache therefore stops growing, each token takes the same time at any position, and the
# time to read a prompt grows linearly with its length. This notebook measures all three, with and
# without a window, and then what the window does to the loss.

# %%
# Installs the package on Colab. Does nothing if the package is already installed.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("mistral_jax") is None:
    source = "mistral-jax-flax[hub,train] @ git+https://github.com/mistral-jax/mistral_jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)

# %% [markdown]
# The window is a number in the config, and no weight depends on it, so the same weights run with it
# and without it. If the model has no window, such as v0.3, this notebook uses a window of an eighth
# of its positions.

# %%
import dataclasses
import functools
import sysconfig
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from mistral_jax.convert.prepare import prepare

import mistral_jax as mj
from mistral_jax.config import ModelConfig
from mistral_jax.engine.prefill import CHUNK
from mistral_jax.evaluation.perplexity import row_losses
from mistral_jax.evaluation.positions import by_position, turns

# None is the bundled model. Instead, name a checkpoint folder or a model on the Hub, such as
# "mistralai/Mistral-7B-v0.1".
MODEL = None
model, params, tokenizer = mj.load(prepare(MODEL))

W = next((window for window in model.config.windows if window), model.config.max_positions // 8)
configs = [dataclasses.replace(model.config, sliding_window=window) for window in (W, None)]
windowed, unwindowed = (model.clone(config=config) for config in configs)
BOTH, STYLES = {f"window of {W:,}": windowed, "no window": unwindowed}, ("o-", "s--")
print("window as trained:", model.config.sliding_window, "- device:", jax.devices()[0].device_kind)

# %% [markdown]
# ## Memory of the cache
#
# To compute the next token, a layer needs the keys and values of the tokens that it may attend to.
# With a window of W there are never more than W of these, so the cache is a ring of W cache slots
# ([Mistral 7B](https://arxiv.org/abs/2310.06825), section 2, "Rolling Buffer Cache"). A token takes
# 2 L K H numbers: keys and values of K heads of width H in each of L layers. The left plot shows
# caches that are really allocated. The right plot shows Mistral 7B in bfloat16: v0.1 with its
# window of 4,096, and v0.3 without a window. For these, `jax.eval_shape` computes the shapes that a
# function would return, and allocates nothing.

# %%
SIZES = [model.config.max_positions // 2**i for i in reversed(range(9))]


def cache_bytes(cache):
    """Counts the bytes of arrays, or of their shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


made, planned = {}, {}
for label, each in BOTH.items():
    made[label] = [cache_bytes(mj.init_cache(each.config, 1, n, each.dtype)) for n in SIZES]
for version in ("v0.1", "v0.3"):
    init = functools.partial(mj.init_cache, ModelConfig.from_name(f"mistral-7b-{version}"), 1)
    shapes = [jax.eval_shape(functools.partial(init, n, jnp.bfloat16)) for n in SIZES]
    planned[version] = [cache_bytes(shape) for shape in shapes]
for label, sizes in (made | planned).items():
    print(f"{label:14}", *(f"{size / 1e6:9,.1f}" for size in sizes[::2]), "MB")
print(f"at {SIZES[-1]:,} tokens, v0.3 takes {planned['v0.3'][-1] / planned['v0.1'][-1]:.2f} x v0.1")


def draw(axes, lines, places, unit, **about):
    """Draws two lines, the second one dashed."""
    for (label, values), style in zip(lines.items(), STYLES, strict=True):
        axes.plot(places, np.array(values) / unit, style, color="black", label=label)
    axes.set(xlabel="length of the text (tokens)", **about)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend()
    axes.grid(color="0.9")


_, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
draw(left, made, SIZES, 1e6, title="Cache of the model loaded, one row", ylabel="MB")
draw(right, planned, SIZES, 1e6, title="Cache of Mistral 7B, one row", ylabel="MB")

# %% [markdown]
# ## Time for a token
#
# A decode step reads all weights and the whole cache. Its time does not depend on the values of the
# keys, so it can be measured far into a text without reading the text: `full_cache` returns a cache
# of zeros whose positions are those of the last tokens before a place. The step donates its cache,
# as generation does, so the new token is written into the same memory. Times are medians of 15
# steps on this machine.


# %%
@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def advance(model, params, tokens, positions, cache):
    """Reads tokens [1, T] after those in the cache; returns the logits of the last token."""
    last = jnp.array([tokens.shape[1] - 1])
    return model.apply({"params": params}, tokens, positions, cache, logits_at=last)


def empty_cache(model, length):
    """Makes a cache for one row on the device of the weights, so that a step compiles only once."""
    return jax.device_put(mj.init_cache(model.config, 1, length, model.dtype), jax.devices()[0])


def full_cache(model, length):
    """Marks each slot with the last position p < length - 1 with p mod S = slot; -1 is none."""

    def fill(layer):
        slots = np.arange(layer.positions.shape[1], dtype=np.int32)
        latest = slots + len(slots) * ((length - 2 - slots) // len(slots))
        return layer.replace(positions=jax.device_put(latest[None], jax.devices()[0]))

    return tuple(map(fill, empty_cache(model, length)))


def token_seconds(model, length, steps=15):
    """Measures the time that the model takes for the last token of a text."""
    cache, seconds = full_cache(model, length), []
    token, position = np.full((2, 1, 1), [[[model.config.bos_id]], [[length - 1]]], np.int32)
    for _ in range(2 + steps):
        began = time.perf_counter()
        _, cache = jax.block_until_ready(advance(model, params, token, position, cache))
        seconds.append(time.perf_counter() - began)
    return np.median(seconds[2:])


LENGTHS = [W, *(model.config.max_positions // n for n in (4, 2, 1))]
decoding = {name: [token_seconds(m, length) for length in LENGTHS] for name, m in BOTH.items()}
_, axes = plt.subplots(figsize=(7, 4), layout="constrained")
draw(axes, decoding, LENGTHS, 1e-3, title="Time for one more token", ylabel="ms", ylim=(0, None))

# %% [markdown]
# Without a window the cache grows, and every token reads all of it. Grouped-query attention ([arXiv
# 2305.13245](https://arxiv.org/abs/2305.13245)) makes the cache N / K times smaller.
#
# ## Time for a prompt
#
# A prompt is read in chunks, which limits the memory of its activations. Each chunk attends to the
# cache and to itself. With a window this work is the same for each chunk, so the time is linear in
# the prompt's length. Without a window, the n-th chunk attends to n chunks, so the time is
# quadratic.

# %%
PROMPTS = [min(32 * W, model.config.max_positions) // n for n in (4, 2, 1)]
path = Path(sysconfig.get_path("stdlib"), "_pydecimal.py")
ids = np.array(tokenizer.encode(path.read_text(encoding="utf-8"), bos=True), np.int32)


def prompt_seconds(model, length):
    """Measures the time to read a prompt in a second run; the first run compiles."""
    for _ in range(2):
        cache, began = empty_cache(model, length), time.perf_counter()
        for start in range(0, length, CHUNK):
            positions = np.arange(start, min(start + CHUNK, length), dtype=np.int32)
            tokens = ids[positions % len(ids)]
            logits, cache = advance(model, params, tokens[None], positions[None], cache)
        jax.block_until_ready(logits)
    return time.perf_counter() - began


reading = {name: [prompt_seconds(m, length) for length in PROMPTS] for name, m in BOTH.items()}
_, axes = plt.subplots(figsize=(7, 4), layout="constrained")
draw(axes, reading, PROMPTS, 1, title="Time to read a prompt", ylabel="seconds", ylim=(0, None))
for label, seconds in reading.items():
    print(f"{label:14} twice the prompt takes {seconds[-1] / seconds[-2]:.1f} times as long")

# %% [markdown]
# ## Chunks do not change the result
#
# The model must compute the same logits wherever a prompt is cut (section 2, "Pre-fill and
# Chunking"). The late tokens of a chunk overwrite cache slots whose keys its early tokens still
# need. A chunk therefore attends to the ring and to itself first, and its keys are written
# afterwards. The next cell compares the logits of all tokens, read in chunks, with those of one
# pass without a cache. They differ by rounding.

# %%
text = jnp.asarray(ids[None, : min(4 * W, len(ids))])
places = jnp.arange(text.shape[1])[None]
apply = jax.jit(windowed.apply)
whole, _ = apply({"params": params}, text, places)

for size in (W // 2 + 1, 2 * W):
    cache, worst = empty_cache(windowed, text.shape[1]), 0.0
    for start in range(0, text.shape[1], size):
        chunk = slice(start, start + size)
        logits, cache = apply({"params": params}, text[:, chunk], places[:, chunk], cache)
        worst = max(worst, float(jnp.max(jnp.abs(logits - whole[:, chunk]))))
    print(f"chunks of {size:3}: largest difference {worst:.0e}, of logits up to {whole.max():.1f}")

# %% [markdown]
# ## What the window does to the loss
#
# A model that was trained with a window has never seen more than W keys at once. Without the
# window, it must handle distances that it was not trained on. Some parts of a text are harder to
# predict than others, which would hide this effect. `turns` therefore treats a text, here Python's
# `_pydecimal.py`, as a circle and reads it from 16 starting points. Every position then has the
# same tokens, and only the tokens read before them differ.

# %%
length = min(8 * W, len(ids) - 1) // 16 * 16
rows = [[ids[0], *row] for row in turns(ids[1:].tolist(), length, 16)[:16]]
lines = {}
for label, each in BOTH.items():
    losses = row_losses(each, params, rows, batch=max(1, 4096 // length))
    lines[label] = [bucket.loss for bucket in by_position(losses, 16)]
_, axes = plt.subplots(figsize=(7, 4), layout="constrained")
axes.axvline(W, color="0.5", ls=":", label="one window")
middles = (np.arange(16) + 0.5) * length / 16
draw(axes, lines, middles, 1, title=f"Loss of the same {length:,} tokens", ylabel="nats a token")
axes.xaxis.label.set_text("position in the text (tokens)")

# %% [markdown]
# Up to W tokens both models compute the same, so only a longer text shows whether an implementation
# applies the window. Through L layers, information also reaches a token from beyond W, but from at
# most L windows back ([02_inside_the_model](02_inside_the_model.ipynb)). `python -m
# mistral_jax.evaluate FILE --positions 16 --circle 1024` prints such a table for any text.
#
# ## Next steps
#
# - [docs/evaluation.md](../docs/evaluation.md) describes the loss by position, and other measures.
# - Source: [model/cache.py](../mistral_jax/model/cache.py) has the ring.
