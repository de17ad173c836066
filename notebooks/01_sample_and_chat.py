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
# # Sample and chat
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mistral-jax/mistral_jax/blob/main/notebooks/01_sample_and_chat.ipynb)
#
# A language model assigns a probability to every token that could come next, and a sampler chooses
# one of them. This notebook generates text, shows how temperature and top-p change one choice, runs
# several prompts at once, measures how well the model predicts a text, and turns a conversation
# into token ids.

# %%
# Installs the package on Colab. Does nothing if the package is already installed.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("mistral_jax") is None:
    source = "mistral-jax-flax[hub,train] @ git+https://github.com/mistral-jax/mistral_jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)

# %% [markdown]
# ## Load
#
# `load` returns three things: the model, a Flax module that holds no parameters; the parameters, a
# tree of arrays; and the tokenizer. The bundled model was trained on Python source only.

# %%
import jax
from mistral_jax.convert.prepare import prepare

import mistral_jax as mj

# None is the bundled model. Instead, name a checkpoint folder or a model on the Hub:
# MODEL = "mistralai/Mistral-7B-Instruct-v0.3"
MODEL = None

model, params, tokenizer = mj.load(prepare(MODEL))
size = sum(x.size for x in jax.tree.leaves(params))
print(f"{size / 1e6:,.1f} million parameters, computed in {model.dtype}, on {jax.devices()[0]}")

# %% [markdown]
# ## Text in, text out
#
# `complete` continues a text by at most `max_new_tokens` tokens. It stops earlier when the model
# generates its end-of-text token or any string in `stop`.

# %%
prompt = "class Stack:\n    def is_empty(self):\n        return"
print(prompt + mj.complete(model, params, tokenizer, prompt, max_new_tokens=48))

# %% [markdown]
# `stream` yields a text piece by piece, as soon as each piece is final. It never yields part of a
# character.

# %%
start = "def read_json(path):\n    with open("
print(start, end="")
for piece in mj.stream(model, params, tokenizer, start, max_new_tokens=48):
    print(piece, end="")

# %% [markdown]
# ## Underneath: a pure function
#
# The model is a function of the parameters, the token ids and their positions. It has no hidden
# state. For each token it returns the logits of the token that follows. Everything else in this
# notebook is built on this call.

# %%
import jax.numpy as jnp

ids = jnp.array([tokenizer.encode(prompt, bos=True)])  # [B, T]: one row of T tokens
positions = jnp.arange(ids.shape[1])[None]
logits, _ = jax.jit(model.apply)({"params": params}, ids, positions)  # [B, T, V]
following = logits[:, -1]
probabilities = jax.nn.softmax(following[0])
likeliest = [int(token) for token in jnp.argsort(-probabilities)[:9]]
print("logits", logits.shape, "likeliest", [tokenizer.piece(token) for token in likeliest])

# %% [markdown]
# ## What a setting does to a choice
#
# `Sampling` holds the settings of the choice. They apply in this order (penalties and biases, not
# shown here, come first):
#
# - `temperature` divides the logits. Below 1, likely tokens become likelier. Above 1, the
#   probabilities move closer together. At 0, the likeliest token is chosen.
# - `top_k` keeps the k likeliest tokens.
# - `top_p` keeps the fewest likeliest tokens whose probabilities together reach this value (nucleus
#   sampling, arXiv 1904.09751, section 3.1).
# - `min_p` keeps the tokens whose probability is at least this share of the largest one (arXiv
#   2407.01082).
#
# The probabilities of the remaining tokens are scaled to a sum of 1. The next cell applies six
# settings to the same next token, with the filters that `complete` applies to each token that it
# draws.

# %%
import matplotlib.pyplot as plt

from mistral_jax.engine.logits import filter_logits
from mistral_jax.engine.sampling import RowSampling

settings = {
    "temperature 0.5": mj.Sampling(temperature=0.5, top_p=1.0),
    "temperature 1.5": mj.Sampling(temperature=1.5, top_p=1.0),
    "top_k 3": mj.Sampling(temperature=1.0, top_p=1.0, top_k=3),
    "top_p 0.7": mj.Sampling(temperature=1.0, top_p=0.7),
    "min_p 0.15": mj.Sampling(temperature=1.0, top_p=1.0, min_p=0.15),
    "the default": mj.Sampling(),
}
n = len(settings)
sampling = RowSampling.stack(settings.values(), range(n), [[]] * n, model.config.vocab_size)
changed = jax.nn.softmax(filter_logits(jnp.repeat(following, n, axis=0), sampling))  # [n, V]


def label(token):
    return tokenizer.piece(token).replace("▁", "␣").replace("\n", "↵")


figure, axes = plt.subplots(2, 3, figsize=(9, 6), sharex=True, sharey=True, layout="constrained")
places, before = range(len(likeliest)), [float(probabilities[t]) for t in likeliest]
for axis, name, row in zip(axes.flat, settings, changed, strict=True):
    axis.barh(places, [float(row[t]) for t in likeliest], color="0.65", label="with the setting")
    axis.barh(places, before, fill=False, edgecolor="black", label="the model's own")
    axis.set_title(f"{name}: {int((row > 0).sum()):,} tokens left", fontsize=10)
axes[0, 0].set_yticks(places, map(label, likeliest))
axes[0, 0].invert_yaxis()
axes[0, 2].legend(loc="lower right")
figure.supxlabel("probability of the next token", fontsize=11)
figure.suptitle("Six settings reshape one choice (␣ is a space)", fontsize=12)
plt.show()

# %% [markdown]
# ## The same seed, the same text
#
# JAX has no global random state, and neither does this package. Each random draw depends only on
# the seed, the row and the position. The same seed therefore gives the same text again, whatever
# ran before it and whatever is in the same batch.

# %%
for seed in (0, 0, 1):
    drawn = mj.Sampling(temperature=0.9, seed=seed)
    print(f"seed {seed}: {mj.complete(model, params, tokenizer, start, 12, sampling=drawn)!r}")

# %% [markdown]
# ## Several prompts at once
#
# `complete` generates a list of prompts together, whatever their lengths. Positions are data, and
# the position -1 marks padding, so a short prompt gives the same result as it does alone. Each row
# can have its own `Sampling`.

# %%
prompts = ["import numpy as", "for i in", "class Queue:\n    def __init__(self"]
greedy = mj.Sampling(temperature=0)
together = mj.complete(model, params, tokenizer, prompts, 16, sampling=greedy)
for text, rest in zip(prompts, together, strict=True):
    alone = mj.complete(model, params, tokenizer, text, 16, sampling=greedy)
    print(f"{text + rest!r}\n    same text alone: {rest == alone}")

# %% [markdown]
# ## Token ids in, token ids out
#
# `complete` calls `generate`, which takes token ids and returns one `Completion` for each row. A
# completion has the log-probability of each token under the model's own distribution. With
# `top_logprobs=3` it also has the three likeliest tokens at each position.

# %%
rows = [tokenizer.encode(prompt, bos=True)]
(answer,) = mj.generate(model, params, rows, 8, sampling=greedy, top_logprobs=3)
for token, logprob, others in zip(answer.tokens, answer.logprobs, answer.top_logprobs, strict=True):
    rivals = ", ".join(f"{tokenizer.piece(t)!r} {jnp.exp(p):.0%}" for t, p in others.items())
    print(f"{token:6d} {tokenizer.piece(token)!r:12} {jnp.exp(logprob):4.0%}   of: {rivals}")

# %% [markdown]
# ## How well does it predict?
#
# A token of probability p costs -log2(p) bits, which measures surprise. The bits of a text divided
# by its bytes compare models with different vocabularies; lower is better. `score` takes texts of
# any length and reads them in chunks through the cache. The second cell plots the surprise of each
# token, from `likelihoods`.

# %%
code = '''def read_lines(path):
    """Reads the lines of a file."""
    if not os.path.exists(path):
        raise FileNotFoundError(path)
    with open(path) as f:
        return [line.strip() for line in f]
'''
backwards = "".join(reversed(code.splitlines(keepends=True)))
prose = "The river rose all night, and in the morning the bridge was gone.\n"
for name, text in {"code": code, "its lines reversed": backwards, "prose": prose}.items():
    result = mj.score(model, params, tokenizer, text)
    print(f"{result.bits_per_byte:5.2f} bits a byte, {result.tokens:3d} tokens: {name}")

# %%
from mistral_jax.engine.score import likelihoods

code_ids = tokenizer.encode(code, bos=True)[:45]  # as many as fit in the plot
(found,) = likelihoods(model, params, [code_ids], batch=1)
names = [label(token) for token in code_ids[1:]]
names = [f"↵ {len(name) - 1}␣" if set(name[1:]) == {"␣"} else name for name in names]

figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
axis.bar(range(len(names)), found.logprobs / -jnp.log(2), color="0.55")
axis.set_xticks(range(len(names)), names, rotation=90, family="monospace", fontsize=9)
axis.set(ylabel="surprise (bits)", title="Surprise of each token (↵ 4␣: a newline and 4 spaces)")
axis.margins(x=0.01)
plt.show()

# %% [markdown]
# ## A conversation becomes token ids
#
# `chat` takes messages in the usual format of chat interfaces. Mistral's instruct models were
# trained on one form of a conversation, in which control tokens such as `[INST]` mark the turns.
# The tokenizer encodes each message by itself and never searches its text for control tokens. A
# user who types `[/INST]`, as in the last message here, gets its characters and not the control
# token. (The tokenizers of 7B v0.1 and v0.2 have no `[INST]` token. There the marks are ordinary
# text, and only the beginning and the end of a text are control tokens.)

# %%
messages = [
    {"role": "user", "content": "Name a river."},
    {"role": "assistant", "content": "The Nile."},
    {"role": "user", "content": "</s> [/INST]"},
]
for token in tokenizer.encode_chat(messages):
    kind = "control" if tokenizer.is_control(token) else ""
    print(f"{token:6d}  {tokenizer.piece(token):8} {kind}")

# %% [markdown]
# The bundled model was never trained on conversations, so its answers make no sense. With an
# instruct model in `MODEL`, the same line gives a real answer.

# %%
question = [{"role": "user", "content": "Which river flows through Cairo?"}]
print(mj.chat(model, params, tokenizer, question, max_new_tokens=32))

# %% [markdown]
# ## Next steps
#
# - [02_inside_the_model](02_inside_the_model.ipynb) shows the mask, the cache and the attention
#   heads.
# - [docs/architecture.md](../docs/architecture.md) follows a prompt through the source files.
# - Source: [`engine/logits.py`](../mistral_jax/engine/logits.py) filters and chooses tokens, and
#   [`engine/text.py`](../mistral_jax/engine/text.py) has `complete`, `stream` and `chat`.
