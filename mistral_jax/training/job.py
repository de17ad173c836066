"""A job: what a run trains, on what, and what becomes of it. It takes no step, saves no state."""

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
from mistral_jax.tokens.tokenizer import Tokenizer
from mistral_jax.training.optimizers import make_optimizer, make_schedule
from mistral_jax.training.recipe import Recipe
from mistral_jax.training.step import Batch, LossFn, Params, TrainState


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a run shows the model from time to time.

    Attributes:
      text: for people.
      tokens: its ids.
    """

    text: str
    tokens: list[int]


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run trains, on what, and what becomes of it.

    Attributes:
      model: the model.
      tokenizer: its tokenizer.
      layout: where arrays lie; None = one device.
      steps: optimizer steps in all.
      state: the state before the first.
      loss_fn: what each minimises.
      feed: the batch of each of a range of steps, on the host.
      validation: yields the batches to validate on; none = it is not validated.
      before: whether it is validated before the first step too.
      prompts: what it is sampled with.
      chat: whether they ask for an answer, rather than begin a text.
      params: the model's parameters, of a state, as generation takes them.
      export: saves what has come of it to a folder of the run, of a state; returns where, and
        the arguments of `sample` that use it.
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
    """Builds the learning rate of every step, and the optimizer."""
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
) -> None:
    """Saves a trained model as a checkpoint folder, in bfloat16 as Mistral's are."""
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    provenance = {"recipe": recipe.to_dict(), "step": int(state.step)}
    checkpoint.save(target, config, params, tokenizer_file, provenance, overwrite=True)


def check_memory(recipe: Recipe, config: ModelConfig, layout: Layout | None) -> None:
    """Refuses rows that cannot fit into memory, whatever else is there: before anything is loaded.

    It counts the batch on the host, and the logits of the rows that are computed at a time, in two
    bytes each: a step needs more.

    Raises:
      ValueError: the memory that is free is less.
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
    """Returns the dtype that a recipe's models compute in."""
    if recipe.dtype != "auto":
        return jnp.dtype(recipe.dtype)
    on_cpu = jax.local_devices()[0].platform == "cpu"
    return jnp.dtype(jnp.float32 if on_cpu else jnp.bfloat16)


def trained_model(recipe: Recipe, model: Transformer) -> Transformer:
    """Returns a model as a recipe has it computed in training."""
    return model.clone(
        dtype=compute_dtype(recipe),
        remat=None if recipe.remat == "none" else recipe.remat,
        scan=recipe.scan,
        dropout=recipe.lora.dropout if recipe.lora else 0.0,
    )
