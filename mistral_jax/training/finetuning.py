"""Fine-tuning: builds the job of training a checkpoint further on files of examples.

A recipe trains all parameters or adapters beside frozen ones, on texts or on pairs of answers.
"""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from mistral_jax.checkpoint import adapters, checkpoint, origin
from mistral_jax.checkpoint.lora import adapter_shardings, attach, init_adapters
from mistral_jax.checkpoint.quantization import quantize
from mistral_jax.model.transformer import Transformer, stack_layers, unstack_layers
from mistral_jax.ops.quantized import QuantizedMatrix
from mistral_jax.parallel.sharding import mesh_of, read_layout
from mistral_jax.tokens import storage
from mistral_jax.training.data import examples
from mistral_jax.training.data.batches import feed, in_order, own_rows
from mistral_jax.training.data.packing import PackedRows
from mistral_jax.training.job import (
    Job,
    check_memory,
    compute_dtype,
    optimizer_of,
    save_model,
    trained_model,
)
from mistral_jax.training.loss import everything, make_loss_fn, make_preference_loss_fn
from mistral_jax.training.recipe import MOST_STEPS, Recipe
from mistral_jax.training.states import create_state
from mistral_jax.training.step import LossFn, Params, TrainState


def make_job(
    recipe: Recipe,
    path: Path,
    sharding: Path | str | None = None,
    mesh: Mapping[str, int] | None = None,
) -> Job:
    """Builds the job of training a checkpoint; the run's folder already holds the examples.

    Args and errors are those of `run.train`.
    """
    base = examples.base_folder(recipe)
    config, provenance = examples.read_base(recipe)
    layout = read_layout(sharding, config, mesh=mesh)
    check_memory(recipe, config, layout)
    rows = {
        name: PackedRows(path / "data" / name)
        for name in examples.SPLITS
        if (path / "data" / name).is_dir()
    }
    steps = recipe.steps or math.ceil(recipe.epochs * len(rows["train"]) / recipe.rows)
    if steps > MOST_STEPS:
        raise ValueError(
            f"epochs is {recipe.epochs:g}, which is {steps:,} steps of {len(rows['train']):,} "
            f"rows; expected at most {MOST_STEPS:,} steps"
        )
    _, optimizer = optimizer_of(recipe, steps)
    tokenizer = examples.read_tokenizer(recipe)
    prompts, chat = examples.prompts(recipe, path, tokenizer)
    load = functools.partial(checkpoint.load, base, sharding=sharding, mesh=mesh)
    model, trainable, frozen = _parameters(recipe, load)
    config = model.config
    trained = trained_model(recipe, model)
    scale = recipe.lora.scale if recipe.lora else None
    assemble = everything if scale is None else functools.partial(_beside, scale)

    def batches(steps):
        own = own_rows(layout, recipe.rows, recipe.microbatches) if layout else None
        order = {"batch_rows": recipe.rows, "seed": recipe.seed, "steps": steps, "own": own}
        return feed(rows["train"], **order)

    def validation():
        count = recipe.validation_rows
        own = own_rows(layout, count) if layout else None
        return in_order(rows["validation"], count, own) if "validation" in rows else iter(())

    def loose(tree: Params) -> Params:
        return unstack_layers(tree) if recipe.scan and tree else tree

    def export(state: TrainState) -> tuple[Path, list[str]]:
        options = ["--checkpoint", recipe.checkpoint] if recipe.checkpoint else []
        if recipe.lora:
            target, own = path / "adapter", loose(state.trainable)
            name = origin.base_name(provenance.get("source"))
            adapters.save(target, config, recipe.lora, own, base=name, overwrite=True)
            options += ["--lora", str(target)]
            if recipe.data.chat_form:
                options += ["--chat-form", recipe.data.chat_form]
        else:
            target = path / "checkpoint"
            file = storage.find(base)
            params = loose(state.trainable)
            kind = provenance.get("model_type")
            save_model(recipe, config, params, state, target, file, tokenizer.chat, kind)
            options = ["--checkpoint", str(target)]
        text = prompts[0].text if prompts else ""
        return target, [*options, *(["--chat"] if chat else ["--", text])]

    return Job(
        model=trained.clone(remat=None, scan=False, dropout=0.0),
        tokenizer=tokenizer,
        layout=layout,
        steps=steps,
        state=create_state(optimizer, trainable, frozen, layout),
        loss_fn=_loss_fn(recipe, trained, assemble),
        feed=batches,
        validation=validation,
        before=True,
        prompts=prompts,
        chat=chat,
        params=lambda state: loose(assemble(state.trainable, state.frozen)),
        export=export,
    )


def _parameters(recipe: Recipe, load: Any) -> tuple[Transformer, Params, Params]:
    """Returns the model, its trainable parameters or adapters, and its frozen parameters."""
    if recipe.lora is None:
        model, trainable, _ = load(dtype="float32")
        if any(isinstance(x, QuantizedMatrix) for x in flatten_dict(trainable).values()):
            raise ValueError(
                f"{recipe.checkpoint} is quantised to 8 bits, which cannot be trained: add [lora] "
                "to train adapters beside it, or name the checkpoint that it was made from"
            )
        # DPO's reference is the initial model. It needs a copy: steps donate `trainable`.
        dtype = compute_dtype(recipe)
        frozen = jax.tree.map(lambda x: jnp.array(x, dtype), trainable) if recipe.dpo else {}
    else:
        model, frozen, _ = load(dtype=compute_dtype(recipe))
        trainable = _new_adapters(recipe, frozen)
        if recipe.quantize != "none":
            frozen = quantize(frozen, recipe.quantize)
    if recipe.scan:
        trainable, frozen = (stack_layers(x, consume=True) if x else x for x in (trainable, frozen))
    return model, trainable, frozen


def _loss_fn(recipe: Recipe, model: Transformer, assemble: Any) -> LossFn:
    router = recipe.router_loss
    if recipe.dpo is None:
        return make_loss_fn(model, assemble, router)
    settings = recipe.dpo.beta, recipe.dpo.label_smoothing, router
    return make_preference_loss_fn(model, assemble, *settings)


def _new_adapters(recipe: Recipe, params: Params) -> Params:
    """Initialises the adapters, partitioned over devices like the weights that they adapt."""
    init = functools.partial(init_adapters, recipe.lora, jax.eval_shape(lambda: params))
    key = jax.random.key(recipe.seed)
    if mesh_of(params) is None:
        return jax.jit(init)(key)
    return jax.jit(init, out_shardings=adapter_shardings(params, jax.eval_shape(init, key)))(key)


def _beside(scale: float, trainable: Params, frozen: Params) -> Params:
    return attach(frozen, trainable, scale)
