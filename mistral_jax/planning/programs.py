"""The three programs of a model on a layout, compiled from shapes alone: no weights, no device.

They are those that `generate` and `train` run, with the same arguments. It reads nothing off them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mistral_jax.checkpoint import precision, quantization
from mistral_jax.engine import decode, prefill
from mistral_jax.engine.sampling import RowSampling, Sampling
from mistral_jax.model.cache import Cache
from mistral_jax.model.transformer import Transformer
from mistral_jax.parallel.sharding import Layout, abstract_params
from mistral_jax.training.objective import make_loss_fn
from mistral_jax.training.optimizers import make_optimizer
from mistral_jax.training.states import abstract_state
from mistral_jax.training.step import Batch, make_train_step

PROGRAMS = ("prefill", "decode", "train")


@dataclasses.dataclass(frozen=True)
class Shapes:
    """How large a request, or a batch, is.

    Attributes:
      batch: rows (B), filled up to what the layout shares evenly.
      length: tokens of a row: prompt and answer together, or the context that is trained on.
      dtype: of computation, and of parameters but those that are trained.
      chunk: tokens of a prompt that are read at a time (C).
      quantized: kernels in int8, as `quantization.kernels` returns them; none are trained so.
      kv_cache_dtype: of cached keys and values, "int8"; None = `dtype`.
    """

    batch: int
    length: int
    dtype: jnp.dtype
    chunk: int
    quantized: Mapping[quantization.Path, int] = dataclasses.field(default_factory=dict)
    kv_cache_dtype: str | None = None


def shapes(
    layout: Layout,
    batch: int,
    length: int,
    dtype: str,
    quantized: Mapping[quantization.Path, int] | None = None,
    kv_cache_dtype: str | None = None,
    train: bool = False,
) -> Shapes:
    """Fills a batch and a length up, and fits the chunk, as `generate` or `train` does."""
    batch = batch if train else prefill.row_count(batch)
    rows, length = (
        size + -size % layout.parts(axis) for size, axis in ((batch, "batch"), (length, "length"))
    )
    chunk = min(prefill.chunk_size(rows), length)
    return Shapes(rows, length, jnp.dtype(dtype), chunk, quantized or {}, kv_cache_dtype)


def weights(program: str, model: Transformer, layout: Layout, of: Shapes) -> dict[str, Any]:
    """Describes a model's parameters as a program has them: float32 where they are trained."""
    described = abstract_params(model, layout)
    if program == "train":
        return described
    return precision.typed(quantization.abstract(described, of.quantized), of.dtype)


def arguments(program: str, model: Transformer, layout: Layout, of: Shapes) -> Any:
    """Describes what a program works on: (params, cache), or the state of training."""
    params = weights(program, model, layout, of)
    if program == "train":
        return abstract_state(_optimizer(), params, layout)
    return params, _cache(program, model, layout, of)


def lower(program: str, model: Transformer, layout: Layout, of: Shapes) -> jax.stages.Lowered:
    """Traces a program for the devices of a layout.

    Args:
      program: one of `PROGRAMS`: a chunk of prompts, a step of decoding (in a loop), a step of
        training.
      model: the model, with the layout's rules, and of the dtypes in `of`.
      layout: the mesh; its devices need not exist.
      of: the sizes.
    """
    held = arguments(program, model, layout, of)
    with jax.set_mesh(layout.mesh):
        return _lower(program, model, held, layout, of)


def _lower(program, model, held, layout, of):
    if program == "train":
        places = jax.tree.map(lambda x: x.sharding, held)
        step = make_train_step(make_loss_fn(model), _optimizer(), places=places)
        ids = _array(layout, (of.batch, of.length), jnp.int32, ("batch", "length"))
        return step.lower(held, Batch(ids, ids, ids))
    params, cache = held
    vocab_size = model.config.vocab_size
    if program == "prefill":
        ids = np.zeros((of.batch, of.chunk), np.int32)
        logits = _array(layout, (of.batch, vocab_size), jnp.float32, ("batch", None))
        lengths = np.zeros(of.batch, np.int32)
        return prefill.read_chunk.lower(model, params, ids, ids, lengths, cache, logits)
    sampling = RowSampling.stack(
        [Sampling()] * of.batch, [0] * of.batch, [[1]] * of.batch, vocab_size
    )
    ones, stops = [1] * of.batch, [model.config.eos_ids] * of.batch
    state = decode.start((), ones, ones, sampling, stops, [False] * of.batch, vocab_size)
    state = jax.tree.map(lambda x: _array(layout, x.shape, x.dtype, ()), state)
    limit, watched = np.int32(decode.MOST_STEPS), np.zeros(of.batch, bool)
    return decode.decode.lower(model, params, state.replace(cache=cache), limit, watched)


def _cache(program: str, model: Transformer, layout: Layout, of: Shapes) -> Cache:
    def made():
        cache = prefill.empty_cache(model, of.batch, prefill.slots(model, of.length))
        return decode.turn(cache) if program == "decode" else cache

    axes = ("batch", None, "kv_heads", "head_dim")
    if program == "decode" and decode.by_heads():
        axes = ("batch", "kv_heads", None, "head_dim")
    cache = jax.eval_shape(made)
    return jax.tree.map(lambda x: _array(layout, x.shape, x.dtype, axes[: x.ndim]), cache)


def _array(layout, shape, dtype, axes) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(*axes))


def _optimizer():
    return make_optimizer("adamw", 1e-4, clip_norm=1.0)
