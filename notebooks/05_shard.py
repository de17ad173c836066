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
# One checkpoint runs on one device or on many. Only the layout changes, which is a file of a few
# lines. This notebook loads a model under several layouts, shows which device holds which part of a
# weight, and checks that the text stays the same. It then counts what devices must send to each
# other, and asks the planner about hardware that you do not have.

# %%
# Installs the package on Colab. Does nothing if the package is already installed.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("mistral_jax") is None:
    source = "mistral-jax-flax[hub,train] @ git+https://github.com/mistral-jax/mistral_jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)

# %% [markdown]
# JAX can present one CPU as eight devices. They share its cores, so nothing gets faster, but
# programs are partitioned and arrays are moved as they are between real devices. If there are GPUs
# or TPUs, JAX uses them. With only one of them, each layout has one part and nothing is exchanged.
# In that case, start Jupyter with `JAX_PLATFORMS=cpu` to see eight devices.

# %%
import collections
import dataclasses
import math

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from mistral_jax.convert.prepare import prepare
from rich.filesize import decimal

import mistral_jax as mj
from mistral_jax.config import CONFIG_DIR, ModelConfig
from mistral_jax.parallel.rules import split_kv_heads
from mistral_jax.parallel.sharding import Layout, read_layout
from mistral_jax.planning import arithmetic, collectives, programs

jax.config.update("jax_num_cpu_devices", 8)
DEVICES = len(jax.devices())
print(*jax.devices())

# None is the bundled model. Instead, name a checkpoint folder or a model on the Hub, such as
# "mistralai/Mistral-7B-v0.3".
MODEL = None
checkpoint = prepare(MODEL)

# %% [markdown]
# The first run is on one device. It provides the reference for the others: a greedy text, and the
# logits of its prompt.

# %%
PROMPT = "def read_json(path):"


def answer(model, params, tokenizer):
    """Returns a continuation of the prompt, and the prompt's logits."""
    ids, greedy = tokenizer.encode(PROMPT, bos=True), mj.Sampling(temperature=0)
    text = mj.complete(model, params, tokenizer, PROMPT, max_new_tokens=20, sampling=greedy)
    tokens, positions = jnp.array([ids]), jnp.arange(len(ids))[None]
    logits, _ = jax.jit(model.apply)({"params": params}, tokens, positions)
    return text, np.asarray(logits)


model, params, tokenizer = mj.load(checkpoint)
held = {"one device": {jax.devices()[0].id: sum(x.nbytes for x in jax.tree.leaves(params))}}
expected, logits = answer(model, params, tokenizer)
del params
print(PROMPT + expected)

# %% [markdown]
# ## What a layout says
#
# The model names the axes of its arrays: `heads`, `mlp`, `vocab`, `embed` (the width of the
# residual stream), `batch`. A layout has a mesh and rules. The mesh is a grid of devices with named
# axes. Each rule assigns an axis of arrays to an axis of the mesh. An axis without a rule is not
# partitioned.

# %%
print((CONFIG_DIR / "sharding" / "tensor.toml").read_text())

# %% [markdown]
# The compiler partitions each operation as its arrays are partitioned, and adds the exchanges
# between devices ([GSPMD](https://arxiv.org/abs/2105.04663)). The next cell loads the model under
# four layouts:
#
# - `tensor` partitions heads, MLP and vocabulary ([Megatron-LM](https://arxiv.org/abs/1909.08053)),
#   here over as many devices as can share the heads equally;
# - `fsdp` partitions weights along the width, and the rows of a batch
#   ([ZeRO](https://arxiv.org/abs/1910.02054));
# - `data_tensor` has a mesh of two axes, for replicas of `tensor`;
# - `fsdp_tensor` has a mesh of two axes, for both partitions at once.
#
# The text must stay the same. The logits differ by rounding.

# %%
most, two = {"tensor": math.gcd(DEVICES, model.config.num_heads)}, {"tensor": math.gcd(DEVICES, 2)}
MESHES = {"tensor": most, "data_tensor": two, "fsdp": {}, "fsdp_tensor": two}
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
        ends = shard.index[0].indices(array.shape[0]), shard.index[-1].indices(array.shape[-1])
        found[ends].append(shard.device.id)
    return found


placed = {}
for name, mesh in MESHES.items():
    model, params, _ = mj.load(checkpoint, sharding=name, mesh=mesh)
    held[name] = collections.Counter()
    for shard in (shard for x in jax.tree.leaves(params) for shard in x.addressable_shards):
        held[name][shard.device.id] += shard.data.nbytes
    for kernel, (part, *_) in KERNELS.items():
        array = params["layers_0"][part][kernel]["kernel"]
        placed[name, kernel] = array.shape, blocks(array)
    text, found = answer(model, params, tokenizer)
    same = "the same text" if text == expected else f"ANOTHER TEXT: {text!r}"
    print(f"{name:12} {same}; largest difference of logits {np.abs(found - logits).max():.1e}")
    gate = params["layers_0"]["mlp"]["gate_proj"]["kernel"]
    jax.debug.visualize_array_sharding(gate, use_color=False)
    del params, gate, shard, array

# %% [markdown]
# ## Which device holds what
#
# Each square is a weight of the first layer. The numbers in a block are the devices that hold it.
# One device holds a white block; a darker block has more copies. (The drawings of
# `visualize_array_sharding` above show `gate_proj` without its copies.)

# %%
figure, grid = plt.subplots(len(KERNELS), len(MESHES), figsize=(9, 9), layout="constrained")
for (name, kernel), axes in zip(placed, grid.T.flat, strict=True):
    (rows, *_, columns), parts = placed[name, kernel]
    for ((top, bottom, _), (left, right, _)), devices in parts.items():
        grey = str(1 - 0.45 * (len(devices) - 1) / max(1, DEVICES - 1))
        block = plt.Rectangle((left, top), right - left, bottom - top, fc=grey, ec="black")
        axes.add_patch(block)
        label = "all" if len(devices) == DEVICES else " ".join(map(str, sorted(devices)))
        axes.annotate(label, block.get_center(), ha="center", va="center")
    axes.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[])
    _, down, across = KERNELS[kernel]
    axes.set(xlabel=f"{across}: {columns:,}", ylabel=f"{down}: {rows:,}")
    axes.set_title(f"{name}\n{kernel}" if kernel == "q_proj" else kernel)
plt.show()

# %% [markdown]
# The bytes of all weights on a device, counted from the actual shards:

# %%
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
sizes = [max(each.values()) for each in held.values()]
bars = axes.barh(list(held), np.array(sizes) / 1e6, color="0.8", edgecolor="black")
axes.bar_label(bars, [decimal(size) for size in sizes], padding=3)
axes.invert_yaxis()
axes.set(title="Weights on the device that holds most", xlabel="MB", xlim=(0, sizes[0] * 1.2e-6))
plt.show()

# %% [markdown]
# ## More devices than key-value heads
#
# Grouped-query attention ([arXiv 2305.13245](https://arxiv.org/abs/2305.13245)) has few key-value
# heads, K, and a mesh axis of t devices may be larger than K. The package then divides the axis
# into two. Along the first, gcd(t, K) devices hold different key-value heads. Along the second,
# each device holds a copy of these heads and a part of their query heads. Each key is stored t /
# gcd(t, K) times, and no key moves between devices. Mistral 7B has 32 query heads and 8 key-value
# heads:

# %%
seven = ModelConfig.from_name("mistral-7b-v0.3")
for size in (4, 8, 16, 32):
    split, sizes = split_kv_heads(seven, {"kv_heads": ("tensor",)}, {"tensor": size})
    kv = math.prod(sizes[axis] for axis in split["kv_heads"])
    print(f"tensor = {size:2}: mesh {sizes}, copies of each key and value: {size // kv}")

# %% [markdown]
# ## A layout that does not fit
#
# If a mesh does not divide the model evenly, `load` raises an error before it allocates anything,
# and names a size that works:

# %%
try:
    mj.load(checkpoint, sharding="tensor", mesh={"tensor": 3})
except ValueError as error:
    print(str(error).replace(str(CONFIG_DIR), "configs"))

# %% [markdown]
# ## What devices must send
#
# Under `tensor`, each device has some of the heads and a part of the MLP. The outputs of attention
# and of the MLP are sums over all devices, so each layer needs two all-reduces. The lookup of
# tokens in the embedding table, which is partitioned by vocabulary, needs one more. At the end the
# logits are gathered. The next cell compiles a decode step of Mistral 7B, cut to two layers, from
# shapes alone, and reads the exchanges from the compiled program. `planning/arithmetic.py` lists
# them without a compiler, and a test compares the two lists.

# %%
cut = dataclasses.replace(seven, num_layers=2)
layout = read_layout("tensor", cut) or Layout(jax.make_mesh((1,), ("device",)), ())
short = mj.Transformer(cut, jnp.bfloat16, layout.rules)
shapes = programs.shapes(layout, batch=8, length=4096, dtype="bfloat16")
compiled = programs.lower("decode", short, layout, shapes).compile()
found = [c for c in collectives.read(compiled.as_text(), DEVICES) if c.loops and c.shape]
for (kind, shape), times in collections.Counter((c.kind, c.shape) for c in found).items():
    print(f"{times:3} x {kind} of {shape}, as compiled for 2 layers")

model = mj.Transformer(seven, jnp.bfloat16, layout.rules)
listed = arithmetic.exchanges("decode", model, layout, shapes)
for each in listed:
    print(f"{each.times:3} x {each.kind} of {each.shape}, for all layers: {each.source}")
print(f"a device sends {decimal(round(arithmetic.sent(listed)))} in a step")

# %% [markdown]
# ## Ask the planner
#
# The planner compiles programs for devices that need not exist, and adds up memory, work and
# exchanges. It prints the shortest times that the hardware allows. For the bundled model:

# %%
command = [sys.executable, "-m", "mistral_jax.plan", "nano", "--sharding", "tensor"]
command += ["--devices", "4", "--hardware", "v5e", "--compiler", "cpu", "--batch", "8"]
print(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

# %% [markdown]
# The same for Mistral 7B on four chips:
#
# ```console
# $ python -m mistral_jax.plan mistral-7b-v0.3 --sharding tensor --devices 4 --hardware v5e \
#       --batch 32 --length 4096
# ```
#
# ## Next steps
#
# - [docs/scaling.md](../docs/scaling.md) shows that report and explains how to choose a layout.
# - [06_long_context](06_long_context.ipynb) measures the cache, which `tensor` partitions as well.
# - Source: [rules.py](../mistral_jax/parallel/rules.py),
#   [sharding.py](../mistral_jax/parallel/sharding.py) and
#   [planning/arithmetic.py](../mistral_jax/planning/arithmetic.py).
