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
# # Fine-tune with LoRA
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mistral-jax/mistral_jax/blob/main/notebooks/04_fine_tune.ipynb)
#
# A base model continues text and does not answer questions. This notebook trains one to answer a
# sentence about a function with the function's signature, and then to stop. The training pairs come
# from Python's standard library. The notebook shows which part of an example the model learns, what
# LoRA adds to the model, and how the model does on held-out pairs before and after training.

# %%
# Installs the package on Colab. Does nothing if the package is already installed.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("mistral_jax") is None:
    source = "mistral-jax-flax[hub,train] @ git+https://github.com/mistral-jax/mistral_jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)

# %% [markdown]
# With a model of your own, this notebook needs one GPU or TPU that holds its weights in bfloat16
# (14.5 GB for 7B) and the activations of a few short rows.

# %%
import ast
import json
import re
import tempfile
import zlib
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from flax.traverse_util import flatten_dict
from mistral_jax.convert.prepare import prepare

import mistral_jax as mj
from mistral_jax.checkpoint.lora import Lora, init_adapters
from mistral_jax.engine.score import likelihoods
from mistral_jax.training import curve, run
from mistral_jax.training.data import records
from mistral_jax.training.recipe import Data, Recipe

# None is the bundled model. Instead, name a checkpoint folder or a model on the Hub, such as
# "mistralai/Mistral-7B-Instruct-v0.3".
MODEL = None
checkpoint = prepare(MODEL)
model, params, tokenizer = mj.load(checkpoint)

# %% [markdown]
# ## The examples
# The source of Python's standard library is available wherever this notebook runs. `ast` finds its
# functions. The next cell takes a function if its docstring begins with a plain sentence that
# contains the words of the function's name, apart from their endings.

# %%
SENTENCE = re.compile(r"[A-Z][a-z]+( [A-Za-z0-9'(),;:/.-]+){2,12}\.")
LITTLE = re.compile("as|by|for|from|get|has|in|is|make|of|on|or|set|the|to|with")


def stems(text):
    words = (word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", text))
    return {word[:4] for word in words if not LITTLE.fullmatch(word)}


def find_pairs(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)):
            sentence = " ".join(doc.partition("\n\n")[0].split())
            names = [argument.arg for argument in node.args.args]
            told = "__" not in node.name and stems(node.name) <= stems(sentence)
            if SENTENCE.fullmatch(sentence) and told and len(names) <= 4:
                yield sentence, f"def {node.name.strip('_')}({', '.join(names)}):"


library, pairs = Path(ast.__file__).parent, {}
for file in sorted(library.rglob("*.py")):
    if not re.search(r"(site|dist)-packages|(\b|_)tests?/", file.relative_to(library).as_posix()):
        pairs.update(find_pairs(file.read_bytes()))
print(len(pairs), "pairs, such as", next(iter(pairs.items())))

# %% [markdown]
# A hash of the function's name decides which pairs are held out, so no name is in both parts. (The
# held-out pairs are new to the fine-tuning, but the bundled model may have read them in its own
# training.) Each line of a file is a conversation in the usual format of chat APIs.

# %%
scratch = tempfile.TemporaryDirectory()  # deleted at the end; use another folder to keep it
work, parts = Path(scratch.name), {"train": [], "held_out": []}
for sentence, signature in pairs.items():
    name = signature.partition("(")[0]
    parts["train" if zlib.crc32(name.encode()) % 20 else "held_out"].append((sentence, signature))
held_out = parts["held_out"] = parts["held_out"][:64]
for part, chosen in parts.items():
    with open(work / f"{part}.jsonl", "w") as file:
        for pair in chosen:
            turns = zip(("user", "assistant"), pair, strict=True)
            messages = [{"role": role, "content": text} for role, text in turns]
            print(json.dumps({"messages": messages}), file=file)
    print(len(chosen), part)

# %% [markdown]
# The model reads a conversation as the same token ids that `mj.chat` gives it. Only the answer and
# the token that ends it count in the loss, so the model also learns to stop.

# %%
examples = list(records.read([work / "held_out.jsonl"], tokenizer))
for token, weight in zip(examples[0].tokens.tolist(), examples[0].weights.tolist(), strict=True):
    print(f"{tokenizer.piece(token)!r:16}{'learnt' if weight else ''}")

# %% [markdown]
# ## Before
# The next cell measures these numbers on the held-out pairs:
#
# - `ended`: the share of answers that the model ends by itself;
# - `a signature`: the share of answers that are a signature and nothing else;
# - `a word of it`: the share of answers that are a signature whose function name has a word of the
#   sentence;
# - `by chance`: the same with the sentence of the next pair;
# - `loss`: the loss of the expected signatures, in nats a token.

# %%
sentences = [sentence for sentence, _ in held_out]
prompts = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in sentences]


def ask(params):
    rows = mj.generate(model, params, prompts, 32, sampling=mj.Sampling(temperature=0))
    return [(tokenizer.decode(row.tokens), row.finish_reason == "stop") for row in rows]


def measure(params, answers):
    found = likelihoods(model, params, [x.tokens.tolist() for x in examples], len(examples))
    loss = -sum(x.weights[1:] @ row.logprobs for x, row in zip(examples, found, strict=True))
    matches = [re.fullmatch(r"def (\w+)\((\w+(, \w+)*)?\):", text) for text, _ in answers]
    result = {"ended": np.mean([ended for _, ended in answers])}
    result["a signature"] = np.mean([match is not None for match in matches])
    for label, texts in (("a word of it", sentences), ("by chance", sentences[1:])):
        both = zip(matches, texts, strict=False)
        result[label] = np.mean([bool(m and stems(m[1]) & stems(text)) for m, text in both])
    return {**result, "loss": loss / sum(x.weights.sum() for x in examples)}


answers = ask(params)
before = measure(params, answers)
for i in range(0, len(answers), 16):
    print(f"{sentences[i]}\n    {answers[i][0]!r}")
{name: f"{value:.2f}" for name, value in before.items()}

# %% [markdown]
# ## What LoRA adds
# Low-rank adaptation (arXiv 2106.09685, section 4.1) leaves each weight W unchanged and adds to its
# output: `W x + (alpha / R) B A x`. A projects an input to R numbers, and B projects these to the
# outputs. B starts as zeros. Only A and B have gradients and optimizer state.

# %%
lora, kernels = Lora(rank=16, alpha=32.0), flatten_dict(params)
fresh = flatten_dict(init_adapters(lora, params, jax.random.key(0)))
print(f"{'layer 0':16}{'weight':18}{'A':18}B")
for path in [path for path in kernels if path[0] == "layers_0" and (*path[:-1], "lora_a") in fresh]:
    a, b = fresh[*path[:-1], "lora_a"].shape, fresh[*path[:-1], "lora_b"].shape
    print(f"{'/'.join(path[1:-1]):16}{kernels[path].shape!s:18}{a!s:18}{b}")
added, whole = (sum(x.size for x in tree.values()) for tree in (fresh, kernels))
print(f"{added:,} parameters beside {whole:,}: {added / whole:.2%}")

# %% [markdown]
# ## Training
# A recipe contains everything that determines what a run computes; the files in `configs/training/`
# have the same fields. `run.train` packs the examples into rows of `context` tokens, in which no
# example sees another. If a run is stopped, the same call continues it. A small model needs a much
# higher learning rate.

# %%
recipe = Recipe(
    checkpoint=checkpoint and str(checkpoint),
    data=Data((str(work / "train.jsonl"),), validation=(str(work / "held_out.jsonl"),)),
    lora=lora,
    context=128,
    rows=4,
    steps=80,
    warmup_steps=10,
    learning_rate=4e-3 if MODEL is None else 2e-4,
    validate_every=20,
)


def report(entry):
    if "validation_loss" in entry:
        print(f"step {entry['step']:3}: {entry['validation_loss']:.3f} on pairs held out")


params = kernels = fresh = None  # frees memory, because the run loads the model itself
outcome = run.train(recipe, work / "run", report, tell=print)

# %% [markdown]
# Each step writes a line to `curve.jsonl`. In the steep beginning, the model learns the form:
# `def`, brackets, the end. It learns more slowly which words to use. Where the two lines separate,
# it memorises training pairs.

# %%
entries = curve.read(work / "run" / "curve.jsonl")
figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
training, validation = (curve.points(entries, name) for name in ("loss", "validation_loss"))
axes.plot(*np.transpose(training), color="0.6", linewidth=1, label="each step")
axes.plot(*np.transpose(validation), "k--o", markersize=5, label="pairs held out")
axes.set(xlabel="step", ylabel="loss (nats a token)", ylim=0, title="The form comes first")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## After
# `lora=` loads adapters together with a model. The next cell measures the same numbers again and
# prints some answers:

# %%
model, params, _ = mj.load(checkpoint, lora=outcome.result)
answers = ask(params)
for name, value in measure(params, answers).items():
    print(f"{name:14}{before[name]:6.2f} -> {value:5.2f}")
for i in range(0, len(answers), 12):
    print(f"{sentences[i]}\n    wanted   {held_out[i][1]}\n    answered {answers[i][0]}")

# %% [markdown]
# ## What was saved
# The adapter is in PEFT's format: `peft.PeftModel.from_pretrained` loads the folder unchanged.
# `merge=True` adds the products of the adapters to the weights. The result is a plain model, which
# `mj.save` saves as a checkpoint and `to_torch` exports. It gives the same answers, up to rounding.

# %%
for file in sorted(outcome.result.iterdir()):
    print(f"{file.stat().st_size:12,} bytes  {file.name}")
params = None
model, merged, _ = mj.load(checkpoint, lora=outcome.result, merge=True)
same = sum(answer == answers[i] for i, answer in enumerate(ask(merged)))
print(f"{same} of {len(answers)} answers are the same")

# %% [markdown]
# ## Next steps
# - [Fine-tuning](../docs/finetuning.md) describes the command line and other methods:
#   `quantize="nf4"` in the recipe above is QLoRA, `lora=None` with a lower learning rate trains all
#   parameters, and `dpo=Preference()` learns from pairs of answers.
# - [03_convert](03_convert.ipynb) exports a model.
# - Source: `mistral_jax/checkpoint/lora.py` makes adapters.
