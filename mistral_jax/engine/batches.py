"""Divides segments into batches, and moves the caches from which their children go on."""

import functools
from collections.abc import Iterator, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from mistral_jax.engine.shared import Segment
from mistral_jax.model.cache import Cache

# Maximum number of cache slots of segments whose children are read together.
_POOLED = 4096
# A row whose batch would be padding is read alone; lengths are compared in units of this many
# tokens.
_UNIT = 16


def ends_only(segment: Segment) -> bool:
    """Tells whether no token of a segment is scored but those after its end."""
    return all(first == segment.stop - 1 for _, first in segment.asked)


class Pool:
    """Caches of several batches, so that their children are divided into batches together.

    The more children there are, the more alike are the lengths of a batch, and the less is padding.
    """

    def __init__(self):
        self.caches: list[Cache] = []
        self._below: list[tuple[Segment, int]] = []
        self._rows = 0

    @property
    def is_full(self) -> bool:
        """Whether one more cache like the last would make the pool too large."""
        if not self.caches:
            return False
        rows, _ = self.caches[-1][0].positions.shape
        slots = max(layer.positions.shape[1] for layer in self.caches[-1])
        return (self._rows + rows) * slots > _POOLED

    def takes(self, cache: Cache) -> bool:
        """Tells whether a cache suits the others."""
        shapes = ([x.shape[1:] for x in jax.tree.leaves(own)] for own in (cache, *self.caches[:1]))
        return len({str(own) for own in shapes}) == 1

    def add(self, cache: Cache, below: Sequence[tuple[Segment, int]]) -> None:
        """Adds a cache and the children of its rows."""
        self._below += [(child, self._rows + row) for child, row in below]
        self.caches.append(cache)
        self._rows += cache[0].positions.shape[0]

    def empty(self) -> tuple[Sequence[Segment], Sequence[int], Cache]:
        """Returns children, the rows of their parents, and the cache with these rows."""
        (children, places), caches = zip(*self._below, strict=True), self.caches
        self.__init__()
        return children, places, caches[0] if len(caches) == 1 else _join(*caches)


def count_tokens(segment: Segment) -> int:
    """Returns the number of tokens of a segment and its descendants."""
    return segment.stop - segment.start + sum(map(count_tokens, segment.children))


def alternatives(count: int) -> int:
    """Rounds a number of targets up to a bucket: 1, 4, 16, and so on."""
    return 1 << (max(count, 1) - 1).bit_length() + (max(count, 1) - 1).bit_length() % 2


def batches(lengths: Sequence[int], batch: int) -> Iterator[tuple[list[int], int]]:
    """Yields the indices of rows that are read together, and the number of rows of their arrays.

    A row that is so long that more than half of its batch would be padding gets a batch of its own.
    """
    # The longest rows come first, so that a lack of memory shows at once.
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        indices = order[start : start + batch]
        places = [-(-lengths[i] // _UNIT) for i in indices]
        if batch * places[0] > 2 * sum(places):
            indices = indices[:1]
        yield indices, batch if len(indices) > 1 else 1
        start += len(indices)


@jax.jit
def _join(*caches):
    """Returns a cache with the rows of several."""
    return jax.tree.map(lambda *rows: jnp.concatenate(rows), *caches)


@functools.partial(jax.jit, static_argnames="model")
def pick_rows(model, cache, rows):
    """Copies rows of a cache into a new cache; a row may be copied several times."""

    def pick(x, axes):
        return nn.with_logical_constraint(x[rows], axes, rules=model.rules)

    return tuple(jax.tree.map(pick, layer, layer.logical_axes()) for layer in cache)
