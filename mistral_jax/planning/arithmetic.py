"""What a program costs by arithmetic: multiplications, bytes, and what devices must exchange.

It asks no compiler: `tests/planning/test_planning.py` holds it to what XLA makes of it.
Letters are those of `model/transformer.py`; t, m, f, b and s are the devices over which heads, the
MLP's width, the residual width of weights, rows, and the length of a text are split.
"""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import jax

from mistral_jax.config import ModelConfig
from mistral_jax.model.transformer import Transformer
from mistral_jax.ops.attention import BLOCK
from mistral_jax.ops.partition import mesh_axes
from mistral_jax.parallel.sharding import Layout
from mistral_jax.planning.collectives import Collective
from mistral_jax.planning.programs import Shapes, weights
from mistral_jax.training.flops import keys_seen, mean_seen, of_attention, of_weights


def tokens(program: str, of: Shapes) -> int:
    """Returns the tokens that a program works on in all rows: a chunk, one a row, or a batch."""
    return of.batch * {"prefill": of.chunk, "decode": 1, "train": of.length}[program]


def flops(program: str, config: ModelConfig, of: Shapes) -> float:
    """Counts the model's own multiplications and additions, on all devices together.

    Training takes three times those of the way forward. A chunk counts as the average of its
    prompt's. See `planning.flops` for what counts.
    """
    count = tokens(program, of)
    scored = of.batch if program == "prefill" else count  # positions whose logits are wanted
    last = of.length - 1
    keys = keys_seen(config, last) if program == "decode" else mean_seen(config, of.length)
    forward = of_weights(config, count, scored) + of_attention(config, count, keys)
    return forward * (3 if program == "train" else 1)


def moved(program: str, held: Any, config: ModelConfig) -> float:
    """Counts the bytes that a device must at least read and write in its memory.

    Weights and cache are read once by a chunk or a step. Training reads weights forward and back,
    writes gradients, and reads and writes parameters and both of AdamW's moments; activations come
    on top.

    Args:
      program: one of `programs.PROGRAMS`.
      held: its arguments, as `programs.arguments` gives them.
      config: the model.
    """
    if program == "train":
        return 10 * size(held.trainable)
    params, cache = held
    unread = 0 if config.tie_embeddings else size(params["embed"])
    return size(params) - unread + size(cache)


def size(tree: Any) -> int:
    """Counts the bytes of arrays, or descriptions of arrays, on one device."""
    return sum(_local(x) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def exchanges(program: str, model: Transformer, layout: Layout, of: Shapes) -> list[Collective]:
    """Lists what the devices of a layout have to exchange.

    Tensor parallel: the sums of two projections a layer (Megatron-LM, arXiv 1909.08053), and back,
    of what goes into all five; the lookup; the logits' gathering, or their three reductions in
    training. Fully sharded (arXiv 2304.11277): each weight gathered, each gradient summed. Data
    parallel: each gradient summed. A length that is split: keys and values gathered, and summed on
    the way back, a block of queries at a time; of generation that is not all (XLA then splits the
    products of single tokens as it likes).

    Returns:
      One entry an array, of what arrives on one device.
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
    add("all-reduce", m, *residual, times=config.num_layers, source="down_proj")
    add("all-reduce", t, *residual, times=again, source="o_proj, again")
    params = weights(program, model, layout, of)
    for x in jax.tree.leaves(params["embed"]):  # The values and scales of int8, where it is tied.
        parts = _split(x, layout)
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
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        parts = _split(x, layout)
        gathered = _local(x) * parts
        if not name.startswith("embed/"):
            # A norm's scale is so small that XLA does not keep it for the way back.
            times = 1 + (train and x.ndim == 1) + bool(again and name.startswith("layers_"))
            add("all-gather", parts, gathered, itemsize=x.dtype.itemsize, times=times, source=name)
        if train and not (f > 1 and name.startswith("embed/")):
            add("all-reduce", b * s, gathered, source=f"{name}, gradient")
    return found


def sent(collectives: Iterable[Collective]) -> float:
    """Counts the bytes that a device sends."""
    return sum(collective.sent * collective.times for collective in collectives)


def state_sizes(program: str, held: Any) -> dict[str, int]:
    """Counts the bytes that stay on one device, by what they are."""
    if program == "train":
        return {"weights": size(held.trainable), "optimizer": size(held.opt_state)}
    return {"weights": size(held[0]), "cache": size(held[1])}


def _split(x: jax.ShapeDtypeStruct, layout: Layout) -> int:
    """Returns in how many parts the residual width of a weight lies; a scale may have none."""
    if layout.mesh.size == 1:
        return 1
    entries = (axes if isinstance(axes, tuple) else (axes,) for axes in x.sharding.spec)
    on = set(itertools.chain(*entries)) & set(mesh_axes(layout.rules, "embed"))
    return layout.parts("embed") if on else 1


def _local(x: jax.ShapeDtypeStruct) -> int:
    return math.prod(x.sharding.shard_shape(x.shape))
