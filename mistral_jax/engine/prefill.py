"""Reading prompts into a cache, in chunks of few fixed shapes. It chooses no tokens.

Shapes come in buckets, so prompts of many lengths share a few compiled programs.
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
from mistral_jax.ops.backend import PLAIN, Backend
from mistral_jax.parallel.sharding import Layout, mesh_of, on_mesh

Params = Mapping[str, Any]

# Tokens of a chunk (C): enough to keep the processor busy, few enough to bound the activations.
CHUNK = 512
# Tokens of all rows that a GPU reads at a time, if chunks of one row have to be longer for it.
GPU_TOKENS = 2048
# Widths of the chunks that read what remains of a prompt, if they are less than C: few are few
# programs to compile, where a cache and a number of rows have programs of their own.
_WIDTHS = (16, 64, 512)
_SMALLEST_ROOM, _COARSE_ROOM = 256, 4096
_COARSE_ROWS = 8

# Why a row ends, or a text has no score.
NOT_FINITE = (
    "the model's logits are not finite (NaN or infinity), as overflow of float16 makes them: load "
    "it with another type (--dtype bfloat16 or float32), or check its weights with "
    "`python -m mistral_jax.convert inspect DIR --verify`"
)


def room(tokens: int) -> int:
    """Rounds a number of tokens up to a bucket: 256 to 4096 by powers of two, then in fourths.

    Few rooms are few programs to compile. A power of two costs a row of Mistral 7B at most 256 MiB
    of bfloat16 more than it needs, and a fourth of a power at most a quarter.
    """
    return _round_up(max(tokens, _SMALLEST_ROOM), _COARSE_ROOM, 8)


def row_count(rows: int) -> int:
    """Rounds a number of rows up to a bucket: 1, 2, 4, 8, then two to each doubling."""
    return _round_up(rows, _COARSE_ROWS, 4)


def _round_up(count: int, coarse: int, parts: int) -> int:
    """Rounds up to a power of two; beyond `coarse` to one of `parts` equal parts of one."""
    power = 1 << (count - 1).bit_length()
    step = power if count <= coarse else power // parts
    return -(-count // step) * step


def slots(model: Transformer, tokens: int) -> int:
    """Returns how many tokens a cache must hold: of few sizes, and one where all have windows."""
    spans = model.config.spans
    return room(tokens) if None in spans else min(room(tokens), max(spans))


def chunk_size(rows: int, backend: Backend) -> int:
    """Returns C for a number of rows."""
    if backend.platform != "gpu":
        return CHUNK
    return max(CHUNK, GPU_TOKENS >> (rows - 1).bit_length())


def chunks(
    rows: Sequence[Sequence[int]], widths: Sequence[int] = _WIDTHS, backend: Backend = PLAIN
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts rows into chunks of C tokens, and what remains into chunks of few smaller widths.

    Args:
      rows: token ids, B rows of any lengths.
      widths: the smaller widths, rising.
      backend: what reads them.

    Yields:
      Tokens and positions of a chunk, [B, T] int32 both; -1 = padding, after a row's end.
    """
    longest, start = max(map(len, rows)), 0
    while start < longest:
        width = chunk_width(len(rows), longest - start, backend, widths)
        yield cut(rows, [start] * len(rows), width)
        start += width


def cut(
    rows: Sequence[Sequence[int]], starts: Sequence[int], width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and positions [B, T] int32 of a chunk that begins at a place of each row."""
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
      rest: tokens of the longest row that are still to be read.
      backend: what reads them.
      smaller: the smaller widths, rising.
      most: widest chunk that is wanted, if there is a narrower one; None = C.
    """
    size = chunk_size(rows, backend)
    known = [*(width for width in smaller if width < size), size]
    if most is not None:
        known = [width for width in known if width <= most] or known[:1]
    return _width(rest, known)


def widths(rows: int, backend: Backend) -> list[int]:
    """Returns the widths of all chunks in which so many rows are read."""
    size = chunk_size(rows, backend)
    return [*(width for width in _WIDTHS if width < size), size]


def padded(length: int, backend: Backend) -> int:
    """Returns how many places the chunks of one prompt of `length` tokens have in all."""
    total = 0
    while total < length:
        total += chunk_width(1, length - total, backend)
    return total


def _width(rest: int, widths: Sequence[int]) -> int:
    """Returns the width of the next chunk: at most half of it is padding, but of the narrowest."""
    least = next((i for i, width in enumerate(widths) if width >= rest), len(widths) - 1)
    return widths[least - 1 if least and widths[least] > 2 * rest else least]


class Reading:
    """Prompts that are being read together, chunk by chunk.

    Attributes:
      cache: what has been read so far of each row.
      logits: of the token after each prompt that has been read, [B, V] float32.
      rest: most tokens of a prompt that are still to be read.
    """

    def __init__(
        self,
        model: Transformer,
        params: Params,
        prompts: Sequence[Sequence[int]],
        length: int,
        prefixes: Prefixes | None = None,
    ):
        """Begins.

        Args:
          model: the model.
          params: its parameters.
          prompts: token ids, B rows; an empty one has logits that mean nothing.
          length: tokens that the cache has room for where no window is shorter.
          prefixes: texts whose keys and values need not be computed again.
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
        self.rest = max(map(operator.sub, lengths, self._starts))

    def read(self, most: int | None = None) -> int:
        """Reads the next chunk, of not much more than `most` tokens a row; returns its width."""
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
        # A ring has its latest tokens alone: what it holds now is of use to texts that part here.
        rings = any(self._model.config.spans)
        if rings or self.rest <= 0:
            self._keep([start if rings else 0 for start in read])
        return width

    def _keep(self, known: Sequence[int]) -> None:
        """Keeps what rows have read, for prompts that begin like theirs.

        Args:
          known: tokens of each row that need not be kept.
        """
        with on_mesh(self._params):
            whole = jax.device_get(sound(self.cache))
        for row, (prompt, start) in enumerate(zip(self._prompts, known, strict=True)):
            if start < len(prompt) and whole[row]:
                self._prefixes.save((), prompt[: self._starts[row]], self.cache, row)


@jax.jit
def sound(cache: Cache) -> jax.Array:
    """Tells of each row [B] whether its keys and values are finite: NaN spoils a whole chunk."""
    leaves = [x for x in jax.tree.leaves(cache[-1]) if jnp.issubdtype(x.dtype, jnp.floating)]
    finite = (jnp.isfinite(x).all((1, 2, 3)) for x in leaves)
    return replicate(functools.reduce(jnp.logical_and, finite))


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
    reading = Reading(model, params, prompts, slots(model, length))
    while reading.rest > 0:
        reading.read()
    return reading.cache, reading.logits


@functools.partial(jax.jit, static_argnames=("model", "rows", "length"), keep_unused=True)
def start_reading(
    model: Transformer, params: Params, rows: int, length: int
) -> tuple[Cache, jax.Array]:
    """Makes what `read_chunk` takes over: an empty cache, and logits that mean nothing.

    It is a program of its own, so that a first chunk is read by the same one as later ones: JAX
    commits both to the device of `params`, which are not used otherwise.
    """
    logits = jnp.zeros((rows, model.config.vocab_size), jnp.float32)
    return empty_cache(model, rows, length), whole_rows(model, logits)


@functools.partial(jax.jit, static_argnames="model", donate_argnames=("cache", "logits"))
def read_chunk(model, params, tokens, positions, lengths, cache, logits):
    """Reads one chunk; takes over the logits of rows that end in it."""
    last = positions == lengths[:, None] - 1
    new, cache = model.apply(
        {"params": params}, tokens, positions, cache, logits_at=jax.lax.argmax(last, 1, jnp.int32)
    )
    new = whole_rows(model, new[:, 0])
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
