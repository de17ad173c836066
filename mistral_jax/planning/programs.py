"""The three programs of a model on a layout, traced from shapes alone, without weights or devices.

They are the programs that `generate` and `train` run, traced with the same arguments; with one
device there is no mesh. CPU devices that stand in for others get no C++ kernels. `forecast.py`
compiles the programs and reads their cost.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from mistral_jax.checkpoint import precision, quantization
from mistral_jax.checkpoint.lora import Lora, adapter_shardings, attach, init_adapters
from mistral_jax.config import ModelConfig
from mistral_jax.engine import decode, prefill
from mistral_jax.engine.sampling import RowSampling, Sampling
from mistral_jax.model.cache import Cache
from mistral_jax.model.transformer import Transformer
from mistral_jax.parallel.sharding import Layout, abstract_params
from mistral_jax.training.loss import everything, make_loss_fn
from mistral_jax.training.optimizers import make_optimizer
from mistral_jax.training.states import abstract_state
from mistral_jax.training.step import Batch, make_train_step

PROGRAMS = ("prefill", "decode", "train")


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The sizes of a request, or of a training batch.

    Attributes:
      batch: number of rows (B), rounded up so that the layout divides it evenly.
      length: tokens of a row: prompt and answer together, or the context in training.
      dtype: dtype of computation, and of parameters that are not trained.
      chunk: tokens of a prompt that are read at a time (C).
      quantized: matrices in int8, as `quantization.matrices` returns them; not used in training.
      kv_cache_dtype: dtype of cached keys and values, "int8"; None = `dtype`.
      lora: adapters that are trained beside frozen weights, which have `dtype`; None = train all
        weights, in float32.
    """

    batch: int
    length: int
    dtype: jnp.dtype
    chunk: int
    quantized: Mapping[quantization.Path, int] = dataclasses.field(default_factory=dict)
    kv_cache_dtype: str | None = None
    lora: Lora | None = None


def shapes(
    layout: Layout,
    batch: int,
    length: int,
    dtype: str,
    quantized: Mapping[quantization.Path, int] | None = None,
    kv_cache_dtype: str | None = None,
    train: bool = False,
) -> Shapes:
    """Rounds a batch and a length up, and chooses the chunk, as `generate` or `train` does.

    Args:
      layout: mesh and rules.
      batch: number of rows.
      length: tokens of a row.
      dtype: name of the dtype of computation.
      quantized: matrices in int8.
      kv_cache_dtype: "int8" for a cache in 8 bits.
      train: whether the sizes are those of a training batch.
    """
    batch = batch if train else prefill.row_count(batch)
    rows, length = (
        size + -size % layout.parts(axis) for size, axis in ((batch, "batch"), (length, "length"))
    )
    chunk = min(prefill.chunk_size(rows, layout.backend(planned=True)), length)
    return Shapes(rows, length, jnp.dtype(dtype), chunk, quantized or {}, kv_cache_dtype)


def model(config: ModelConfig, layout: Layout, of: Shapes) -> Transformer:
    """Returns the model, set up to be traced for the devices of a layout."""
    return Transformer(
        config,
        of.dtype,
        layout.rules,
        kv_cache_dtype=of.kv_cache_dtype,
        backend=layout.backend(planned=True),
    )


def weights(program: str, model: Transformer, layout: Layout, of: Shapes) -> dict[str, Any]:
    """Describes the model's parameters: float32 if they are trained, else as `of` says."""
    described = _settle(layout, abstract_params(model, layout))
    if program == "train" and of.lora is None:
        return described
    return precision.typed(quantization.abstract(described, of.quantized), of.dtype)


def arguments(program: str, model: Transformer, layout: Layout, of: Shapes) -> Any:
    """Describes the arguments of a program: (params, cache), or the training state."""
    params = weights(program, model, layout, of)
    if program == "train":
        trainable = params if of.lora is None else _adapters(params, layout, of.lora)
        state = abstract_state(_optimizer(), trainable, layout)
        return _settle(layout, state.replace(frozen={} if of.lora is None else params))
    return params, _cache(model, layout, of)


def trace(program: str, model: Transformer, layout: Layout, of: Shapes) -> jax.stages.Traced:
    """Traces a program for the devices of a layout.

    Args:
      program: one of `PROGRAMS`: a chunk of prompts, a step of decoding (in a loop), or a step of
        training.
      model: the model, with the layout's rules and backend, and the dtypes of `of`.
      layout: mesh and rules; the devices need not exist.
      of: the sizes.
    """
    held = arguments(program, model, layout, of)
    with contextlib.nullcontext() if _is_one(layout) else jax.set_mesh(layout.mesh):
        return _trace(program, model, held, layout, of)


def lower(program: str, model: Transformer, layout: Layout, of: Shapes) -> jax.stages.Lowered:
    """Traces and lowers a program; the arguments are those of `trace`."""
    return trace(program, model, layout, of).lower()


def _trace(program, model, held, layout, of):
    if program == "train":
        places = jax.tree.map(lambda x: x.sharding, held)
        assemble = everything
        if of.lora is not None:

            def assemble(trainable, frozen):
                return attach(frozen, trainable, of.lora.scale)

        step = make_train_step(
            make_loss_fn(model, assemble),
            _optimizer(),
            places=places,
            options=model.backend.training_options,
        )
        ids = _array(layout, (of.batch, of.length), jnp.int32, ("batch", "length"))
        return step.trace(held, Batch(ids, ids, ids))
    params, cache = held
    vocab_size = model.config.vocab_size
    if program == "prefill":
        ids = np.zeros((of.batch, of.chunk), np.int32)
        logits = _array(layout, (of.batch, vocab_size), jnp.float32, ("batch", None))
        lengths = np.zeros(of.batch, np.int32)
        return prefill.read_chunk.trace(model, params, ids, ids, lengths, cache, logits)
    sampling = RowSampling.stack(
        [Sampling()] * of.batch, [0] * of.batch, [[1]] * of.batch, vocab_size
    )
    ones, stops = [1] * of.batch, [model.config.eos_ids] * of.batch
    state = decode.start((), ones, ones, sampling, stops, [False] * of.batch, vocab_size)
    state = jax.tree.map(lambda x: _array(layout, x.shape, x.dtype, ()), state)
    limit, watched = np.int32(decode.MOST_STEPS), np.zeros(of.batch, bool)
    return decode.decode.trace(model, params, state.replace(cache=cache), limit, watched)


def _adapters(params, layout: Layout, lora: Lora) -> Any:
    shapes = jax.eval_shape(functools.partial(init_adapters, lora, params), jax.random.key(0))
    if _is_one(layout):
        return _settle(layout, shapes)
    places = adapter_shardings(params, shapes)
    return jax.tree.map(lambda x, place: x.update(sharding=place), shapes, places)


def _cache(model: Transformer, layout: Layout, of: Shapes) -> Cache:
    length = prefill.slots(model, of.length)
    cache = jax.eval_shape(lambda: prefill.empty_cache(model, of.batch, length))

    def describe(x, axes):
        return _array(layout, x.shape, x.dtype, axes)

    return tuple(jax.tree.map(describe, layer, layer.logical_axes()) for layer in cache)


def _array(layout, shape, dtype, axes) -> jax.ShapeDtypeStruct:
    return _settle(layout, jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(*axes)))


def _is_one(layout: Layout) -> bool:
    return layout.mesh.size == 1


def _settle(layout: Layout, tree: Any) -> Any:
    """Gives described arrays a single-device sharding if there is one device, as `load` does."""
    if not _is_one(layout):
        return tree
    one = SingleDeviceSharding(layout.mesh.devices.item())
    return jax.tree.map(lambda x: x.update(sharding=one), tree)


def _optimizer():
    return make_optimizer("adamw", 1e-4, clip_norm=1.0)
