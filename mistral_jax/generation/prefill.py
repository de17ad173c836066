"""Reading prompts into a cache, in chunks of few fixed shapes. It chooses no tokens.

Shapes come in buckets, so prompts of many lengths share a few compiled programs.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mistral_jax.model.cache import Cache, init_cache
from mistral_jax.model.transformer import Transformer
from mistral_jax.sharding import Layout, mesh_of, on_mesh

Params = Mapping[str, Any]

# Tokens of a chunk (C): enough to keep the processor busy, few enough to bound the activations.
CHUNK = 512
# Tokens of all rows that a GPU reads at a time, if chunks of one row have to be longer for it.
GPU_TOKENS = 2048
_SMALLEST_CHUNK = 16
_SMALLEST_ROOM = 256


def room(tokens: int) -> int:
    """Rounds a number of tokens up to a bucket: four to each doubling, and none below 256."""
    step = max(_SMALLEST_ROOM, 1 << max(0, (tokens - 1).bit_length() - 3))
    return -(-tokens // step) * step


def chunk_size(rows: int) -> int:
    """Returns C for a number of rows."""
    if jax.default_backend() != "gpu":
        return CHUNK
    return max(CHUNK, GPU_TOKENS >> (rows - 1).bit_length())


def chunks(rows: Sequence[Sequence[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts rows into chunks of C tokens; what remains fills the smallest power of two that it can.

    Args:
      rows: token ids, B rows of any lengths.

    Yields:
      Tokens and positions of a chunk, [B, T] int32 both; -1 = padding, after a row's end.
    """
    longest = max(map(len, rows))
    size = chunk_size(len(rows))
    for start in range(0, longest, size):
        rest = min(size, longest - start)
        width = max(_SMALLEST_CHUNK, 1 << (rest - 1).bit_length())
        tokens = np.zeros((len(rows), width), np.int32)
        positions = np.full((len(rows), width), -1, np.int32)
        for i, row in enumerate(rows):
            part = row[start : start + width]
            tokens[i, : len(part)] = part
            positions[i, : len(part)] = range(start, start + len(part))
        yield tokens, positions


def prefill(
    model: Transformer, params: Params, prompts: Sequence[Sequence[int]], length: int
) -> tuple[Cache, jax.Array]:
    """Reads prompts.

    Args:
      model: the model.
      params: its parameters.
      prompts: token ids, B rows; an empty one has logits that mean nothing.
      length: tokens that the cache must hold of each row, continuation included.

    Returns:
      The cache, and the logits of the token after each prompt, [B, V] float32.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    cache = logits = None
    with on_mesh(params):
        for tokens, positions in chunks(prompts):
            cache, logits = read_chunk(
                model, params, tokens, positions, lengths, cache, logits, room(length)
            )
    return cache, logits


@functools.partial(
    jax.jit, static_argnames=("model", "length"), donate_argnames=("cache", "logits")
)
def read_chunk(model, params, tokens, positions, lengths, cache, logits, length):
    """Reads one chunk; takes over the logits of rows that end in it."""
    if cache is None:
        cache = empty_cache(model, tokens.shape[0], length)
    last = positions == lengths[:, None] - 1
    new, cache = model.apply(
        {"params": params}, tokens, positions, cache, logits_at=jax.lax.argmax(last, 1, jnp.int32)
    )
    new = whole_rows(model, new[:, 0])
    if logits is None:
        return cache, new
    return cache, jnp.where(jnp.any(last, axis=1)[:, None], new, logits)


def whole_rows(model: Transformer, logits: jax.Array) -> jax.Array:
    """Gathers the logits [B, V] of each row, once: a choice passes over them dozens of times."""
    return nn.with_logical_constraint(logits, ("batch", None), rules=model.rules)


def empty_cache(model: Transformer, rows: int, length: int) -> Cache:
    """Makes a cache that is split over devices as the model's activations are."""

    def split(x):
        axes = ("batch", None, "kv_heads", "head_dim")[: x.ndim]
        return nn.with_logical_constraint(x, axes, rules=model.rules)

    dtype = jnp.dtype(model.kv_cache_dtype or model.dtype)
    return jax.tree.map(split, init_cache(model.config, rows, length, dtype))


def replicate(tree: Any) -> Any:
    """Keeps arrays whole on every device of the mesh, if there is one, for any host to read."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec())


def pad_rows(model: Transformer, params: Params, rows: Sequence[Any], row: Any) -> list[Any]:
    """Appends copies of `row` until the rows split evenly over the devices that share a batch."""
    mesh = mesh_of(params)
    parts = Layout(mesh, model.rules).parts("batch") if mesh else 1
    return [*rows, *[row] * (-len(rows) % parts)]
