"""Prefill: reading prompts into a cache, in chunks of a few fixed shapes.

The shapes are buckets, so that prompts of all lengths share a few compiled programs.
"""

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mistral_jax.engine.prefixes import Prefixes
from mistral_jax.model.cache import Cache, init_cache
from mistral_jax.model.transformer import Transformer
from mistral_jax.ops.backend import PLAIN, V6E, Backend, ModelJit
from mistral_jax.parallel.sharding import Layout, mesh_of, on_mesh

Params = Mapping[str, Any]

# Tokens of a chunk (C): enough to keep the processor busy, few enough to bound the activations.
CHUNK = 512
# On an accelerator, chunks of few rows are widened to about this many tokens of all rows together,
# so that reading the weights takes less time than the products.
GPU_TOKENS, TPU_TOKENS = 2048, 1024
# A TPU v6e computes 560 products of bfloat16 in the time in which it reads one weight.
V6E_TOKENS = 2048
# Chunk widths for the rest of a prompt, if they are less than C. They are few because each width is
# one more program to compile for every shape of cache.
_WIDTHS = (16, 64, 512, 1024)
_SMALLEST_ROOM, _COARSE_ROOM = 256, 4096
_COARSE_ROWS = 8

# The error of a row or text whose logits are not finite.
NOT_FINITE = (
    "the model's logits are not finite (NaN or infinity), which float16 overflow can cause: load "
    "the model with another type (--dtype bfloat16 or float32), or check its weights with "
    "`python -m mistral_jax.convert inspect DIR --verify`"
)


def room(tokens: int) -> int:
    """Rounds a number of tokens up to a bucket, so that few programs are compiled.

    Buckets are powers of two from 256 to 4096, and above that four between two powers of two. For a
    row of Mistral 7B in bfloat16, rounding wastes at most 256 MiB up to 4096 tokens, and above that
    less than a quarter.
    """
    return _round_up(max(tokens, _SMALLEST_ROOM), _COARSE_ROOM, 8)


def row_count(rows: int) -> int:
    """Rounds a number of rows up to a bucket: 1, 2, 4, 8, 12, 16, 24, 32, and so on."""
    return _round_up(rows, _COARSE_ROWS, 4)


def _round_up(count: int, coarse: int, parts: int) -> int:
    """Rounds up to a power of two; above `coarse`, to a multiple of 1/`parts` of that power."""
    power = 1 << (count - 1).bit_length()
    step = power if count <= coarse else power // parts
    return -(-count // step) * step


def slots(model: Transformer, tokens: int) -> int:
    """Returns S for rows of `tokens` tokens: a bucket, at most the longest window."""
    spans = model.config.spans
    return room(tokens) if None in spans else min(room(tokens), max(spans))


def chunk_size(rows: int, backend: Backend) -> int:
    """Returns the width of a full chunk (C) of `rows` rows."""
    tokens = {"gpu": GPU_TOKENS, "tpu": TPU_TOKENS}.get(backend.platform, CHUNK)
    if backend.chip in V6E:
        tokens = V6E_TOKENS
    return max(CHUNK, tokens >> (rows - 1).bit_length())


def chunks(
    rows: Sequence[Sequence[int]], widths: Sequence[int] = _WIDTHS, backend: Backend = PLAIN
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts rows into chunks of C tokens, and the rest into chunks of smaller widths.

    Args:
      rows: token ids, B rows of any lengths.
      widths: the smaller widths, in rising order.
      backend: the backend that reads the chunks.

    Yields:
      Tokens and positions of a chunk, both [B, T] int32; the positions after a row's end are -1
      (padding).
    """
    longest, start = max(map(len, rows)), 0
    while start < longest:
        width = chunk_width(len(rows), longest - start, backend, widths)
        yield cut(rows, [start] * len(rows), width)
        start += width


def cut(
    rows: Sequence[Sequence[int]], starts: Sequence[int], width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and positions, [B, T] int32, of the chunk that begins at `starts` [B]."""
    tokens = np.zeros((len(rows), width), np.int32)
    positions = np.full((len(rows), width), -1, np.int32)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        part = row[start : start + width]
        tokens[i, : len(part)] = part
        positions[i, : len(part)] = range(start, start + len(part))
    return tokens, positions


def chunk_width(
    rows: int,
    rest: int,
    backend: Backend,
    smaller: Sequence[int] = _WIDTHS,
    most: int | None = None,
) -> int:
    """Returns the width of the next chunk.

    Args:
      rows: B.
      rest: number of unread tokens of the row that has most of them.
      backend: the backend that reads the chunk.
      smaller: the widths below C, in rising order.
      most: maximum width, unless even the narrowest chunk is wider; None = C.
    """
    size = chunk_size(rows, backend)
    known = [*(width for width in smaller if width < size), size]
    if most is not None:
        known = [width for width in known if width <= most] or known[:1]
    return _width(rest, known)


def widths(rows: int, backend: Backend) -> list[int]:
    """Returns the widths of all chunks of `rows` rows."""
    size = chunk_size(rows, backend)
    return [*(width for width in _WIDTHS if width < size), size]


def padded(length: int, backend: Backend) -> int:
    """Returns the total width of the chunks of one prompt of `length` tokens, padding included."""
    total = 0
    while total < length:
        total += chunk_width(1, length - total, backend)
    return total


def _width(rest: int, widths: Sequence[int]) -> int:
    """Chooses a width of which at most half is padding; the narrowest may have more."""
    least = next((i for i, width in enumerate(widths) if width >= rest), len(widths) - 1)
    return widths[least - 1 if least and widths[least] > 2 * rest else least]


class Reading:
    """The reading of several prompts together, chunk by chunk.

    Attributes:
      cache: keys and values of the tokens that have been read.
      logits: logits of the token after each prompt, [B, V] float32; valid once the prompt is read.
      rest: number of unread tokens of the prompt that has most of them.
      cached: number of tokens of each prompt that were restored instead of read.
    """

    def __init__(
        self,
        model: Transformer,
        params: Params,
        prompts: Sequence[Sequence[int]],
        length: int,
        prefixes: Prefixes | None = None,
    ):
        """Allocates the cache, and restores prefixes that were read before.

        Args:
          model: the model.
          params: its parameters.
          prompts: token ids, B rows; the logits of an empty row are undefined.
          length: cache slots of a row (S); a layer whose window is shorter has fewer.
          prefixes: store of keys and values of earlier texts; None = every prompt is read whole.
        """
        self._model, self._params, self._prompts = model, params, prompts
        self._prefixes = prefixes
        lengths = [len(prompt) for prompt in prompts]
        self._lengths = np.array(lengths, np.int32)
        self._starts = [0] * len(prompts)
        with on_mesh(params):
            self.cache, self.logits = start_reading(model, params, len(prompts), length)
        for row, prompt in enumerate(prompts if prefixes is not None else ()):
            if hit := prefixes.find((), prompt):
                self.cache = prefixes.restore(hit, self.cache, row)
                self._starts[row] = hit.tokens
        self.cached = tuple(self._starts)
        self.rest = max(map(operator.sub, lengths, self._starts))

    def read(self, most: int | None = None) -> int:
        """Reads the next chunk; returns its width.

        Args:
          most: see `chunk_width`.
        """
        width = chunk_width(len(self._prompts), self.rest, self._model.backend, most=most)
        tokens, positions = cut(self._prompts, self._starts, width)
        with on_mesh(self._params):
            self.cache, self.logits = read_chunk(
                *(self._model, self._params, tokens, positions),
                *(self._lengths, self.cache, self.logits),
            )
        read, self._starts = self._starts, [start + width for start in self._starts]
        self.rest -= width
        if self._prefixes is None:
            return width
        # A windowed layer keeps only its latest tokens, so it is saved after each chunk: a later
        # text may differ from this one after any chunk.
        rings = any(self._model.config.spans)
        if rings or self.rest <= 0:
            self._keep([start if rings else 0 for start in read])
        return width

    def _keep(self, known: Sequence[int]) -> None:
        """Saves the keys and values of the tokens that rows have read.

        Args:
          known: number of tokens of each row that were saved before.
        """
        with on_mesh(self._params):
            whole = jax.device_get(sound(self.cache))
        for row, (prompt, start) in enumerate(zip(self._prompts, known, strict=True)):
            if start < len(prompt) and whole[row]:
                self._prefixes.save((), prompt[: self._starts[row]], self.cache, row)


@jax.jit
def sound(cache: Cache) -> jax.Array:
    """Returns whether the last layer's keys and values of each row are finite, [B] bool."""
    leaves = [x for x in jax.tree.leaves(cache[-1]) if jnp.issubdtype(x.dtype, jnp.floating)]
    finite = (jnp.isfinite(x).all((1, 2, 3)) for x in leaves)
    return replicate(functools.reduce(jnp.logical_and, finite))


def prefill(
    model: Transformer, params: Params, prompts: Sequence[Sequence[int]], length: int
) -> tuple[Cache, jax.Array]:
    """Reads whole prompts.

    Args:
      model: the model.
      params: its parameters.
      prompts: token ids, B rows; the logits of an empty row are undefined.
      length: tokens of the longest row, prompt and continuation together.

    Returns:
      The cache, and the logits of the token after each prompt, [B, V] float32.
    """
    reading = Reading(model, params, prompts, slots(model, length))
    while reading.rest > 0:
        reading.read()
    return reading.cache, reading.logits


@functools.partial(jax.jit, static_argnames=("model", "rows", "length"), keep_unused=True)
def start_reading(
    model: Transformer, params: Params, rows: int, length: int
) -> tuple[Cache, jax.Array]:
    """Makes an empty cache and placeholder logits [B, V] for the first `read_chunk`.

    As outputs of a program they are committed to the devices of `params`, so the first chunk runs
    the same compiled program as later chunks. `params` are not used otherwise.
    """
    logits = jnp.zeros((rows, model.config.vocab_size), jnp.float32)
    return empty_cache(model, rows, length), whole_rows(model, logits)


@functools.partial(ModelJit, static_argnames="model", donate_argnames=("cache", "logits"))
def read_chunk(model, params, tokens, positions, lengths, cache, logits):
    """Reads one chunk; replaces the logits of the rows whose last token is in it."""
    last = positions == lengths[:, None] - 1
    new, cache = model.apply(
        {"params": params}, tokens, positions, cache, logits_at=jax.lax.argmax(last, 1, jnp.int32)
    )
    new = whole_rows(model, new[:, 0])
    return cache, jnp.where(jnp.any(last, axis=1)[:, None], new, logits)


def whole_rows(model: Transformer, logits: jax.Array) -> jax.Array:
    """Gathers the whole logits [B, V] of each row on the devices that hold the row.

    Sampling passes over the logits dozens of times; without this, each pass would communicate.
    """
    return nn.with_logical_constraint(logits, ("batch", None), rules=model.rules)


def empty_cache(model: Transformer, rows: int, length: int) -> Cache:
    """Makes an empty cache that is partitioned over devices like the model's activations."""

    dtype = jnp.dtype(model.kv_cache_dtype or model.dtype)
    cache = init_cache(model.config, rows, length, dtype, model.backend.by_heads)

    def split(x, axes):
        return nn.with_logical_constraint(x, axes, rules=model.rules)

    return tuple(jax.tree.map(split, layer, layer.logical_axes()) for layer in cache)


def replicate(tree: Any) -> Any:
    """Replicates arrays over the mesh, if there is one, so that every host can read them."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec())


def pad_rows(model: Transformer, params: Params, rows: Sequence[Any], row: Any) -> list[Any]:
    """Appends copies of `row` until the rows divide evenly over the devices that share a batch."""
    mesh = mesh_of(params)
    parts = Layout(mesh, model.rules).parts("batch") if mesh else 1
    return [*rows, *[row] * (-len(rows) % parts)]
