"""A training run: a folder of data, states, curve and model, and the loop that fills it.

It is the bookkeeping around `step.py`. A run that was stopped goes on where it was, to the bit.
"""

import contextlib
import json
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mistral_jax import checkpoint, distributed, folder
from mistral_jax.config import read_json
from mistral_jax.model.transformer import Transformer
from mistral_jax.sharding import on_mesh, read_layout
from mistral_jax.tokenizer import Tokenizer
from mistral_jax.training import corpus, data
from mistral_jax.training.curve import Curve, Entry
from mistral_jax.training.loss import cross_entropy
from mistral_jax.training.recipe import Recipe
from mistral_jax.training.states import initial_state, restore_state, save_state
from mistral_jax.training.step import Batch, LossFn, Params, TrainState, adamw, make_train_step
from mistral_jax.training.vocabulary import train_vocabulary


def train(
    recipe: Recipe,
    path: Path | str,
    report: Callable[[Entry], None],
    sharding: Path | str | None = None,
    mesh: Mapping[str, int] | None = None,
) -> bool:
    """Trains a model, or goes on with it, and saves it in bfloat16 as `<path>/checkpoint`.

    Args:
      recipe: how.
      path: folder of the run; it is made, or holds a run of this recipe.
      report: is given every entry of the curve that `<path>/curve.jsonl` gets.
      sharding: how to spread the work over devices, and `mesh`: see `read_layout`. A run may go on
        under another layout than it began with.

    Returns:
      Whether the run is complete; False = an interrupt or SIGTERM stopped it, state saved.

    Raises:
      ValueError: the recipe does not fit the run in the folder, or the text that is installed; or
        the loss is no longer a number.
    """
    path = Path(path).absolute()
    layout = read_layout(sharding, recipe.model_config, mesh=mesh)
    distributed.from_first(lambda: prepare(recipe, path))
    train_tokens, validation_tokens = (
        np.load(path / "data" / f"{name}.npy", mmap_mode="r") for name in ("train", "validation")
    )
    rules = layout.rules if layout else ()
    model = Transformer(recipe.model_config, rules=rules, remat=recipe.remat)
    schedule, optimizer = make_optimizer(recipe)
    state = restore_state(path, initial_state(model, optimizer, recipe.seed, layout))
    places = jax.tree.map(lambda x: x.sharding, state) if layout else None
    loss_fn = make_loss_fn(model)
    train_step = make_train_step(loss_fn, optimizer, recipe.microbatches, places)
    evaluate = jax.jit(loss_fn)
    curve = Curve(path / "curve.jsonl" if distributed.is_first() else None, int(state.step), report)
    shape = {"context": recipe.context, "rows": recipe.rows}

    def spread(batch):
        return data.spread(batch, layout, recipe.microbatches) if layout else batch

    with _signals() as stopped, on_mesh(state.trainable):
        for step in range(int(state.step), recipe.steps):
            batch = data.batch_at(step, train_tokens, **shape, seed=recipe.seed)
            state, metrics = train_step(state, spread(batch))
            if not math.isfinite(metrics["loss"]):
                raise ValueError(
                    f"the loss of step {step + 1} is {metrics['loss']}: begin another run with a "
                    f"learning_rate below {recipe.learning_rate}"
                )
            curve.add(step + 1, metrics, batch.tokens.size, float(schedule(step)))
            last = step + 1 == recipe.steps
            if last or (step + 1) % recipe.validate_every == 0:
                batches = data.batches_in_order(validation_tokens, **shape)
                # One at a time: CPU devices run what does not depend on each other at once, and
                # processes that do so in another order wait for each other forever.
                sums = [
                    jax.device_get(evaluate(state.trainable, state.frozen, spread(b)))
                    for b in batches
                ]
                loss, count = np.sum(sums, axis=0)
                curve.write({"step": step + 1, "validation_loss": float(loss / count)})
            stop = distributed.any_of(stopped())
            if last or stop or (step + 1) % recipe.save_every == 0:
                save_state(path, state)
            if stop and not last:
                return False
    export(recipe, path, path / "checkpoint", state)
    return True


def prepare(recipe: Recipe, path: Path) -> None:
    """Makes the folder of a run, its vocabulary and its tokens, where they are not there yet."""
    notes = path / "recipe.json"
    if notes.is_file():
        recipe.check_continues(Recipe.from_dict(read_json(notes), str(notes)), str(path))
    else:
        folder.check_target(path)
        path.mkdir(parents=True, exist_ok=True)
    notes.write_text(json.dumps(recipe.to_dict(), indent=2) + "\n")
    if not (path / "data").is_dir():
        with folder.whole(path / "data") as part:
            _write_data(recipe, part)


def _write_data(recipe: Recipe, part: Path) -> None:
    sources = corpus.gather(recipe.corpus)
    splits = {source.name: data.split(source.name, source.files) for source in sources}
    times = {corpus.normal_name(name): count for name, count in recipe.corpus.items()}
    train_texts = [text for texts, _ in splits.values() for text in texts]
    vocabulary = train_vocabulary(train_texts, recipe.model_config.vocab_size, recipe.seed)
    (part / "tokenizer.model").write_bytes(vocabulary)
    tokenizer = Tokenizer.from_file(part / "tokenizer.model")
    train, validation = [], []
    for name, (train_texts, validation_texts) in splits.items():
        train += [data.tokenize(train_texts, tokenizer)] * times.get(name, 1)
        validation.append(data.tokenize(validation_texts, tokenizer))
    np.save(part / "train.npy", np.concatenate(train))
    np.save(part / "validation.npy", np.concatenate(validation))
    listing = [source.summary() for source in sources]
    (part / "corpus.json").write_text(json.dumps(listing, indent=2) + "\n")


def make_optimizer(recipe: Recipe) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Builds the learning rate of every step (a rise, then a cosine) and the optimizer."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        recipe.learning_rate,
        recipe.warmup_steps,
        recipe.steps,
        recipe.final_learning_rate,
    )
    return schedule, adamw(
        schedule,
        b1=recipe.beta1,
        b2=recipe.beta2,
        weight_decay=recipe.weight_decay,
        clip_norm=recipe.clip_norm,
    )


def make_loss_fn(model: Transformer) -> LossFn:
    """Builds the loss of training all of a model's parameters."""

    def loss_fn(params: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        del frozen
        logits, _ = model.apply({"params": params}, batch.tokens, batch.positions)
        return cross_entropy(logits, batch.targets)

    return loss_fn


def export(recipe: Recipe, path: Path, target: Path, state: TrainState) -> None:
    """Saves the model of a state as a checkpoint folder, in bfloat16 as Mistral's are."""
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), state.trainable)
    provenance = {"recipe": recipe.to_dict(), "step": int(state.step)}
    file = path / "data" / "tokenizer.model"
    checkpoint.save(target, recipe.model_config, params, file, provenance, overwrite=True)


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether a SIGINT or SIGTERM came; a second one acts at once."""
    received = []
    earlier = {}

    def note(number, frame):
        received.append(number)
        signal.signal(number, earlier[number] or signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        earlier[number] = signal.signal(number, note)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in earlier.items():
            # None: one that Python did not set.
            signal.signal(number, handler or signal.SIG_DFL)
