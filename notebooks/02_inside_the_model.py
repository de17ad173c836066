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
# # Inside the model
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mistral-jax/mistral_jax/blob/main/notebooks/02_inside_the_model.ipynb)
#
# Three ideas make Mistral 7B cheap on long texts: a window that limits the keys each token sees,
# fewer key-value heads than query heads, and a cache that is a ring buffer. This notebook plots
# each of them from the code that runs the model, and compares theory with measurements on a trained
# model.

# %%
# Installs the package on Colab. Does nothing if the package is already installed.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("mistral_jax") is None:
    source = "mistral-jax-flax[hub,train] @ git+https://github.com/mistral-jax/mistral_jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)

# %%
import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from mistral_jax.convert.prepare import prepare

import mistral_jax as mj
from mistral_jax.model.attention import attend, visible

# None is the bundled model. Instead, name a checkpoint folder or a model on the Hub:
MODEL = None  # "mistralai/Mistral-7B-Instruct-v0.3"

model, params, tokenizer = mj.load(prepare(MODEL))

# %% [markdown]
# ## Which keys a query sees
#
# For each query, attention averages the values of the keys that the query may see. The function
# `visible` computes this mask from the positions of queries and keys, in training, prefill and
# decoding alike. A query sees one of these:
#
# - all keys up to its own position;
# - the last W of them, its own included: a sliding window (Mistral 7B, arXiv 2310.06825, section
#   2);
# - W of them with gaps between: a dilated window (Longformer, arXiv 2004.05150, section 3.1).


# %%
def draw(axis, mask, queries, keys, title):
    axis.pcolormesh(mask, cmap="Greys", vmax=1.4, edgecolors="0.85", linewidth=0.5)
    axis.set_xticks(np.arange(len(keys)) + 0.5, keys, fontsize=8)
    axis.set_yticks(np.arange(len(queries)) + 0.5, queries, fontsize=8)
    axis.set(xlabel="position of the key", ylabel="position of the query", title=title, aspect=1)
    axis.invert_yaxis()


places = np.arange(14)
patterns = {"no window": (None, 1), "window 4": (4, 1), "window 4, dilation 3": (4, 3)}
figure, axes = plt.subplots(1, 3, figsize=(9, 3.3), layout="constrained")
for axis, (name, pattern) in zip(axes, patterns.items(), strict=True):
    mask = visible(places[None], places[None], *pattern)[0]
    draw(axis, mask, places, places, f"{name}: {int(mask.sum())} pairs")
plt.show()

# %% [markdown]
# ## What a window costs, and how far it reaches
#
# A token sees W keys in each layer, and each of those has seen W keys in the layer below. After L
# layers, information from (W - 1) L + 1 tokens can reach a token, its own included. With dilation
# d, the furthest of them is (W - 1) d L positions back. The next cell calls the model's own
# functions to compute the cost of the last token of a text in Mistral 7B. It allocates no cache,
# because `jax.eval_shape` computes shapes only.


# %%
def cache_bytes(config, length):
    cache = jax.eval_shape(lambda: mj.init_cache(config, 1, length, jnp.bfloat16))
    return sum(x.size * x.dtype.itemsize for layer in cache for x in (layer.k, layer.v))


mistral = mj.ModelConfig.from_name("mistral-7b-v0.1")
W, L = mistral.sliding_window, mistral.num_layers
patterns = {"no window": (None, 1), f"window {W}": (W, 1), f"window {W}, dilation 2": (W, 2)}
lengths = [2**i for i in range(10, 21)]
views = {
    "Work stops growing": "keys that the last token sees",
    "Memory stops growing": "cache (GiB, bfloat16)",
    "Reach grows far beyond W": "tokens that the last layer reaches",
}
figure, axes = plt.subplots(1, 3, figsize=(9, 3.4), layout="constrained")
for (name, pattern), style in zip(patterns.items(), ("k-", "k--s", "k:o"), strict=True):
    window, dilation = pattern
    config = dataclasses.replace(mistral, sliding_window=window, dilation=dilation)
    far = np.inf if window is None else (window - 1) * dilation * L + 1
    seen = [int(visible(np.array([[n - 1]]), np.arange(n)[None], *pattern).sum()) for n in lengths]
    gib = [cache_bytes(config, n) / 2**30 for n in lengths]
    for axis, values in zip(axes, (seen, gib, np.minimum(lengths, far)), strict=True):
        axis.loglog(lengths, values, style, markersize=4, markerfacecolor="w", label=name)
    print(f"{name}, 2^20 tokens: {seen[-1]:,} keys, {gib[-1]:.2f} GiB, {values[-1]:,.0f} reached")
for axis, (title, label) in zip(axes, views.items(), strict=True):
    axis.set(title=title, ylabel=label, xlabel="length of the text (tokens)")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
# ## Measured: how far information reaches
#
# A token influences the logits at another position only if the gradient of those logits with
# respect to the token's embedding is not zero. The next cell gives the bundled model a window of 6
# and a growing number of its layers, and differentiates the largest logit at the last position. It
# ignores `MODEL`, because the gradients of a 7B model need much memory. All tokens differ, so each
# has its own row of the embedding table.

# %%
nano, nano_params, _ = mj.load(dtype="float32")
T, W, depths = 72, 6, range(1, nano.config.num_layers + 1)
tokens = np.random.default_rng(0).permutation(np.arange(300, 300 + T))[None]


def influence(layers, dilation):
    """Returns the gradient norm of the last logit with respect to each embedding, [T]."""
    shape = {"num_layers": layers, "sliding_window": W, "dilation": dilation}
    cut = nano.clone(config=dataclasses.replace(nano.config, **shape))

    def largest(table):
        changed = {**nano_params, "embed": {"embedding": table}}
        return cut.apply({"params": changed}, tokens, np.arange(T)[None])[0][0, -1].max()

    slope = jax.jit(jax.grad(largest))(nano_params["embed"]["embedding"])
    return np.linalg.norm(slope[tokens[0]], axis=-1)


figure, axes = plt.subplots(2, 1, figsize=(9, 4.2), sharex=True, layout="constrained")
for axis, dilation in zip(axes, (1, 3), strict=True):
    heard = np.array([influence(depth, dilation)[::-1] for depth in depths])  # by distance
    image = axis.imshow(np.ma.masked_equal(heard, 0), "Greys", "log", vmin=1e-6, vmax=10)
    for row, depth in enumerate(depths):
        reach = (W - 1) * dilation * depth + 1
        assert np.flatnonzero(heard[row]).max() + 1 == reach
        axis.plot([reach - 0.5] * 2, [row - 0.5, row + 0.5], "k-", linewidth=3)
    axis.set_yticks(range(len(depths)), depths)
    axis.set(ylabel="layers", title=f"window {W}, dilation {dilation}", aspect="auto")
axes[1].set_xlabel("distance back from the last token (white: the gradient is exactly 0)")
figure.colorbar(image, ax=axes, label="size of the gradient")
figure.suptitle("Each layer extends the reach as theory predicts (black bars)")
plt.show()

# %% [markdown]
# ## Fewer heads for keys and values
#
# The keys and values of earlier tokens stay in memory. Multi-head attention (MHA) keeps a key and a
# value for each of N query heads. Multi-query attention (MQA, arXiv 1911.02150) keeps one pair for
# all of them, and grouped-query attention (GQA, arXiv 2305.13245) one pair for each group of G = N
# / K heads. GQA equals MHA with each key-value head repeated G times, as the second cell shows.
# `attend` never makes these copies.

# %%
kinds = {"MHA, K = 32": 32, "GQA, K = 8 (Mistral 7B)": 8, "MQA, K = 1": 1}
shapes = [dataclasses.replace(mistral, num_kv_heads=heads) for heads in kinds.values()]
figure, axis = plt.subplots(figsize=(7, 2.4), layout="constrained")
bars = axis.barh([*kinds], [cache_bytes(shape, 1) / 1024 for shape in shapes], color="0.6")
axis.bar_label(bars, fmt=" {:.0f} KiB")
axis.invert_yaxis()
axis.set(xlim=(0, 600), xlabel="KiB in bfloat16", title="What Mistral 7B keeps of each token")
plt.show()

# %%
q, k, v = (jax.random.normal(jax.random.key(i), (1, 14, n, 16)) for i, n in enumerate((8, 2, 2)))
copies = (jnp.repeat(x, 4, axis=2) for x in (k, v))
grouped, repeated = (attend(q, *kv, places[None], places[None], 4) for kv in ((k, v), copies))
print("largest difference between GQA and MHA with copies:", jnp.abs(grouped - repeated).max())

# %% [markdown]
# ## The cache is a ring
#
# A key that has left the window of W tokens is never read again, so W cache slots are enough. Token
# p is stored in slot p mod W and overwrites the token that has just left the window (arXiv
# 2310.06825, section 2, "rolling buffer cache"). In the next cell the model has a window of 8 and
# reads a text token by token.

# %%
ids = np.array([tokenizer.encode("def area(width, height):\n    return width * height", bos=True)])
W, T = 8, ids.shape[1]
small = model.clone(config=dataclasses.replace(model.config, sliding_window=W, dilation=1))
step = jax.jit(small.apply)
cache, rows, rings = mj.init_cache(small.config, 1, T, small.dtype), [], []
for p in range(T):
    logits, cache = step({"params": params}, ids[:, p : p + 1], np.array([[p]]), cache)
    rows.append(logits[0])
    rings.append(np.array(cache[0].positions[0]))  # the token in each slot of layer 0; -1 = none

figure, axis = plt.subplots(figsize=(9, 3.4), layout="constrained")
filled = np.ma.masked_less(np.array(rings).T, 0)
axis.imshow(filled, "Greys", vmin=-T, vmax=3 * T, aspect="auto")
for slot, p in np.argwhere(~filled.mask):
    weight = "bold" if filled[slot, p] == p else "normal"
    axis.text(p, slot, filled[slot, p], ha="center", va="center", weight=weight)
assert all(ring[p % W] == p for p, ring in enumerate(rings))
axis.set(xlabel="after token", ylabel="slot", title="The token in each cache slot (bold: new)")
plt.show()

# %% [markdown]
# ## A prompt is read in chunks
#
# The early queries of a chunk still need keys that its late tokens will overwrite. A chunk
# therefore attends to the ring and to itself first, and its keys are written to the ring
# afterwards. The same function computes the mask, from the positions in the ring and those of the
# chunk (arXiv 2310.06825, section 2, "pre-fill and chunking").

# %%
chunk = np.arange(11, 16)  # the ring holds the last 8 of 11 tokens; these are the next 5
keys = np.concatenate([rings[10], chunk])
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
mask = visible(chunk[None], keys[None], W)[0]
draw(axis, mask, chunk, keys, f"{W} keys for each query, in the ring (left) or the chunk (right)")
axis.axvline(W, color="black", linewidth=3)
plt.show()

# %% [markdown]
# Reading the text in one pass without a cache, token by token through the ring, and in chunks of 5
# must give the same logits, up to rounding.

# %%
full, _ = step({"params": params}, ids, np.arange(T)[None])
cache, parts = mj.init_cache(small.config, 1, T, small.dtype), []
for start in range(0, T, 5):
    span = np.arange(start, min(start + 5, T))
    logits, cache = step({"params": params}, ids[:, span], span[None], cache)
    parts.append(logits[0])
for name, found in {"token by token": rows, "chunks of 5": parts}.items():
    difference = jnp.abs(jnp.concatenate(found) - full[0]).max() / jnp.abs(full).max()
    print(f"{name}: differs by {difference:.1e} of the largest logit, in {small.dtype}")

# %% [markdown]
# ## Next steps
#
# - [06_long_context](06_long_context.ipynb) measures what windows do on long texts.
# - [docs/architecture.md](../docs/architecture.md) shows where each of these parts is.
# - Source: [`model/attention.py`](../mistral_jax/model/attention.py) has the mask and the layer,
#   [`model/cache.py`](../mistral_jax/model/cache.py) has the ring.
