"""The cost of a program by arithmetic: FLOPs, bytes of memory traffic, and collectives.

`tests/planning/test_planning.py` compares these numbers with the programs that XLA compiles.
Letters are those of `model/transformer.py`. In addition t, m, f, b and s are the numbers of devices
that partition the heads, the width of the MLP, the residual width of weights, the rows, and the
length of a text.
"""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from mistral_jax.config import ModelConfig
from mistral_jax.engine.prefill import slots
from mistral_jax.model.transformer import Transformer
from mistral_jax.ops.attention import BLOCK
from mistral_jax.ops.partition import mesh_axes
from mistral_jax.parallel.sharding import Layout
from mistral_jax.planning.collectives import Collective
from mistral_jax.planning.programs import Shapes, weights
from mistral_jax.training.flops import keys_seen, mean_seen, of_attention, of_weights

# Queries and keys of a block of a TPU's kernels of attention.
_KERNEL_BLOCK = 512


def tokens(program: str, of: Shapes) -> int:
    """Returns the number of tokens that one run of a program processes, in all rows together.

    They are a chunk of each row (prefill), one token of each row (decode), or a batch (train).
    """
    return of.batch * {"prefill": of.chunk, "decode": 1, "train": of.length}[program]


def flops(program: str, config: ModelConfig, of: Shapes) -> float:
    """Counts the model's multiplications and additions, on all devices together.

    Training takes three times the FLOPs of the forward pass. A chunk gets the average over the
    chunks of its prompt. `training/flops.py` says which operations count.
    """
    count = tokens(program, of)
    scored = of.batch if program == "prefill" else count  # Positions whose logits are computed.
    last = of.length - 1
    keys = keys_seen(config, last) if program == "decode" else mean_seen(config, of.length)
    forward = of_weights(config, count, scored) + of_attention(config, count, keys)
    return forward * (3 if program == "train" else 1)


def attended(program: str, model: Transformer, of: Shapes, start: int | None = None) -> float:
    """Returns the share of the pairs of queries and keys that a kernel of attention computes.

    The keys are those of the cache's slots and of the chunk, or of the training batch. Kernels skip
    blocks of keys that no query of a block of queries sees. Decoding counts a full cache.

    Args:
      program: one of `programs.PROGRAMS`.
      model: the model.
      of: the sizes.
      start: for prefill, position of the chunk's first token; None = the mean over the chunks of a
        prompt.
    """
    if program == "decode":
        return 1.0
    if program == "prefill" and start is None:
        starts = range(0, of.length, of.chunk)
        return float(np.mean([attended(program, model, of, start) for start in starts]))
    width, room = (of.length, 0) if program == "train" else (of.chunk, slots(model, of.length))
    shares = []
    for span in model.config.spans:
        held = min(room, span or room)
        computed = sum(
            min(held + width, _blocks(first + (start or 0), width - first, span))
            for first in range(0, width, _KERNEL_BLOCK)
        )
        shares.append(computed * _KERNEL_BLOCK / (width * (held + width)))
    return min(1.0, float(np.mean(shares)))


def _blocks(first: int, left: int, span: int | None) -> int:
    """Returns the keys, in whole blocks, that queries from position `first` on see together."""
    last = first + min(left, _KERNEL_BLOCK) - 1
    oldest = max(0, first - span + 1) if span else 0
    return (last // _KERNEL_BLOCK - oldest // _KERNEL_BLOCK + 1) * _KERNEL_BLOCK


def moved(program: str, held: Any, config: ModelConfig) -> float:
    """Counts the least bytes that a device reads and writes in its memory.

    A chunk or a step of decoding reads the weights and the cache once; a step reads only the
    experts that it chooses. Training reads the weights
    in the forward and the backward pass, writes gradients, and reads and writes the parameters and
    both moments of AdamW. Activations are not counted.

    Args:
      program: one of `programs.PROGRAMS`.
      held: the program's arguments, from `programs.arguments`.
      config: the model's architecture.
    """
    if program == "train":
        return 10 * size(held.trainable)
    params, cache = held
    unread = 0 if config.tie_embeddings else size(params["embed"])
    if config.num_experts and program == "decode":
        # Rows choose at most as many experts as there are pairs of a row and an expert.
        pairs = cache[0].positions.shape[0] * config.experts_per_token
        flat = jax.tree.leaves_with_path(params)
        experts = [x for path, x in flat if _has_experts(_name(path))]
        unread += int(size(experts) * max(0, 1 - pairs / config.num_experts))
    return size(params) - unread + size(cache)


def size(tree: Any) -> int:
    """Counts the bytes on one device of arrays, or of descriptions of arrays."""
    return sum(_local(x) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def exchanges(program: str, model: Transformer, layout: Layout, of: Shapes) -> list[Collective]:
    """Lists the collectives that a layout needs.

    Tensor parallel (Megatron-LM, arXiv 1909.08053): all-reduces of the outputs of two projections
    in each layer, and in the backward pass of the inputs of all five; an all-reduce of the lookup;
    and an all-gather of the logits, or in training three all-reduces of the loss.
    Fully sharded (arXiv 2304.11277): an all-gather of each weight, a sum of each gradient.
    Data parallel: a sum of each gradient.
    Partitioned length: an all-gather of keys and values, and their sums in the backward pass for
    each block of queries. Generation has more collectives than these, because XLA partitions the
    products of single tokens as it chooses.

    Returns:
      One entry for each array, with its size on one device.
    """
    config, train = model.config, program == "train"
    t, kv, m = layout.parts("heads"), layout.parts("kv_heads"), layout.parts("mlp")
    vocab = layout.parts("vocab")
    f, b, s = layout.parts("embed"), layout.parts("batch"), layout.parts("length")
    width = 4 if train else of.dtype.itemsize
    rows, whole = of.batch // b, tokens(program, of) // of.batch
    length = max(1, whole // s)
    found: list[Collective] = []

    def add(kind, group, *shape, itemsize=width, times=1, source=""):
        if group > 1 and times:
            volume = math.prod(shape) * itemsize
            found.append(Collective(kind, "", shape, volume, group, times, 0, source))

    residual = rows, length, config.embed_dim
    again = config.num_layers if train and model.remat else 0
    add("all-reduce", t, *residual, times=config.num_layers, source="o_proj")
    if config.num_experts:
        found += _of_experts(program, model, layout, residual, again, width)
        m = 1
    add("all-reduce", m, *residual, times=config.num_layers, source="down_proj")
    add("all-reduce", t, *residual, times=again, source="o_proj, again")
    params = weights(program, model, layout, of)
    for x in jax.tree.leaves(params["embed"]):  # A tied embedding in int8 has values and scales.
        parts = _width_parts(x, layout)
        shape = of.batch if parts > 1 else rows, length, x.shape[1] // parts
        add("all-reduce", vocab, *shape, itemsize=x.dtype.itemsize, source="embed")
    add("all-to-all", f, *residual, times=2 if train else 1, source="embed")
    seen = rows, whole, config.num_kv_heads // kv, config.head_dim
    add("all-gather", s, *seen, times=2 * (config.num_layers + again), source="k, v")
    if not train:
        add("all-gather", vocab, rows, config.vocab_size, itemsize=4, source="logits")
    else:
        blocks = math.ceil(length / BLOCK)
        add("all-reduce", s, *seen, times=2 * config.num_layers * blocks, source="k, v, back")
        add("all-reduce", vocab, rows, length, times=3, source="loss")
        add("all-reduce", vocab, *residual, source="lm_head, back")
        add("all-reduce", t, *residual, times=config.num_layers, source="q, back")
        add("all-reduce", m, *residual, times=2 * config.num_layers, source="gate, up, back")
        add("all-reduce", kv, *residual, times=2 * config.num_layers, source="k, v, back")
        add("all-reduce", t // kv, *seen, times=2 * config.num_layers, source="k, v, shared")
    for path, x in jax.tree.leaves_with_path(params):
        name = _name(path)
        parts = _width_parts(x, layout)
        gathered = _local(x) * parts
        if not name.startswith("embed/"):
            # XLA gathers a norm's scale, which is small, again in the backward pass.
            times = 1 + (train and x.ndim == 1) + bool(again and name.startswith("layers_"))
            add("all-gather", parts, gathered, itemsize=x.dtype.itemsize, times=times, source=name)
        if train:
            # Each device has the gradients of its own experts for all rows of their group.
            copies = b * s // (_shared(layout)[1] if _has_experts(name) else 1)
            # Rows may be partitioned over more devices than the width: matrices are then summed in
            # two steps.
            first = parts if parts > 1 and x.ndim > 1 else copies
            if not (f > 1 and name.startswith("embed/")):
                add("all-reduce", first, gathered, source=f"{name}, gradient")
            add("all-reduce", copies // first, _local(x), source=f"{name}, gradient")
    return found


def _of_experts(program, model, layout, residual, again, width) -> list[Collective]:
    """Lists the collectives of the experts' layers; see `ops/expert_partition.py`.

    Devices sum their parts of the experts' outputs. Where rows are partitioned along the experts'
    mesh axis, devices gather each other's tokens first, and each keeps the sum of its own.
    """
    config, train, (alone, shared) = model.config, program == "train", _shared(layout)
    rows, length, _ = residual
    whole = rows * shared, *residual[1:]
    shares = length, config.experts_per_token
    found, layers = [], config.num_layers

    def add(kind, group, shape, times, source, itemsize=width):
        if group > 1 and times:
            volume = math.prod(shape) * itemsize
            found.append(Collective(kind, "", shape, volume, group, times, 0, source))

    add("all-reduce", alone, residual, layers + again, "experts")
    add("all-gather", shared, whole, layers + again, "experts' tokens")
    add("all-gather", shared, (rows * shared, *shares), layers + again, "experts' shares", 4)
    add("reduce-scatter", shared, residual, layers + again, "experts")
    if train:
        add("all-reduce", alone, residual, layers, "experts, back")
        add("all-reduce", alone, (rows * shared, *shares), layers, "experts' shares, back", 4)
        add("all-gather", shared, whole, layers, "experts, back")
        add("reduce-scatter", shared, residual, layers, "experts' tokens, back")
        add("reduce-scatter", shared, (rows, *shares), layers, "experts' shares, back", 4)
        devices = layout.parts("batch") * layout.parts("length")
        for name in ("chosen", "likely", "read"):
            add("all-reduce", devices, (config.num_experts,), layers, f"router, {name}", 4)
    return found


def _shared(layout: Layout) -> tuple[int, int]:
    """Returns over how many devices experts' outputs are summed: with the same rows, and others."""
    rows = {*mesh_axes(layout.rules, "batch"), *mesh_axes(layout.rules, "length")}
    summed = {*mesh_axes(layout.rules, "expert"), *mesh_axes(layout.rules, "mlp")}
    sizes = layout.mesh.shape
    alone, shared = (math.prod(sizes[x] for x in axes) for axes in (summed - rows, summed & rows))
    return alone, shared


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _has_experts(name: str) -> bool:
    return "/moe/" in name and "/router/" not in name


def sent(collectives: Iterable[Collective]) -> float:
    """Counts the bytes that a device sends."""
    return sum(collective.sent * collective.times for collective in collectives)


def state_sizes(program: str, held: Any) -> dict[str, int]:
    """Counts the bytes that stay in one device's memory between runs, by kind."""
    if program == "train":
        return {"weights": size(held.trainable), "optimizer": size(held.opt_state)}
    return {"weights": size(held[0]), "cache": size(held[1])}


def _width_parts(x: jax.ShapeDtypeStruct, layout: Layout) -> int:
    """Returns the number of parts of a weight's residual width; 1 if it is not partitioned."""
    if layout.mesh.size == 1:
        return 1
    entries = (axes if isinstance(axes, tuple) else (axes,) for axes in x.sharding.spec)
    on = set(itertools.chain(*entries)) & set(mesh_axes(layout.rules, "embed"))
    return layout.parts("embed") if on else 1


def _local(x: jax.ShapeDtypeStruct) -> int:
    return math.prod(x.sharding.shard_shape(x.shape))
