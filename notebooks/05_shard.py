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
# # Shard over devices
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mistral-jax/mistral_jax/blob/main/notebooks/05_shard.ipynb)
#
# One checkpoint runs on one device or on many; what changes is a layout, a file of a few lines.
# You will load a model under several layouts, see which device holds which part of a weight, and
# check that the text stays the same. Then you will count what devices must send each other, and
# have a planner do so for hardware that you do not have.

# %%
# On Colab this installs the package; where it is installed already, it does nothing.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("mistral_jax") is None:
    source = "mistral-jax-flax[hub,train] @ git+https://github.com/mistral-jax/mistral_jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)

# %% [markdown]
# ## Devices
#
# JAX can pretend that one CPU is eight devices. They share its cores, so nothing gets faster, but
# programs are split, and arrays move, as between real ones. The setting is for CPUs only: where
# there are GPUs or TPUs, these are used. With only one of them, the notebook runs, each layout is
# one part, and nothing is exchanged; start Jupyter with `JAX_PLATFORMS=cpu` to see eight.

# %%
import jax

jax.config.update("jax_num_cpu_devices", 8)
DEVICES = len(jax.devices())
print(DEVICES, "devices:", *jax.devices())

# %%
import collections
import dataclasses
import math

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from mistral_jax.convert.prepare import prepare
from rich.filesize import decimal

import mistral_jax as mj
from mistral_jax.config import CONFIG_DIR, ModelConfig
from mistral_jax.planning import arithmetic, collectives, programs
from mistral_jax.rules import split_kv_heads
from mistral_jax.sharding import Layout, read_layout

# The bundled model; or a checkpoint's folder, or a name on the Hub:
# MODEL = "mistralai/Mistral-7B-Instruct-v0.3"
MODEL = None

checkpoint = prepare(MODEL)

# %% [markdown]
# First on one device, which gives us something to compare with: a text, chosen greedily, and the
# logits of a prompt.

# %%
PROMPT = "def read_json(path):"


def answer(model, params, tokenizer):
    """Returns a continuation of the prompt, and the prompt's logits."""
    greedy = mj.Sampling(temperature=0)
    text = mj.complete(model, params, tokenizer, PROMPT, max_new_tokens=20, sampling=greedy)
    tokens = jnp.array([tokenizer.encode(PROMPT, bos=True)])
    positions = jnp.arange(tokens.shape[1])[None]
    logits, _ = jax.jit(model.apply)({"params": params}, tokens, positions)
    return text, np.asarray(logits)


model, params, tokenizer = mj.load(checkpoint)
config = model.config
whole = sum(x.nbytes for x in jax.tree.leaves(params))
expected, logits = answer(model, params, tokenizer)
del params
print(decimal(whole), "of weights on", jax.devices()[0])
print(PROMPT + expected)

# %% [markdown]
# ## What a layout says
#
# The model names the axes of its arrays: `heads`, `mlp`, `vocab`, `embed` (the width of the
# residual stream), `batch`. A layout has a mesh, which is a grid of devices with named axes, and
# rules, which say what axis of an array lies along what axis of the mesh. Axes without a rule
# stay whole.

# %%
print((CONFIG_DIR / "sharding" / "tensor.toml").read_text())

# %% [markdown]
# The compiler does the rest: it splits each operation as its arrays are split, and adds the
# exchanges ([GSPMD](https://arxiv.org/abs/2105.04663)). No line of the model says who sends what.
#
# We compare four layouts. `tensor` splits heads, MLP and vocabulary
# ([Megatron-LM](https://arxiv.org/abs/1909.08053)), as far as the query heads go. `fsdp` splits
# weights along the width, and the rows of a batch ([ZeRO](https://arxiv.org/abs/1910.02054),
# [PyTorch FSDP](https://arxiv.org/abs/2304.11277)). The other two have a mesh of two axes:
# replicas of `tensor`, or both splits at once.

# %%
pair = math.gcd(DEVICES, 2)
MESHES = {
    "tensor": {"tensor": math.gcd(DEVICES, config.num_heads)},
    "data_tensor": {"tensor": pair},
    "fsdp": {},
    "fsdp_tensor": {"tensor": pair},
}
KERNELS = {
    "q_proj": ("attn", "heads", "width"),
    "k_proj": ("attn", "key-value heads", "width"),
    "gate_proj": ("mlp", "MLP", "width"),
    "down_proj": ("mlp", "width", "MLP"),
}


def blocks(array):
    """Returns which devices hold which block of an array's first and last axes."""
    found = collections.defaultdict(list)
    for shard in array.addressable_shards:
        rows, columns = shard.index[0], shard.index[-1]
        first = rows.indices(array.shape[0])[:2], columns.indices(array.shape[-1])[:2]
        found[first].append(shard.device.id)
    return dict(found)


held, placed, texts, differences = {}, {}, {}, {}
for name, mesh in MESHES.items():
    model, params, _ = mj.load(checkpoint, sharding=name, mesh=mesh)
    held[name] = collections.Counter()
    for array in jax.tree.leaves(params):
        for shard in array.addressable_shards:
            held[name][shard.device.id] += shard.data.nbytes
    layer = params["layers_0"]
    for kernel, (part, *_) in KERNELS.items():
        array = layer[part][kernel]["kernel"]
        placed[name, kernel] = array.shape, blocks(array)
    texts[name], found = answer(model, params, tokenizer)
    differences[name] = np.abs(found - logits).max()
    del params, layer, array

# %% [markdown]
# ## Who holds what
#
# Each square is a weight of the first layer; the numbers in a block are the devices that hold it.
# White blocks are held once; the darker, the more copies there are.
# (`jax.debug.visualize_array_sharding` draws one array's blocks in a terminal.)

# %%
figure, grid = plt.subplots(len(KERNELS), len(MESHES), figsize=(9, 9), layout="constrained")
for (name, kernel), axes in zip(placed, grid.T.flat, strict=True):
    (rows, *_, columns), parts = placed[name, kernel]
    for ((top, bottom), (left, right)), devices in parts.items():
        grey = str(1 - 0.45 * (len(devices) - 1) / max(1, DEVICES - 1))
        corner, size = (left, top), (right - left, bottom - top)
        axes.add_patch(plt.Rectangle(corner, *size, facecolor=grey, edgecolor="black"))
        label = "all" if len(devices) == DEVICES > 1 else " ".join(map(str, sorted(devices)))
        turned = 90 if len(label) > 2 and size[0] / columns < size[1] / rows / 2 else 0
        middle = left + size[0] / 2, top + size[1] / 2
        axes.text(*middle, label, ha="center", va="center", rotation=turned)
    axes.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[])
    _, down, across = KERNELS[kernel]
    axes.set_xlabel(f"{across}: {columns:,}")
    axes.set_ylabel(f"{down}: {rows:,}")
    axes.set_title(f"{name}\n{kernel}" if kernel == "q_proj" else kernel)
plt.show()

# %% [markdown]
# ## What a device holds
#
# The bytes of all weights, counted from the shards that are really there. `data_tensor` holds a
# copy of the model in each replica. `tensor` cannot use more devices than it can share heads out
# to.

# %%
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
names = ["one device", *held]
sizes = [whole, *(max(each.values()) for each in held.values())]
bars = axes.barh(names, np.array(sizes) / 1e6, color="0.8", edgecolor="black")
counts = [1, *map(len, held.values())]
labels = [f"{decimal(s)}, on {n} of {DEVICES}" for s, n in zip(sizes, counts, strict=True)]
axes.bar_label(bars, labels, padding=3)
axes.invert_yaxis()
axes.set(title="Weights on the device that holds most", xlabel="MB", xlim=(0, 1.35 * whole / 1e6))
plt.show()

# %% [markdown]
# ## The same text
#
# A layout must not change what the model says. The logits differ by rounding alone, for sums are
# added up in another order.

# %%
for name, text in texts.items():
    same = "the same text" if text == expected else f"ANOTHER TEXT: {text!r}"
    print(f"{name:12} {same}; largest difference of logits {differences[name]:.1e}")

# %% [markdown]
# ## More devices than key-value heads
#
# Grouped-query attention ([arXiv 2305.13245](https://arxiv.org/abs/2305.13245)) has few key-value
# heads, K, and a mesh axis of t devices may be larger. It is then split in two: gcd(t, K) devices
# hold different key-value heads, and the query heads of each are shared out among the rest. No
# key is moved; it is held in t / gcd(t, K) copies. The drawing has such a case where `k_proj`
# under `tensor` has two devices in a block. For Mistral 7B:

# %%
seven = ModelConfig.from_name("mistral-7b-v0.3")
rules = {"heads": ("tensor",), "kv_heads": ("tensor",)}
print(f"{seven.num_heads} query heads, {seven.num_kv_heads} key-value heads")
for size in (4, 8, 16, 32):
    split, sizes = split_kv_heads(seven, rules, {"tensor": size})
    kv = math.prod(sizes[axis] for axis in split["kv_heads"])
    print(f"tensor = {size:2}: mesh {sizes}; {size // kv} copies of each key and value")

# %% [markdown]
# ## A layout that does not fit
#
# What does not divide is refused before anything is allocated, in a sentence that names a size
# that works:

# %%
try:
    mj.load(checkpoint, sharding="tensor", mesh={"tensor": 3})
except ValueError as error:
    print(str(error).replace(str(CONFIG_DIR), "configs"))

# %% [markdown]
# ## What devices must send
#
# Under `tensor` a device has some heads and a part of the MLP. Each of a layer's two outputs
# (`o_proj`, `down_proj`) is a sum over all of them, so the devices add up their parts: two
# all-reduces a layer. One more sum looks up tokens in the table of embeddings, which is split by
# vocabulary, and at the end the logits are gathered. So a step of decoding takes 2 L + 1
# all-reduces and one all-gather.
#
# We can count them. This compiles a decoding step of Mistral 7B, cut to two layers, for 8 rows.
# It needs shapes alone, and no weights. Then it reads the exchanges from the text of the compiled
# program.

# %%
cut = dataclasses.replace(seven, num_layers=2)
layout = read_layout("tensor", cut) or Layout(jax.make_mesh((1,), ("device",)), ())
short = mj.Transformer(cut, jnp.bfloat16, layout.rules)
shapes = programs.shapes(layout, batch=8, length=4096, dtype="bfloat16")
compiled = programs.lower("decode", short, layout, shapes).compile()
found = [c for c in collectives.read(compiled.as_text(), DEVICES) if c.loops and c.shape]
for (kind, shape), times in collections.Counter((c.kind, c.shape) for c in found).items():
    print(f"{times} x {kind} of {shape}, in the loop of steps")

# %% [markdown]
# `planning/arithmetic.py` says the same without a compiler, and what each is for. A test holds it
# to the compiled programs of every layout. All 32 layers:

# %%
full = mj.Transformer(seven, jnp.bfloat16, layout.rules)
listed = arithmetic.exchanges("decode", full, layout, shapes)
for each in listed:
    size = decimal(each.bytes)
    print(f"{each.times:3} x {each.kind} of {each.shape}, {size} each: {each.source}")
print(f"a device sends {decimal(round(arithmetic.sent(listed)))} in a step")

# %% [markdown]
# ## Ask the planner
#
# The planner compiles the programs of a model for devices that need not exist, adds memory and
# work, and divides by what a chip can do. Its times are the least that the hardware allows. Here
# it is for the bundled model, which takes seconds:

# %%
command = [sys.executable, "-m", "mistral_jax.plan", "nano", "--sharding", "tensor"]
command += ["--devices", "4", "--hardware", "v5e", "--compiler", "cpu", "--batch", "8"]
print(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

# %% [markdown]
# For Mistral 7B on four chips it is:
#
# ``` python -m mistral_jax.plan mistral-7b-v0.3 --sharding tensor --devices 4 --hardware v5e \
#     --batch 32 --length 4096
# ```
#
# ## Further
#
# - [docs/scaling.md](../docs/scaling.md): how to choose a layout, 7B on common slices, and several
#   hosts.
# - [06_long_context](06_long_context.ipynb) measures the cache, which `tensor` splits as well.
# - Read [mistral_jax/rules.py](../mistral_jax/rules.py),
#   [mistral_jax/sharding.py](../mistral_jax/sharding.py) and
#   [mistral_jax/planning/arithmetic.py](../mistral_jax/planning/arithmetic.py).
