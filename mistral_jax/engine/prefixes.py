"""Prefix reuse: a store of keys and values of earlier texts, which are copied into new rows.

The engine calls `find` before it reads a prompt, copies a hit with `restore`, reads the rest, and
calls `save` after each chunk of a prompt and after an answer. There are no locks: only one thread
may use a store.
"""

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mistral_jax.engine.blocks import Block, Copier
from mistral_jax.model.cache import Cache
from mistral_jax.model.transformer import Transformer
from mistral_jax.parallel.sharding import mesh_of

# Tokens of a block: few enough that the last block of a text wastes little memory, enough that a
# copy is worth a call. A block of Mistral 7B in bfloat16 takes 8 MiB.
BLOCK = 64
# Minimum number of tokens of a hit: the width of the narrowest chunk.
LEAST = 16

_ID_BYTES = 4


@dataclasses.dataclass(frozen=True, eq=False)
class _Piece:
    """The stored keys and values of a block, for all layers of one span.

    Attributes:
      block: keys and values.
      first: position of the first valid token.
      stop: position after the last valid token.
      nbytes: bytes on all devices together.
    """

    block: Block
    first: int
    stop: int
    nbytes: int


@dataclasses.dataclass(eq=False)
class _Node:
    """A block of tokens in the tree of texts; its ancestors are the blocks before it.

    A hit needs no pieces of blocks that are outside all windows. Their nodes stay while they have
    descendants, because they identify the texts.

    Attributes:
      parent: the node of the block before.
      name: token ids as bytes; the caller's key for a root of texts.
      start: position of the first token.
      stop: position after the last token.
      children: nodes of the blocks that follow, by name; no name is a prefix of another.
      pieces: stored keys and values, by span.
    """

    parent: "_Node | None"
    name: Hashable
    start: int
    stop: int
    children: dict[Hashable, "_Node"] = dataclasses.field(default_factory=dict)
    pieces: dict[int | None, _Piece] = dataclasses.field(default_factory=dict)


class Hit(NamedTuple):
    """A prefix that can be copied. It keeps its arrays alive, so restore it before the next save.

    Attributes:
      tokens: number of tokens of the prefix.
      parts: span, block, and three positions: of the block's first token, of the first token to
        copy, and one past the last token to copy. For each span in the order of the text.
    """

    tokens: int
    parts: list[tuple[int | None, Block, tuple[int, int, int]]]


class Stats(NamedTuple):
    """Counts of prefix reuse.

    Attributes:
      lookups, hits: numbers of calls of `find` and of `restore`.
      tokens: number of tokens that were restored.
      nbytes, most_bytes: bytes of all pieces on all devices together, and their bound.
      pieces, evictions: numbers of pieces stored and evicted; a block has one for each span.
    """

    lookups: int
    hits: int
    tokens: int
    nbytes: int
    most_bytes: int
    pieces: int
    evictions: int


class Prefixes:
    """Stores keys and values of texts, and copies those of the longest common prefix into a row.

    A restored row is bit-identical to the saved row in the last span - 1 tokens of each layer, or
    in all tokens if the layer has no window. Reading the prompt from its start gives the same bits
    if the chunks are the same, and otherwise equal values up to rounding.

    Each piece has arrays of its own, allocated by `save` and freed by eviction. A single pool would
    allocate all memory at the start, and as much for windowed layers as for others. Token ids are
    stored on the host, 4 bytes each, and do not count.
    """

    def __init__(
        self,
        model: Transformer,
        params: Any,
        most_bytes: int,
        block: int = BLOCK,
        least: int = LEAST,
    ):
        """Makes an empty store.

        Args:
          model: the model whose caches are saved.
          params: its parameters, from which the mesh is taken. Use another store, or another `key`,
            for other parameters, because they give other keys and values.
          most_bytes: maximum number of bytes to store, on all devices together.
          block: tokens of a block.
          least: minimum number of tokens of a hit.
        """
        self._copier = Copier(block, model.rules, mesh_of(params), model.backend)
        self._most_bytes, self._block, self._least = most_bytes, block, max(1, least)
        spans = model.config.spans
        # With a span of 1 a token sees only itself, so such layers are left out. Layers without a
        # window come last, which `_touch` relies on.
        kinds = sorted({span for span in spans if span is not None and span > 1})
        kinds += [None] if None in spans else []
        self._layers = {kind: [i for i, span in enumerate(spans) if span == kind] for kind in kinds}
        self._root = _Node(None, None, 0, 0)
        # Least recently used first.
        self._recent: OrderedDict[tuple[_Node, int | None], None] = OrderedDict()
        self._nbytes = self._lookups = self._hits = self._tokens = self._evictions = 0

    def find(self, key: Hashable, ids: Sequence[int], multiple: int = 1) -> Hit | None:
        """Finds the longest stored prefix of a prompt that leaves its last token to be read.

        Args:
          key: identifies everything else that keys and values depend on, such as an adapter, or a
            salt that separates users. Keys and token ids match by equality, not by a hash.
          ids: token ids of the prompt.
          multiple: the length of a hit is a multiple of this. If a caller reads in chunks of this
            width and saves whole chunks only, hits do not change a bit of the output.

        Returns:
          The hit; None if there is no prefix of at least `least` tokens.
        """
        self._lookups += 1
        nodes, ends = self._match(key, _as_bytes(ids)[:-_ID_BYTES])
        found = [(self._usable([*nodes, end], stop, multiple), end) for end, stop in ends]
        tokens, end = max(found, key=lambda pair: pair[0], default=(0, None))
        nodes = [*nodes, end] if tokens else nodes
        while nodes and not tokens:
            tokens = self._usable(nodes, nodes[-1].stop, multiple)
            nodes = nodes if tokens else nodes[:-1]
        if tokens < self._least:
            return None
        self._touch(nodes, tokens)
        parts = []
        for kind in self._layers:
            first = _first_needed(kind, tokens)
            for node in _needed(nodes, kind, tokens):
                places = node.start, max(first, node.start), min(tokens, node.stop)
                parts.append((kind, node.pieces[kind].block, places))
        return Hit(tokens, parts)

    def restore(self, hit: Hit, cache: Cache, row: int) -> Cache:
        """Replaces the contents of a row by a prefix; other rows do not change.

        Args:
          hit: the result of `find`.
          cache: a cache of any number of rows and cache slots; its buffers are donated.
          row: index of the row.

        Raises:
          ValueError: the cache has fewer cache slots than the prefix needs.
        """
        for kind, layers in self._layers.items():
            slots = cache[layers[0]].positions.shape[1]
            needed = hit.tokens - _first_needed(kind, hit.tokens)
            if slots < needed:
                raise ValueError(
                    f"the cache has {slots} slots for {needed} tokens of a prefix; expected a "
                    "cache as long as the row's text; make it longer"
                )
        self._hits += 1
        self._tokens += hit.tokens
        cache = self._copier.clear(cache, row)
        for kind, block, places in hit.parts:
            cache = self._copier.put(cache, self._layers[kind], row, block, places)
        return cache

    def save(
        self,
        key: Hashable,
        ids: Sequence[int],
        cache: Cache,
        row: int,
        *,
        written: int = 0,
    ) -> None:
        """Stores the keys and values of a row, and evicts the least recently used pieces.

        A windowed cache overwrites its oldest tokens, so a text longer than the window can be hit
        only near the positions where it was saved. Do not save a row whose logits are not finite.

        Args:
          key: as for `find`.
          ids: the tokens whose keys and values the row holds. A token that was sampled but not yet
            fed to the model does not belong to them.
          cache: the cache; it is not donated.
          row: index of the row.
          written: number of tokens written to the row, if surplus steps or rejected drafts went on
            past `ids`; they have overwritten the oldest tokens of a windowed cache.
        """
        total = len(ids)
        if not total:
            return
        nodes = self._plant(key, _as_bytes(ids))
        self._touch(nodes, total)
        kept = {(node, kind) for kind in self._layers for node in _needed(nodes, kind, total)}
        sources = []
        for kind, layers in self._layers.items():
            # A restored row holds only what its next token sees; a windowed cache may hold less.
            overwritten = max(total, written) - cache[layers[0]].positions.shape[1]
            first = max(_first_needed(kind, total), overwritten)
            take = functools.partial(self._copier.take, cache, layers, row)
            sources.append((kind, first, total, self._copier.nbytes(cache, layers), take))
        for node in nodes:
            if not all(self._keep(node, kept, *source) for source in sources):
                break
        self._touch(nodes, total)
        self._prune(nodes[-1], ())

    def shrink(self, most_bytes: int) -> None:
        """Evicts pieces until at most `most_bytes` are stored; the bound does not change."""
        self._make_room(self._most_bytes - most_bytes, ())

    def warm(self, cache: Cache) -> Cache:
        """Compiles all programs for caches of this shape; empties row 0, and donates `cache`."""
        for layers in self._layers.values():
            old, new = (self._copier.take(cache, layers, 0, 0) for _ in range(2))
            block = self._copier.merge(old, new, 0, 0)
            cache = self._copier.put(cache, layers, 0, block, (0, 0, 0))
        return self._copier.clear(cache, 0)

    def stats(self) -> Stats:
        """Returns the counts since the store was made."""
        done = self._lookups, self._hits, self._tokens
        return Stats(*done, self._nbytes, self._most_bytes, len(self._recent), self._evictions)

    def _match(self, key, text):
        """Returns the nodes that match whole blocks of a text, and (child, stop) pairs.

        Such a child of the last node matches the text up to position `stop`, within a block.
        """
        node, nodes, size = self._root.children.get(key), [], self._block * _ID_BYTES
        while node is not None:
            part = text[node.stop * _ID_BYTES : node.stop * _ID_BYTES + size]
            child = node.children.get(part) if len(part) == size else None
            if child is None:
                ends = [(end, common(end.name, part)) for end in node.children.values()]
                return nodes, [(end, end.start + tokens) for end, tokens in ends if tokens]
            node = child
            nodes.append(node)
        return [], []

    def _plant(self, key, text):
        """Returns the nodes of a text, and adds those that are missing."""
        node = self._root.children.setdefault(key, _Node(self._root, key, 0, 0))
        nodes, size = [], self._block * _ID_BYTES
        for start in range(0, len(text), size):
            node = self._child(node, text[start : start + size])
            nodes.append(node)
        return nodes

    def _child(self, node, part):
        """Returns the child whose name begins with `part`; extends or adds one if there is none."""
        children = node.children
        alike = children.get(part)
        if alike is None:
            new = _Node(node, part, node.stop, node.stop)
            names = (name for name in children if name.startswith(part) or part.startswith(name))
            alike = children.get(next(names, part), new)
        if len(part) >= len(alike.name):
            children.pop(alike.name, None)
            alike.name, alike.stop = part, node.stop + len(part) // _ID_BYTES
            children[part] = alike
        return alike

    def _prune(self, node, kept):
        """Removes a node, then its ancestors, if they have no child, piece or entry in `kept`."""
        while node is not self._root and not node.pieces and not node.children:
            if any((node, kind) in kept for kind in self._layers):
                return
            if node.parent.children.get(node.name) is node:
                del node.parent.children[node.name]
            node = node.parent

    def _usable(self, nodes, stop, multiple):
        """Returns the length, at most `stop`, of the longest hit that ends in the last node, or 0.

        If it cannot be used, no shorter hit can: it would need the same tokens and older ones.
        """
        pieces = nodes[-1].pieces
        stop = min([stop, *(pieces[kind].stop if kind in pieces else 0 for kind in self._layers)])
        stop -= stop % multiple

        def held(node, kind):
            piece = node.pieces.get(kind)
            first, last = max(_first_needed(kind, stop), node.start), min(stop, node.stop)
            return piece is not None and piece.first <= first and last <= piece.stop

        good = stop > nodes[-1].start and all(
            held(node, kind) for kind in self._layers for node in _needed(nodes, kind, stop)
        )
        return stop if good else 0

    def _touch(self, nodes, tokens):
        """Marks the pieces of a hit as recently used, so that dependent pieces are evicted first.

        A piece depends on earlier blocks, and one of a windowed layer on unwindowed layers.
        In this order, eviction never leaves pieces that no hit can use.
        """
        for kind in self._layers:
            for node in reversed(_needed(nodes, kind, tokens)):
                if kind in node.pieces:
                    self._recent.move_to_end((node, kind))

    def _keep(self, node, kept, kind, first, stop, nbytes, take):
        """Stores a block's tokens from `first` to `stop`; returns False if memory is full."""
        first, stop = max(node.start, first), min(node.stop, stop)
        old = node.pieces.get(kind)
        if first >= stop or (old and old.first <= first and stop <= old.stop):
            return True
        if not self._make_room(nbytes, kept):
            return False
        block, old = take(node.start), node.pieces.get(kind)
        if old and old.first <= stop and first <= old.stop:
            bounds = old.first - node.start, old.stop - node.start
            block = self._copier.merge(old.block, block, *bounds)
            first, stop = min(first, old.first), max(stop, old.stop)
        if old:
            self._drop(node, kind)
        node.pieces[kind] = _Piece(block, first, stop, nbytes)
        self._recent[node, kind] = None
        self._nbytes += nbytes
        return True

    def _make_room(self, nbytes, kept):
        """Evicts pieces until `nbytes` fit; returns False if the next one to evict is in `kept`."""
        while self._nbytes + nbytes > self._most_bytes:
            node, kind = next(iter(self._recent), (None, None))
            if node is None or (node, kind) in kept:
                return False
            self._drop(node, kind)
            self._prune(node, kept)
            self._evictions += 1
        return True

    def _drop(self, node, kind):
        self._nbytes -= node.pieces.pop(kind).nbytes
        del self._recent[node, kind]


def _as_bytes(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, np.int32).tobytes()


def common(one: bytes, other: bytes) -> int:
    """Returns the number of token ids that two texts have in common at their start."""
    length = min(len(one), len(other))
    a, b = (np.frombuffer(x[:length], np.int32) for x in (one, other))
    differ = np.flatnonzero(a != b)
    return int(differ[0]) if differ.size else len(a)


def _first_needed(span: int | None, tokens: int) -> int:
    """Returns the first position that the token at position `tokens` may see."""
    return 0 if span is None else max(0, tokens - span + 1)


def _needed(nodes: Sequence[_Node], span: int | None, tokens: int) -> list[_Node]:
    """Returns the nodes of a text with positions that the token at position `tokens` may see."""
    first = _first_needed(span, tokens)
    return [node for node in nodes if first < node.stop and node.start < tokens]
