"""A job: what a run trains, on which data, and how it saves the result."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding
from rich.filesize import decimal

from mistral_jax.base import memory
from mistral_jax.checkpoint import checkpoint
from mistral_jax.config import ModelConfig
from mistral_jax.model.transformer import Transformer
from mistral_jax.parallel.sharding import Layout
from mistral_jax.tokens.chat import ChatForm
from mistral_jax.tokens.tokenizer import Tokenizer
from mistral_jax.training.optimizers import make_optimizer, make_schedule
from mistral_jax.training.recipe import Recipe
from mistral_jax.training.step import Batch, LossFn, Params, TrainState


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt that a run completes from time to time, to show what the model has learnt.

    Attributes:
      text: the prompt, for display.
      tokens: its token ids.
    """

    text: str
    tokens: list[int]


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that the loop of a run needs to train one model.

    Attributes:
      model: the model, as samples are generated with it.
      tokenizer: its tokenizer.
      layout: partition of the arrays over devices; None = one device.
      steps: total number of optimizer steps.
      state: the state before the first step.
      loss_fn: the loss that each step minimises.
      feed: yields the batch of each step in a range, on the host.
      validation: yields the validation batches; none if the run has no validation data.
      before: whether to validate before the first step.
      prompts: prompts that the model completes.
      chat: whether the prompts are messages to answer, instead of beginnings of texts.
      params: returns the model's parameters in a state, as generation takes them.
      export: saves the result, given a state, to a folder of the run; returns the folder and the
        arguments of `sample` that use it.
    """

    model: Transformer
    tokenizer: Tokenizer
    layout: Layout | None
    steps: int
    state: TrainState
    loss_fn: LossFn
    feed: Callable[[range], Iterator[Batch]]
    validation: Callable[[], Iterator[Batch]]
    before: bool
    prompts: list[Prompt]
    chat: bool
    params: Callable[[TrainState], Params]
    export: Callable[[TrainState], tuple[Path, list[str]]]


def optimizer_of(recipe: Recipe, steps: int) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Builds the learning-rate schedule and the optimizer of a recipe.

    Raises:
      ValueError: the warmup is as long as the run.
    """
    if recipe.warmup_steps >= steps:
        raise ValueError(
            f"warmup_steps is {recipe.warmup_steps}; expected less than the run's {steps} steps: "
            "warm up for fewer, or train for more epochs"
        )
    schedule = make_schedule(
        recipe.schedule,
        steps,
        warmup_steps=recipe.warmup_steps,
        learning_rate=recipe.learning_rate,
        final_learning_rate=recipe.final_learning_rate,
    )
    return schedule, make_optimizer(recipe.optimizer, schedule, **recipe.optimizer_arguments)


def save_model(
    recipe: Recipe,
    config: ModelConfig,
    params: Params,
    state: TrainState,
    target: Path,
    tokenizer_file: Path,
    chat: ChatForm | None = None,
    model_type: str | None = None,
) -> None:
    """Saves a trained model as a checkpoint folder, in bfloat16 like Mistral's releases.

    An export to Hugging Face's format has the type `model_type`, which its base had there.
    """
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    provenance = {"recipe": recipe.to_dict(), "step": int(state.step)}
    provenance |= {"model_type": model_type} if model_type else {}
    checkpoint.save(target, config, params, tokenizer_file, provenance, overwrite=True, chat=chat)


def check_memory(recipe: Recipe, config: ModelConfig, layout: Layout | None) -> None:
    """Raises a ValueError if the rows of a step cannot fit into memory, before anything is loaded.

    It counts only the batch on the host and the logits of one microbatch, in two bytes each: a
    lower bound of what a step needs.

    Raises:
      ValueError: less memory is free.
    """
    places = recipe.context * (2 if recipe.dpo else 1)
    devices = layout.mesh.local_devices if layout else [jax.devices()[0]]
    count = layout.mesh.size if layout else 1
    logits = 2 * recipe.rows // recipe.microbatches * places * config.vocab_size // count
    arrays = [
        jax.ShapeDtypeStruct((logits,), jnp.uint8, sharding=SingleDeviceSharding(device))
        for device in devices
    ]
    batch = memory.Demand("this machine", 16 * recipe.rows * places, memory.host_free())
    for demand in (batch, *memory.demands(arrays)):
        if demand.free is not None and demand.needed > demand.free:
            raise ValueError(
                f"{recipe.rows} rows of {recipe.context} tokens need more than "
                f"{decimal(demand.needed)} of {demand.place}, which has {decimal(demand.free)} "
                "free: make rows or context smaller, or microbatches larger"
            )


def compute_dtype(recipe: Recipe) -> jnp.dtype:
    """Returns the dtype that a recipe computes in."""
    if recipe.dtype != "auto":
        return jnp.dtype(recipe.dtype)
    on_cpu = jax.local_devices()[0].platform == "cpu"
    return jnp.dtype(jnp.float32 if on_cpu else jnp.bfloat16)


def trained_model(recipe: Recipe, model: Transformer) -> Transformer:
    """Returns the model with the recipe's dtype, rematerialisation, scan and dropout."""
    return model.clone(
        dtype=compute_dtype(recipe),
        remat=None if recipe.remat == "none" else recipe.remat,
        scan=recipe.scan,
        dropout=recipe.lora.dropout if recipe.lora else 0.0,
    )
