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
# Mistral's weights come as PyTorch files, in two layouts; here they are kept by Orbax, which reads
# each array straight onto its device. You will export a model to a Hugging Face folder, convert it
# back, and see that no byte was lost. On the way you will meet the one trap: between the layouts,
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
# Name a model of your own here. `prepare` converts it once, which for Mistral 7B takes 14.5 GB of
# disk; everything that describes a model then describes yours. What writes further folders uses the
# bundled model, whatever is named here, so that no second copy of 7B is made.

# %%
import dataclasses
import hashlib
import json
import shutil
import tempfile
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax.traverse_util import flatten_dict
from IPython.display import Markdown
from mistral_jax.convert import names
from mistral_jax.convert.inspect import inspect
from mistral_jax.convert.prepare import prepare
from mistral_jax.convert.source import find
from mistral_jax.convert.to_orbax import to_orbax
from mistral_jax.convert.to_torch import to_torch

import mistral_jax as mj
from mistral_jax.checkpoint import BUNDLED
from mistral_jax.model.rope import rotary_angles, rotate

# None is the bundled model; or a checkpoint's folder, or a name on the Hub, such as
# "mistralai/Mistral-7B-Instruct-v0.3".
MODEL = None
model, params, tokenizer = mj.load(prepare(MODEL))
config = model.config

# %% [markdown]
# ## What a folder holds
#
# `inspect` describes a folder of any format, before or after conversion, without reading a weight:
# the shape of the model, what it takes to load, and what its cache takes.

# %%
for label, value in inspect(prepare(MODEL) or BUNDLED):
    if label != "folder":
        print(f"{label:<14}{value}")

# %% [markdown]
# ## To a Hugging Face folder
#
# `to_torch` writes what Transformers loads: a description, a tokenizer, and the weights as
# safetensors.

# %%
work = Path(tempfile.mkdtemp())


def list_files(folder):
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            print(f"{file.stat().st_size:12,} bytes  {file.relative_to(folder)}")


to_torch(BUNDLED, work / "hf")
list_files(work / "hf")
print((work / "hf" / "config.json").read_text())

# %% [markdown]
# `find` recognises the folder by its files, and hands out its tensors. They are views of the mapped
# file: the operating system reads a page of it when somebody looks there.

# %%
tensors = {name: place.array for name, (place,) in find(work / "hf").tensors().items()}
for name, tensor in list(tensors.items())[:11]:
    print(f"{name:<50} {tensor.dtype!s:<9} {tensor.shape}")
print(f"... {len(tensors)} tensors, of which in memory of their own:", end=" ")
print(sum(tensor.flags.owndata for tensor in tensors.values()))

# %% [markdown]
# ## One table of names
#
# The whole conversion hangs on one table, `convert/names.py`: what each tensor is called by us, by
# Mistral and by Hugging Face. Here it is for the first layer of your model. A file stores a matrix
# as (out, in), and so do we, with the heads unfolded: `NH D` becomes `N H D`. The bytes stay where
# they are, but for the two rows marked in the last column.

# %%
_, table, *_ = names.groups(config)  # the embedding stands before the first layer
lines = [
    "| ours | official | Hugging Face | in a file | ours | rows move |",
    "|---|---|---|---|---|---|",
]
for row in table:
    shapes = f"{row.file_axes}: {row.file_shape(config)} | {row.axes}: {row.shape(config)}"
    cells = f"`{row.path}` | `{row.official}` | `{row.hf}` | {shapes}"
    lines.append(f"| {cells} | {'yes' if row.pairs else ''} |")
Markdown("\n".join(lines))

# %% [markdown]
# ## Why rows of `wq` and `wk` move
#
# Rotary embedding (RoFormer, arXiv 2104.09864) takes the H numbers of a head in pairs, and turns
# each pair by an angle that grows with the token's position. Which numbers make a pair is a matter
# of taste. Mistral's own files pair neighbours, 2i and 2i + 1. Hugging Face and we pair the halves,
# i and i + H / 2, which needs no shuffling at run time. A number of a query is made by a row of
# `wq`, so the two tastes are two orders of rows.
#
# To see the order, give every row its own number and send it through the table. H is 8 here.

# %%
small = dataclasses.replace(config, head_dim=8)
q_row = next(row for row in table if "q_proj" in row.path)
numbers = np.arange(small.num_heads * 8)[:, None].repeat(small.embed_dim, axis=1)
order = q_row.from_file(numbers, small, official=True)[0, :, 0]
print("our rows of the first head are the official rows", order.tolist())

# %%
figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
greys = ["white", "0.85", "0.65", "0.4"]
for ours, official in enumerate(order):
    pair = official // 2
    axes.plot([0.25, 0.75], [official, ours], color="0.3", linewidth=1)
    for x, y in ((0.12, official), (0.88, ours)):
        axes.barh(y, 0.26, 0.8, x - 0.13, color=greys[pair], edgecolor="black", zorder=2)
        axes.text(x, y, f"pair {pair}", ha="center", va="center", zorder=3)
axes.set_xticks([0.12, 0.88], ["official: neighbours", "Hugging Face and ours: halves"])
axes.set(
    ylim=(7.6, -0.6), ylabel="row of the head", title="Partners move from neighbours to halves"
)
axes.spines[:].set_visible(False)
plt.show()

# %% [markdown]
# A rotation of neighbours, as the official engine does it with complex numbers, and ours of halves
# agree, if the rows have moved; the queries come out in the other order, and so do the keys. Their
# products, all that attention sees, are the same.

# %%
key_of_q, key_of_k = jax.random.split(jax.random.key(0))
q, k = (jax.random.normal(key, (1, 5, 1, 8)) for key in (key_of_q, key_of_k))
cos, sin = angles = rotary_angles(jnp.arange(5)[None], 8, config.rope_theta)


def rotate_neighbours(x):
    turned = jax.lax.complex(x[..., 0::2], x[..., 1::2]) * jax.lax.complex(cos, sin)[:, :, None]
    return jnp.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def scores(q, k):
    return jnp.einsum("BTNH,BSNH->BNTS", q, k, precision="highest")


official = scores(rotate_neighbours(q), rotate_neighbours(k))
ours = scores(rotate(q[..., order], angles), rotate(k[..., order], angles))
print(f"largest difference of two scores: {jnp.abs(official - ours).max():.1e}")

# %% [markdown]
# A converter that forgets it makes no error that anybody sees: all shapes fit. The model only gets
# worse. With grouped queries (GQA, arXiv 2305.13245) `wq` has N heads and `wk` has K, and each must
# be cut into its own number of them. Here the keys alone are left in the official order:

# %%
k_row = next(row for row in table if "k_proj" in row.path)
wrong = dict(params)
for i in range(config.num_layers):
    layer, kernel = wrong[f"layers_{i}"], wrong[f"layers_{i}"]["attn"]["k_proj"]["kernel"]
    K, H, D = kernel.shape
    official_order = kernel.reshape(K, 2, H // 2, D).swapaxes(1, 2).reshape(K, H, D)
    attention = {**layer["attn"], "k_proj": {"kernel": official_order}}
    wrong[f"layers_{i}"] = {**layer, "attn": attention}

text = Path(dataclasses.__file__).read_text()[:4000]
for label, weights in (("as converted", params), ("keys not permuted", wrong)):
    print(f"{label:18} {mj.score(model, weights, tokenizer, text).bits_per_byte:.3f} bits a byte")
del wrong

# %% [markdown]
# ## To Orbax
#
# `to_orbax` reads either layout. The result is a checkpoint folder: an architecture with its
# provenance, the tokenizer, and a file or more for each array. It appears whole or not at all.

# %%
to_torch(BUNDLED, work / "official", format="official")
list_files(work / "official")
for name in ("hf", "official"):
    to_orbax(work / name, work / f"from-{name}")
print(json.dumps(json.loads((work / "from-official" / "config.json").read_text()), indent=2))

# %% [markdown]
# The same weights went two ways, under other names and in another order of rows. What came of them
# is one tree:

# %%


def leaves(folder):
    _, tree, _ = mj.load(folder, dtype="bfloat16")
    return {path: np.asarray(array) for path, array in flatten_dict(tree, sep="/").items()}


def same(one, other):
    assert one.keys() == other.keys()
    return sum(one[name].tobytes() == other[name].tobytes() for name in one)


original = leaves(BUNDLED)
for name in ("from-hf", "from-official"):
    print(f"{name:14} {same(original, leaves(work / name))} of {len(original)} arrays are equal")

# %% [markdown]
# ## And back
#
# The other way round, from Orbax to each of the two layouts: every tensor is equal to the byte, and
# so is the whole file.

# %%
for name in ("hf", "official"):
    to_torch(work / f"from-{name}", work / f"{name}-again", format=name)
    for file in sorted((work / name).glob("*.safetensors")):
        again = work / f"{name}-again" / file.name
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (file, again)]
        print(f"{name:9} {file.name}: {digests[0][:16]}... and {digests[1][:16]}...")

# %% [markdown]
# ## Another dtype
#
# Arrays keep the dtype of their file, unless you name another. Every bfloat16 is a float32, so the
# wider one costs bytes and changes nothing. float16 has a finer mantissa but a smaller range: what
# is too small is rounded, and a number too large for it would be refused rather than become
# infinite.

# %%
for dtype in ("bfloat16", "float32", "float16"):
    to_orbax(work / "hf", work / dtype, dtype=dtype)
    _, tree, _ = mj.load(work / dtype, dtype="float32")
    flat = flatten_dict(tree, sep="/")
    changed = sum(int((original[name] != flat[name]).sum()) for name in original)
    size = sum(file.stat().st_size for file in (work / dtype).rglob("*"))
    print(f"{dtype:9} {size / 1e6:5.1f} MB, {changed:,} numbers changed")

# %% [markdown]
# ## A broken file
#
# Downloads get cut off, and disks fail. What is not a whole checkpoint of finite numbers is refused
# in one sentence that names the place, and nothing half-written is left behind.

# %%


def cut_short(folder):
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(1_000_000)


def spoil(folder):
    values = np.memmap(folder / "model.safetensors", np.uint16, "r+")
    values[-5] = 0x7FC0  # what bfloat16 calls not a number


def forget_theta(folder):
    fields = json.loads((folder / "config.json").read_text())
    del fields["rope_theta"]
    (folder / "config.json").write_text(json.dumps(fields))


for damage in (cut_short, spoil, forget_theta):
    shutil.copytree(work / "hf", work / damage.__name__)
    damage(work / damage.__name__)
    try:
        to_orbax(work / damage.__name__, work / "never")
    except ValueError as error:
        print(str(error).replace(f"{work}/", ""))
print("left behind:", [path.name for path in work.iterdir() if "never" in path.name])

# %% [markdown]
# ## Memory
#
# Tensors are read, checked and written one at a time, so memory is bounded by the largest and not
# by the model. To see it, make deeper models out of the bundled one by repeating its layers, and
# follow what NumPy and Python hold while each is converted.

# %%
nano, bundled, _ = mj.load(dtype="bfloat16")
base = nano.config
sizes, peaks = [], []
for depth in (4, 8, 16, 32):
    tree = {name: bundled[name] for name in ("embed", "final_norm", "lm_head")}
    tree |= {f"layers_{i}": bundled[f"layers_{i % base.num_layers}"] for i in range(depth)}
    deep = dataclasses.replace(base, num_layers=depth)
    mj.save(work / "deep", deep, tree, overwrite=True)
    to_torch(work / "deep", work / "deep-hf", overwrite=True)
    tracemalloc.start()
    to_orbax(work / "deep-hf", work / "deep-again", overwrite=True)
    peaks.append(tracemalloc.get_traced_memory()[1] / 1e6)
    tracemalloc.stop()
    sizes.append(sum(array.nbytes for array in jax.tree.leaves(tree)) / 1e6)

# %%
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.plot(sizes, sizes, "k--", marker="s")
axes.plot(sizes, peaks, "k-", marker="o")
axes.text(sizes[-1], sizes[-1], "the whole model  ", ha="right", va="center")
axes.text(sizes[-1], peaks[-1] + 2, "converting it", ha="right", va="bottom")
axes.set(xlabel="size of the model (MB)", ylabel="memory (MB)", ylim=0)
axes.set_title("Memory does not grow with the model")
plt.show()

# %% [markdown]
# The command line does the same: `python -m mistral_jax.convert to-orbax SOURCE TARGET`, `to-torch`
# and `inspect`. There a source may also be a name on the Hub, and `--format` chooses where a folder
# holds both layouts. Mistral's `consolidated.*.pth` and Hugging Face's `pytorch_model.bin` are read
# too, by a reader that runs no code out of them.

# %%
shutil.rmtree(work)

# %% [markdown]
# ## Where to go on
#
# - [04_fine_tune](04_fine_tune.ipynb) trains adapters beside a converted model.
# - [The architecture](../docs/architecture.md) draws the way of a tensor from a file to its shards.
# - Open `convert/names.py` for the table, and `convert/to_orbax.py` for the conversion: each is one
#   short file.
