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
# # Convert a checkpoint, both ways
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mistral-jax/mistral_jax/blob/main/notebooks/03_convert.ipynb)
#
# Mistral's weights come as PyTorch files, in two formats. This package stores them as Orbax
# checkpoints, from which it loads each array directly onto its device. This notebook exports a
# model to a Hugging Face folder, converts it back, and checks that no byte was lost. It also
# explains the one difference between the two formats that is easy to miss: the rows of two matrices
# are in a different order. PyTorch is not needed.

# %%
# Installs the package on Colab. Does nothing if the package is already installed.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("mistral_jax") is None:
    source = "mistral-jax-flax[hub,train] @ git+https://github.com/mistral-jax/mistral_jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)

# %% [markdown]
# If you name a model of your own here, `prepare` converts it once, which takes 14.5 GB of disk
# space for Mistral 7B. The cells that describe a model then describe yours. The cells that write
# folders always use the bundled model, so that there is no second copy of a 7B model.

# %%
import dataclasses
import tempfile
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax.traverse_util import flatten_dict
from mistral_jax.convert.inspect import inspect
from mistral_jax.convert.prepare import prepare
from mistral_jax.convert.source import find
from mistral_jax.convert.to_orbax import to_orbax
from mistral_jax.convert.to_torch import to_torch

import mistral_jax as mj
from mistral_jax.checkpoint import names
from mistral_jax.checkpoint.checkpoint import BUNDLED
from mistral_jax.model.rope import rotary_angles, rotate

# None is the bundled model. Instead, name a checkpoint folder or a model on the Hub, such as
# "mistralai/Mistral-7B-Instruct-v0.3".
MODEL = None
model, params, tokenizer = mj.load(prepare(MODEL))
config = model.config

# %% [markdown]
# ## What a folder holds
# `inspect` describes a folder of any format, before or after conversion, without reading any
# weights.

# %%
_, *facts = inspect(prepare(MODEL) or BUNDLED)  # the first line names the folder
print("\n".join(f"{label:<14}{value}" for label, value in facts))

# %% [markdown]
# ## To a Hugging Face folder
# `to_torch` writes what Transformers loads: a config, a tokenizer, and the weights as safetensors.
# `find` recognises such a folder by its files and returns its tensors. The tensors are views of
# memory-mapped files, so a part of a file is read only when something accesses it.

# %%
scratch = tempfile.TemporaryDirectory()  # deleted when this notebook ends
work = Path(scratch.name)
to_torch(BUNDLED, work / "hf")
for file in sorted((work / "hf").iterdir()):
    print(f"{file.stat().st_size:12,} bytes  {file.name}")
print((work / "hf" / "config.json").read_text())
tensors = {name: place.array for name, (place,) in find(work / "hf").tensors().items()}
for name, tensor in list(tensors.items())[:11]:
    print(f"{name:<50} {tensor.dtype!s:<9} {tensor.shape}")
print(f"{len(tensors)} tensors, loaded: {sum(x.flags.owndata for x in tensors.values())}")

# %% [markdown]
# ## One table of names
# The conversion is built on one table, `checkpoint/names.py`, which has the name of each tensor in
# this package, in Mistral's files and in Hugging Face's. The next cell prints the entries for the
# first layer of your model. Files store a matrix as (out, in). This package does the same, with the
# heads in an axis of their own: (N * H, D) becomes (N, H, D). The bytes are identical, except for
# the two matrices with an asterisk at the end: the conversion permutes their rows when it reads
# official files.

# %%
_, table, *_ = names.groups(config)  # the embedding comes before the first layer
print(f"{'ours':21}{'official':17}{'Hugging Face':25}{'file':14}here")
for row in table:
    official, hf = row.official.split(".", 2)[2], row.hf.split(".", 3)[3]
    print(f"{row.path[9:]:21}{official:17}{hf:25}{row.file_shape(config)!s:14}", end="")
    print(row.shape(config), "*" if row.pairs else "")

# %% [markdown]
# ## Why the rows of `wq` and `wk` are permuted
# Rotary embedding (RoFormer, arXiv 2104.09864) takes the H numbers of a head in pairs, and rotates
# each pair by an angle that grows with the token's position. Mistral's own files pair neighbours,
# 2i and 2i + 1. Hugging Face and this package pair the halves, i and i + H / 2. Each row of `wq`
# computes one number of a query, so the two conventions order the rows differently. To show this,
# the next cell numbers the rows of a matrix and converts it with the table, for heads of width 8:

# %%
small = dataclasses.replace(config, head_dim=8)
q_row = next(row for row in table if "q_proj" in row.path)
numbers = np.arange(small.num_heads * 8)[:, None].repeat(small.embed_dim, axis=1)
order = q_row.from_file(numbers, small, official=True)[0, :, 0]

figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
for ours, official in enumerate(order):
    pair = official // 2
    axes.plot([0.25, 0.75], [official, ours], color="0.3", linewidth=1)
    for x, y in ((0, official), (0.75, ours)):
        axes.barh(y, 0.25, 0.8, x, color=f"{1 - 0.12 * pair}", edgecolor="black")
        axes.text(x + 0.125, y, f"pair {pair}", ha="center", va="center")
axes.set_xticks([0.125, 0.875], ["official: neighbours", "Hugging Face, ours: halves"])
axes.set(xlim=(-0.05, 1.1), ylim=(7.6, -0.6), ylabel="row of the head")
axes.set_title("Pairs move from neighbours to halves")
axes.spines[:].set_visible(False)
plt.show()

# %% [markdown]
# The official code rotates neighbours as complex numbers. This package rotates halves, with
# permuted rows. The numbers of queries and keys then come in another order, but in the same one for
# both. Their dot products, which are all that attention uses, are therefore equal:

# %%
x = jax.random.normal(jax.random.key(0), (2, 5, 1, 8))  # a query and a key at 5 positions
cos, sin = angles = rotary_angles(jnp.arange(5)[None], 8, config.rope_theta)
turned = (x[..., 0::2] + 1j * x[..., 1::2]) * (cos + 1j * sin)[:, :, None]
neighbours = jnp.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
halves = rotate(x[..., order], angles)
scores = [jnp.einsum("TNH,SNH->NTS", *y, precision="highest") for y in (neighbours, halves)]
print(f"largest difference of two scores: {jnp.abs(scores[0] - scores[1]).max():.1e}")

# %% [markdown]
# Without the permutation no error occurs, because all shapes fit, but the model predicts worse.
# With grouped queries (GQA, arXiv 2305.13245), `wq` has N heads and `wk` has K, and each must be
# divided into its own number of heads. The next cell leaves only the keys in the official order:

# %%
wrong = {**params}
for i in range(config.num_layers):
    layer, kernel = params[f"layers_{i}"], params[f"layers_{i}"]["attn"]["k_proj"]["kernel"]
    pairs = kernel.reshape(len(kernel), 2, -1, config.embed_dim).swapaxes(1, 2)
    attention = {**layer["attn"], "k_proj": {"kernel": pairs.reshape(kernel.shape)}}
    wrong[f"layers_{i}"] = {**layer, "attn": attention}
text = Path(dataclasses.__file__).read_text()[:4000]
for label, weights in (("as converted", params), ("keys not moved", wrong)):
    print(f"{label:15} {mj.score(model, weights, tokenizer, text).bits_per_byte:.3f} bits a byte")

# %% [markdown]
# ## To Orbax, and back
# `to_orbax` reads either format and writes a complete checkpoint folder or nothing. The next cell
# converts the same weights from both formats, with different names and orders of rows. Both give
# the same tree. Exported to its own format again, each gives the same file, byte for byte. A
# checkpoint records the files that it was made from, with a SHA-256 of each.

# %%
to_torch(BUNDLED, work / "official", format="official")
original = flatten_dict(mj.load(dtype="bfloat16")[1], sep="/")
for name in ("hf", "official"):
    to_orbax(work / name, work / f"from-{name}")
    tree = flatten_dict(mj.load(work / f"from-{name}", dtype="bfloat16")[1], sep="/")
    equal = [np.asarray(tree[key]).tobytes() == np.asarray(original[key]).tobytes() for key in tree]
    to_torch(work / f"from-{name}", work / f"{name}-again", format=name)
    (file,) = (work / name).glob("*.safetensors")
    again = (work / f"{name}-again" / file.name).read_bytes() == file.read_bytes()
    print(f"{name}: {sum(equal)} of {len(original)} arrays are equal; same file again: {again}")
print((work / "from-official" / "config.json").read_text())

# %% [markdown]
# ## Another dtype
# Arrays keep the dtype of their file, unless you name another. Every bfloat16 number is also a
# float32 number, so converting to float32 changes no values. float16 has finer steps but a smaller
# range. Numbers that are too small for it are rounded. For a number that is too large, `to_orbax`
# raises an error instead of storing infinity.

# %%
for dtype in ("bfloat16", "float32", "float16"):
    to_orbax(work / "hf", work / dtype, dtype=dtype)
    tree = flatten_dict(mj.load(work / dtype, dtype="float32")[1], sep="/")
    changed = sum(int((original[name] != tree[name]).sum()) for name in original)
    size = sum(file.stat().st_size for file in (work / dtype / "params").rglob("[0-9]*"))
    print(f"{dtype:9} {size / 1e6:5.1f} MB, {changed:,} numbers changed")

# %% [markdown]
# ## A broken file
# Downloads can be cut off, and disks can fail. `to_orbax` refuses anything but a complete
# checkpoint of finite numbers. The error is one sentence that names the place, and no partial
# output remains.

# %%
to_torch(BUNDLED, work / "broken")
file = work / "broken" / "model.safetensors"
file.write_bytes(file.read_bytes()[:1_000_000])
try:
    to_orbax(work / "broken", work / "never")
except ValueError as error:
    print(str(error).replace(f"{work}/", ""))
print("left behind:", [path.name for path in work.iterdir() if "never" in path.name])

# %% [markdown]
# ## Memory
# The conversion reads, checks and writes one tensor at a time, so its memory depends on the largest
# tensor and not on the size of the model. To show this, the next cell makes deeper models by
# repeating the layers of the bundled model, and measures how much memory Python and NumPy allocate
# while each of them is converted.

# %%
nano, bundled, _ = mj.load(dtype="bfloat16")
sizes, peaks = [], []
for depth in (4, 8, 16, 32):
    deep = bundled | {f"layers_{i}": bundled[f"layers_{i % 4}"] for i in range(depth)}
    mj.save(work / "deep", dataclasses.replace(nano.config, num_layers=depth), deep, overwrite=True)
    to_torch(work / "deep", work / "deep-hf", overwrite=True)
    tracemalloc.start()
    to_orbax(work / "deep-hf", work / "deep-again", overwrite=True)
    peaks.append(tracemalloc.get_traced_memory()[1] / 1e6)
    tracemalloc.stop()
    sizes.append(sum(array.nbytes for array in jax.tree.leaves(deep)) / 1e6)

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.plot(sizes, sizes, "k--s", label="the whole model")
axes.plot(sizes, peaks, "k-o", label="peak during conversion")
axes.set(xlabel="size of the model (MB)", ylabel="memory (MB)", ylim=0)
axes.set_title("Memory does not grow with the model")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Next steps
# - [Convert](../docs/convert.md) describes the command line, which does the same and also takes
#   names on the Hub and PyTorch's own `.pth` and `.bin` files.
# - [04_fine_tune](04_fine_tune.ipynb) trains adapters for a converted model.
# - [The architecture](../docs/architecture.md) follows a tensor from a file to its shards.
# - Source: `checkpoint/names.py` has the table, and `convert/to_orbax.py` has the conversion.
