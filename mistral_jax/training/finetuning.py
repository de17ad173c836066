"""Training the model of a checkpoint further, on files of examples. It makes no new model.

All of it, adapters beside it, or either on pairs of answers.
"""

import dataclasses
import functools
import itertools
import json
import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from mistral_jax import adapters, checkpoint, folder, manifest
from mistral_jax.config import read_json
from mistral_jax.model.transformer import stack_layers, unstack_layers
from mistral_jax.sharding import mesh_of, read_layout
from mistral_jax.tokenizer import Tokenizer
from mistral_jax.training import packing, records, rows
from mistral_jax.training.data import own_rows
from mistral_jax.training.job import Job, Prompt, compute_dtype, optimizer_of, trained_model
from mistral_jax.training.lora import adapter_shardings, attach, init_adapters
from mistral_jax.training.objective import everything, make_loss_fn, make_preference_loss_fn
from mistral_jax.training.pretraining import save_model
from mistral_jax.training.quantized import quantize
from mistral_jax.training.recipe import Recipe
from mistral_jax.training.states import create_state
from mistral_jax.training.step import Params, TrainState

_PROMPTS = 3  # that a run shows its model, if the recipe names none
_BEGINNING = 32  # tokens of a text that make a prompt


def prepare(recipe: Recipe, path: Path) -> None:
    """Encodes and packs the examples of a run, where that is not done yet."""
    if (path / "data").is_dir():
        return
    tokenizer = read_tokenizer(recipe)
    with folder.whole(path / "data") as part:
        notes = {}
        for name in ("train", "validation"):
            files = getattr(recipe.data, name)
            if not files:
                continue
            tally = records.Tally()
            examples = read_examples(recipe, files, tokenizer, tally)
            summary = packing.write_rows(
                part / name,
                examples,
                recipe.context,
                pairs=recipe.dpo is not None,
                pack=recipe.data.pack,
                seed=recipe.seed,
            )
            notes[name] = {**dataclasses.asdict(summary), "fill": summary.fill}
            notes[name] |= {"bad": tally.bad, "reasons": tally.reasons}
        chat = records.are_conversations(recipe.data.train[0])
        prompts = _prompts(recipe, tokenizer, chat)
        notes |= {"chat": chat, "prompts": [dataclasses.asdict(prompt) for prompt in prompts]}
        (part / "data.json").write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")


def describe(path: Path) -> Iterator[str]:
    """Yields lines on the data of a run: how much there is, and what was left out, and why."""
    notes = read_json(path / "data" / "data.json")
    for name in ("train", "validation"):
        if name not in notes:
            continue
        of = notes[name]
        yield (
            f"{name}: {of['examples']:,} {'pairs' if of['pairs'] else 'examples'} in "
            f"{of['rows']:,} rows of {of['context']:,} tokens, {of['fill']:.0%} filled; "
            f"{of['learnt']:,} of {of['tokens']:,} tokens are learnt"
        )
        if of["too_long"]:
            yield f"  {of['too_long']:,} are longer than a row, and were cut"
        if of["left_out"]:
            yield f"  {of['left_out']:,} have nothing to be learnt in what fits, and were left out"
        if of["bad"]:
            yield f"  {of['bad']:,} bad lines were left out, such as"
            yield from (f"    {reason}" for reason in of["reasons"])


def read_tokenizer(recipe: Recipe) -> Tokenizer:
    """Reads the tokenizer of the model to train; a ValueError says that there is none."""
    base = Path(recipe.checkpoint or checkpoint.BUNDLED)
    config, _ = manifest.read(base)
    if not (base / "tokenizer.model").is_file():
        raise ValueError(f"{base} has no tokenizer.model, to encode examples with: put it there")
    return checkpoint.read_tokenizer(base / "tokenizer.model", config)


def read_examples(recipe: Recipe, files, tokenizer: Tokenizer, tally: records.Tally | None = None):
    """Yields the examples of files as a recipe has them read: see `records.read`."""
    return records.read(
        files,
        tokenizer,
        pairs=recipe.dpo is not None,
        skip_bad=recipe.data.skip_bad,
        tally=tally,
    )


def make_job(
    recipe: Recipe,
    path: Path,
    sharding: Path | str | None = None,
    mesh: Mapping[str, int] | None = None,
) -> Job:
    """Describes the training of a checkpoint, in a folder that `prepare` has filled.

    Args and errors are those of `run.train`.
    """
    base = Path(recipe.checkpoint or checkpoint.BUNDLED)
    config, _ = manifest.read(base)
    if recipe.context > config.max_positions:
        raise ValueError(
            f"context is {recipe.context}; expected at most {config.max_positions}, the positions "
            f"of {base}"
        )
    layout = read_layout(sharding, config, mesh=mesh)
    notes = read_json(path / "data" / "data.json")
    examples = {
        name: rows.Rows(path / "data" / name)
        for name in ("train", "validation")
        if (path / "data" / name).is_dir()
    }
    steps = recipe.steps or math.ceil(recipe.epochs * len(examples["train"]) / recipe.rows)
    _, optimizer = optimizer_of(recipe, steps)
    load = functools.partial(checkpoint.load, base, sharding=sharding, mesh=mesh)
    if recipe.lora is None:
        model, trainable, tokenizer = load(dtype="float32")
        frozen = load(dtype=compute_dtype(recipe))[1] if recipe.dpo else {}
        assemble, reference = everything, lambda trainable, frozen: frozen
    else:
        model, frozen, tokenizer = load(dtype=compute_dtype(recipe))
        trainable = _new_adapters(recipe, frozen)
        if recipe.quantize != "none":
            frozen = quantize(frozen, recipe.quantize)
        assemble, reference = _beside(recipe.lora.scale), lambda trainable, frozen: frozen
    if recipe.scan:
        trainable, frozen = (stack_layers(x) if x else x for x in (trainable, frozen))
    trained = trained_model(recipe, model)
    if recipe.dpo:
        loss_fn = make_preference_loss_fn(
            trained, assemble, reference, recipe.dpo.beta, recipe.dpo.label_smoothing
        )
    else:
        loss_fn = make_loss_fn(trained, assemble)
    own = own_rows(layout, recipe.rows, recipe.microbatches) if layout else None

    def feed(steps):
        batches = {"batch_rows": recipe.rows, "seed": recipe.seed, "own": own}
        return rows.feed(examples["train"], steps=steps, **batches)

    def validation():
        if "validation" not in examples:
            return iter(())
        return rows.in_order(examples["validation"], recipe.rows, own)

    def loose(tree: Params) -> Params:
        return unstack_layers(tree) if recipe.scan and tree else tree

    def params(state: TrainState) -> Params:
        return loose(assemble(state.trainable, state.frozen))

    def export(state: TrainState) -> tuple[Path, str]:
        of_base = f" --checkpoint {recipe.checkpoint}" if recipe.checkpoint else ""
        if recipe.lora:
            target, option = path / "adapter", of_base + f" --lora {path / 'adapter'}"
            own = loose(state.trainable)
            adapters.save(target, config, recipe.lora, own, base=recipe.checkpoint, overwrite=True)
        else:
            target, option = path / "checkpoint", f" --checkpoint {path / 'checkpoint'}"
            file = base / "tokenizer.model"
            save_model(recipe, config, loose(state.trainable), state, target, file)
        text = " --chat" if notes["chat"] else f" {shlex.quote(notes['prompts'][0]['text'])}"
        return target, f"python -m mistral_jax.sample{option}{text}"

    return Job(
        model=trained.clone(remat=None, scan=False, dropout=0.0),
        tokenizer=tokenizer,
        layout=layout,
        steps=steps,
        state=create_state(optimizer, trainable, frozen, layout),
        loss_fn=loss_fn,
        feed=feed,
        validation=validation,
        before=True,
        prompts=[Prompt(**prompt) for prompt in notes["prompts"]],
        chat=notes["chat"],
        params=params,
        export=export,
    )


def _new_adapters(recipe: Recipe, params: Params) -> Params:
    """Draws the adapters that training begins with, split over devices as their kernels are."""
    init = functools.partial(init_adapters, recipe.lora, jax.eval_shape(lambda: params))
    key = jax.random.key(recipe.seed)
    if mesh_of(params) is None:
        return jax.jit(init)(key)
    return jax.jit(init, out_shardings=adapter_shardings(params, jax.eval_shape(init, key)))(key)


def _beside(scale: float):
    return lambda trainable, frozen: attach(frozen, trainable, scale)


def _prompts(recipe: Recipe, tokenizer: Tokenizer, chat: bool) -> list[Prompt]:
    """Chooses what the model is shown: the recipe's texts, or how the first examples begin."""

    def encode(text):
        if chat:
            return tokenizer.encode_chat([{"role": "user", "content": text}])
        return tokenizer.encode(text, bos=True)

    if recipe.sample_prompts:
        return [Prompt(text, encode(text)) for text in recipe.sample_prompts]
    files = recipe.data.validation or recipe.data.train
    found = []
    for example in itertools.islice(read_examples(recipe, files, tokenizer), _PROMPTS):
        example = getattr(example, "chosen", example)
        begin = int(np.flatnonzero(example.weights)[0])
        if begin == 1:  # A text, of which all is learnt.
            begin = min(len(example.tokens) // 2, _BEGINNING)
        tokens = example.tokens[: max(begin, 1)].tolist()
        found.append(Prompt(tokenizer.decode(tokens), tokens))
    return found
