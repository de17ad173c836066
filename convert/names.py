"""The table of tensors: what each is called, and how it lies, in each format. It reads no files.

A source stores a matrix as (out, in); ours unfolds the heads and is otherwise the same bytes, but
for one thing: official files rotate pairs (2i, 2i + 1) of a head, Hugging Face's and ours halves
(i, i + H / 2), so the rows of wq and wk are reordered.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mistral_jax.config import ModelConfig


class Row(NamedTuple):
    """One tensor of the model.

    Attributes:
      path: ours, in the tree of parameters.
      official: name in `consolidated.*`.
      hf: name in a Hugging Face folder.
      axes: letters of our shape (see `model/transformer.py`).
      file_axes: the same in a file, where joined letters are one axis.
      split: axis along which the parts of a `consolidated.NN.pth` divide it; None = each has it all.
      pairs: whether official files interleave the rotary pairs.
    """

    path: str
    official: str
    hf: str
    axes: str
    file_axes: str
    split: int | None = None
    pairs: bool = False


_LAYER = (
    Row("attn_norm/scale", "attention_norm", "input_layernorm", "D", "D"),
    Row("attn/q_proj/kernel", "attention.wq", "self_attn.q_proj", "N H D", "NH D", 0, True),
    Row("attn/k_proj/kernel", "attention.wk", "self_attn.k_proj", "K H D", "KH D", 0, True),
    Row("attn/v_proj/kernel", "attention.wv", "self_attn.v_proj", "K H D", "KH D", 0),
    Row("attn/o_proj/kernel", "attention.wo", "self_attn.o_proj", "D N H", "D NH", 1),
    Row("mlp_norm/scale", "ffn_norm", "post_attention_layernorm", "D", "D"),
    Row("mlp/gate_proj/kernel", "feed_forward.w1", "mlp.gate_proj", "F D", "F D", 0),
    Row("mlp/down_proj/kernel", "feed_forward.w2", "mlp.down_proj", "D F", "D F", 1),
    Row("mlp/up_proj/kernel", "feed_forward.w3", "mlp.up_proj", "F D", "F D", 0),
)
_EMBED = Row("embed/embedding", "tok_embeddings", "model.embed_tokens", "V D", "V D", 1)
_NORM = Row("final_norm/scale", "norm", "model.norm", "D", "D")
_HEAD = Row("lm_head/kernel", "output", "lm_head", "V D", "V D", 0)

# Tables of rotary angles that old files carry; a model computes them.
IGNORABLE = re.compile(r"rope\.freqs|(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def groups(config: ModelConfig) -> Iterator[list[Row]]:
    """Yields the rows of a model in the order of its forward pass, a layer at a time."""
    yield [_weight(_EMBED)]
    for i in range(config.num_layers):
        yield [
            row._replace(
                path=f"layers_{i}/{row.path}",
                official=f"layers.{i}.{row.official}.weight",
                hf=f"model.layers.{i}.{row.hf}.weight",
            )
            for row in _LAYER
        ]
    yield [_weight(row) for row in ([_NORM] if config.tie_embeddings else [_NORM, _HEAD])]


def shape(row: Row, config: ModelConfig) -> tuple[int, ...]:
    """Returns the shape of a row in our tree."""
    return tuple(_size(axis, config) for axis in row.axes.split())


def file_shape(row: Row, config: ModelConfig) -> tuple[int, ...]:
    """Returns the shape of a row in a file of either format."""
    return tuple(_size(axis, config) for axis in row.file_axes.split())


def from_file(row: Row, tensor: np.ndarray, config: ModelConfig, official: bool) -> np.ndarray:
    """Turns a tensor as a file has it into ours; a view where nothing moves."""
    if official and row.pairs:
        heads, head_dim, width = shape(row, config)
        tensor = tensor.reshape(heads, head_dim // 2, 2, width).swapaxes(1, 2)
    return tensor.reshape(shape(row, config))


def to_file(row: Row, array: np.ndarray, config: ModelConfig, official: bool) -> np.ndarray:
    """Turns one of our arrays into the tensor that a file has: the inverse of `from_file`."""
    if official and row.pairs:
        heads, head_dim, width = shape(row, config)
        array = array.reshape(heads, 2, head_dim // 2, width).swapaxes(1, 2)
    return array.reshape(file_shape(row, config))


def _weight(row: Row) -> Row:
    return row._replace(official=f"{row.official}.weight", hf=f"{row.hf}.weight")


def _size(axis: str, config: ModelConfig) -> int:
    size = 1
    for letter in axis:
        size *= getattr(config, _FIELDS[letter])
    return size


_FIELDS = {
    "V": "vocab_size",
    "D": "embed_dim",
    "F": "mlp_dim",
    "N": "num_heads",
    "K": "num_kv_heads",
    "H": "head_dim",
}
