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
# Mistral's weights come as PyTorch files, in two layouts; here Orbax keeps them, and reads each
# array straight onto its device. You will export a model to a Hugging Face folder, convert it back,
# and see that no byte was lost. On the way you will meet the one trap: between the two layouts,
# rows of two matrices change places. No PyTorch is needed.

# %%
# On Colab this installs the package; where it is installed already, it does nothing.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("mistral_jax") is None:
    source = "mistral-jax-flax[hub,train] @ git+https://github.com/mistral-jax/mistral_jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)

# %% [markdown]
# Name a model of your own here, and `prepare` converts it once, which for Mistral 7B takes 14.5 GB
# of disk. What describes a model then describes yours. What writes folders further down always uses
# the bundled model, so that there is no second copy of 7B.

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

# None is the bundled model; or a checkpoint's folder, or a name on the Hub, such as
# "mistralai/Mistral-7B-Instruct-v0.3".
MODEL = None
model, params, tokenizer = mj.load(prepare(MODEL))
config = model.config

# %% [markdown]
# ## What a folder holds
# `inspect` describes a folder of any format, before or after conversion, without reading a weight.

# %%
_, *facts = inspect(prepare(MODEL) or BUNDLED)  # the first names the folder
print("\n".join(f"{label:<14}{value}" for label, value in facts))

# %% [markdown]
# ## To a Hugging Face folder
# `to_torch` writes what Transformers loads: a description, a tokenizer, and the weights as
# safetensors. `find` recognises such a folder by its files, and hands out its tensors. They are
# views of the mapped file: a part of it is read when somebody looks there.

# %%
scratch = tempfile.TemporaryDirectory()  # gone when this notebook ends
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
# The conversion hangs on one table, `checkpoint/names.py`: what each tensor is called by us, by
# Mistral and by Hugging Face. Here is the first layer of your model. A file stores a matrix as
# (out, in), and so do we, with the heads unfolded: `NH D` becomes `N H D`. So the bytes are the
# same, but for the two matrices marked at the end: there the rows of official files move.

# %%
_, table, *_ = names.groups(config)  # the embedding stands before the first layer
print(f"{'ours':21}{'official':17}{'Hugging Face':25}file  here")
for row in table:
    official, hf = row.official.split(".", 2)[2], row.hf.split(".", 3)[3]
    print(f"{row.path[9:]:21}{official:17}{hf:25}{row.file_axes:5} {row.axes:6}", end="")
    print(row.shape(config), "*" if row.pairs else "")

# %% [markdown]
# ## Why rows of `wq` and `wk` move
# Rotary embedding (RoFormer, arXiv 2104.09864) takes the H numbers of a head in pairs, and turns
# each pair by an angle that grows with the token's position. Mistral's own files pair neighbours,
# 2i and 2i + 1; Hugging Face and we pair the halves, i and i + H / 2. Each number of a query is
# made by a row of `wq`, so these are two orders of rows. To see them, give every row its own number
# and send it through the table, with heads of 8:

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
axes.set_title("Partners move from neighbours to halves")
axes.spines[:].set_visible(False)
plt.show()

# %% [markdown]
# The official engine turns neighbours as complex numbers; we turn halves, of rows that have moved.
# Queries and keys come out in another order, but both in the same one. So their products, which are
# all that attention sees, agree:

# %%
x = jax.random.normal(jax.random.key(0), (2, 5, 1, 8))  # a query and a key at 5 positions
cos, sin = angles = rotary_angles(jnp.arange(5)[None], 8, config.rope_theta)
turned = (x[..., 0::2] + 1j * x[..., 1::2]) * (cos + 1j * sin)[:, :, None]
neighbours = jnp.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
halves = rotate(x[..., order], angles)
scores = [jnp.einsum("TNH,SNH->NTS", *y, precision="highest") for y in (neighbours, halves)]
print(f"largest difference of two scores: {jnp.abs(scores[0] - scores[1]).max():.1e}")

# %% [markdown]
# Whoever forgets this sees no error, for all shapes fit; the model only gets worse. With grouped
# queries (GQA, arXiv 2305.13245) `wq` has N heads and `wk` has K, and each must be cut into its own
# number. Here the keys alone are left in the official order:

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
# `to_orbax` reads either layout. What comes of it is a checkpoint folder, whole or not at all. Here
# the same weights go two ways, under other names and in another order of rows. They are one tree
# again, and back in their own layout each file is what it was, to the byte. A checkpoint records
# what it was made from, with a SHA-256 of each file.

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
    print(f"{name}: {sum(equal)} of {len(original)} arrays are equal; the same file again: {again}")
print((work / "from-official" / "config.json").read_text())

# %% [markdown]
# ## Another dtype
# Arrays keep the dtype of their file, unless you name another. Every bfloat16 is a float32, so that
# one changes nothing. float16 has finer steps but a smaller range: what is too small for it is
# rounded, and what is too large is refused rather than made infinite.

# %%
for dtype in ("bfloat16", "float32", "float16"):
    to_orbax(work / "hf", work / dtype, dtype=dtype)
    tree = flatten_dict(mj.load(work / dtype, dtype="float32")[1], sep="/")
    changed = sum(int((original[name] != tree[name]).sum()) for name in original)
    size = sum(file.stat().st_size for file in (work / dtype / "params").rglob("[0-9]*"))
    print(f"{dtype:9} {size / 1e6:5.1f} MB, {changed:,} numbers changed")

# %% [markdown]
# ## A broken file
# Downloads get cut off, and disks fail. What is not a whole checkpoint of finite numbers is refused
# in one sentence that names the place, and nothing half-written is left.

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
# Tensors are read, checked and written one at a time, so the largest bounds the memory, not the
# model. To see it, repeat the layers of the bundled model, and follow what Python and NumPy hold
# while each of these deeper models is converted.

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
axes.plot(sizes, peaks, "k-o", label="at most, while it is converted")
axes.set(xlabel="size of the model (MB)", ylabel="memory (MB)", ylim=0)
axes.set_title("Memory does not grow with the model")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Where to go on
# - [Convert](../docs/convert.md) has the command line, which does the same at a terminal, and takes
#   names on the Hub and PyTorch's own `.pth` and `.bin` files too.
# - [04_fine_tune](04_fine_tune.ipynb) trains adapters beside a converted model.
# - [The architecture](../docs/architecture.md) draws a tensor's way from a file to its shards.
#   Open `checkpoint/names.py` for the table, and `convert/to_orbax.py` for the conversion.
