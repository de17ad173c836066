"""Pretraining: builds the job of training a new model on the Python source installed here."""

import functools
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mistral_jax.checkpoint import checksums, folder
from mistral_jax.model.transformer import Transformer, stack_layers, unstack_layers
from mistral_jax.parallel.sharding import Layout, abstract_params, read_layout
from mistral_jax.tokens.tokenizer import Tokenizer
from mistral_jax.training.data import batches, corpus
from mistral_jax.training.data.vocabulary import tokenize, train_vocabulary
from mistral_jax.training.job import Job, check_memory, optimizer_of, save_model, trained_model
from mistral_jax.training.loss import make_loss_fn
from mistral_jax.training.recipe import Recipe
from mistral_jax.training.states import create_state
from mistral_jax.training.step import Params, TrainState


def prepare(recipe: Recipe, path: Path) -> None:
    """Trains the vocabulary of a run and encodes its corpus, as `<path>/data`."""
    with folder.whole(path / "data") as part:
        _write_data(recipe, part)
        checksums.write(part)


def make_job(recipe: Recipe, path: Path, sharding=None, mesh=None) -> Job:
    """Builds the job of training a new model; `prepare` has filled the run's folder.

    Args and errors are those of `run.train`.
    """
    config = recipe.model_config
    layout = read_layout(sharding, config, mesh=mesh)
    check_memory(recipe, config, layout)
    model = Transformer(config)
    if layout is not None:
        model = model.clone(rules=layout.rules, backend=layout.backend())
    _, optimizer = optimizer_of(recipe, recipe.steps)
    params = initial_params(model, recipe.seed, layout, recipe.scan)
    trained = trained_model(recipe, model)
    tokens = {
        name: np.load(path / "data" / f"{name}.npy", mmap_mode="r")
        for name in ("train", "validation")
    }

    def feed(steps):
        order = {"context": recipe.context, "rows": recipe.rows, "seed": recipe.seed}
        for step in steps:
            yield batches.window_batch(step, tokens["train"], **order)

    def whole(state: TrainState) -> Params:
        return unstack_layers(state.trainable) if recipe.scan else state.trainable

    def export(state):
        target = path / "checkpoint"
        save_model(recipe, config, whole(state), state, target, path / "data" / "tokenizer.model")
        return target, ["--checkpoint", str(target), "def main("]

    return Job(
        model=trained.clone(remat=None, scan=False),
        tokenizer=Tokenizer.from_file(path / "data" / "tokenizer.model"),
        layout=layout,
        steps=recipe.steps,
        state=create_state(optimizer, params, layout=layout),
        loss_fn=make_loss_fn(trained, router_loss=recipe.router_loss),
        feed=feed,
        validation=functools.partial(
            batches.windows_in_order,
            tokens["validation"],
            context=recipe.context,
            rows=recipe.validation_rows,
        ),
        before=False,
        prompts=[],
        chat=False,
        params=whole,
        export=export,
    )


def initial_params(
    model: Transformer, seed: int, layout: Layout | None = None, scan: bool = False
) -> Params:
    """Initialises the parameters of a new model in float32, with equal values on every layout.

    Args:
      model: the model.
      seed: random seed.
      layout: partition over devices; None = one device.
      scan: whether to stack the layers.
    """
    token = jnp.zeros((1, 1), jnp.int32)

    def init(key):
        return nn.unbox(model.init(key, token, token))["params"]

    places = None
    if layout:
        places = jax.tree.map(lambda x: x.sharding, abstract_params(model, layout))
    params = jax.jit(init, out_shardings=places)(jax.random.key(seed))
    return stack_layers(params, consume=True) if scan else params


def _write_data(recipe: Recipe, part: Path) -> None:
    sources = corpus.gather(recipe.corpus)
    splits = {source.name: corpus.split(source.name, source.files) for source in sources}
    times = {corpus.normal_name(name): count for name, count in recipe.corpus.items()}
    train_texts = [text for texts, _ in splits.values() for text in texts]
    vocabulary = train_vocabulary(train_texts, recipe.model_config.vocab_size, recipe.seed)
    (part / "tokenizer.model").write_bytes(vocabulary)
    tokenizer = Tokenizer.from_file(part / "tokenizer.model")
    train, validation = [], []
    for name, (train_texts, validation_texts) in splits.items():
        train += [tokenize(train_texts, tokenizer)] * times.get(name, 1)
        validation.append(tokenize(validation_texts, tokenizer))
    np.save(part / "train.npy", np.concatenate(train))
    np.save(part / "validation.npy", np.concatenate(validation))
    listing = [source.summary() for source in sources]
    (part / "corpus.json").write_text(json.dumps(listing, indent=2) + "\n")
