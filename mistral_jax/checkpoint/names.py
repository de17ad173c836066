"""The table of weights: what each is called, and how it lies, in each format. It reads no files.

Other programs store a matrix as (out, in), and so do we, with the heads unfolded: the bytes are the
same. But official files rotate the pairs (2i, 2i + 1) of a head, and Hugging Face and we the halves
(i, i + H / 2): between the two, the rows of wq and wk change places.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mistral_jax.config import ModelConfig


class Weight(NamedTuple):
    """One weight of the model.

    Attributes:
      path: ours, in the tree of parameters.
      official: name in `consolidated.*`.
      hf: name in a Hugging Face folder.
      axes: letters of our shape (see `model/transformer.py`).
      file_axes: the same in a file, where two letters in one word are one axis.
      shard_axis: axis that several `consolidated.NN.pth` divide among them; None = each has all.
      pairs: whether official files interleave the rotary pairs.
    """

    path: str
    official: str
    hf: str
    axes: str
    file_axes: str
    shard_axis: int | None = None
    pairs: bool = False

    def module(self, official: bool) -> str:
        """Returns the name of the module that holds it in the model that a file is for."""
        return self.official if official else self.hf

    def name(self, official: bool) -> str:
        """Returns its name in a file."""
        return f"{self.module(official)}.weight"

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Returns the shape in our tree."""
        return tuple(_size(axis, config) for axis in self.axes.split())

    def file_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Returns the shape in a file, of either format."""
        return tuple(_size(axis, config) for axis in self.file_axes.split())

    def divided(self, config: ModelConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the sizes of a matrix's outputs and of its inputs, which a file folds each."""
        count = len(self.file_axes.split()[0])
        return self.shape(config)[:count], self.shape(config)[count:]

    def join(self, shards: Sequence[np.ndarray]) -> np.ndarray:
        """Puts the tensor of a source together from its shard in each file."""
        if self.shard_axis is None or len(shards) == 1:
            return shards[0]
        return np.concatenate(shards, self.shard_axis)

    def from_file(self, tensor: np.ndarray, config: ModelConfig, official: bool) -> np.ndarray:
        """Turns the tensor of a file into ours: a view, unless rows change places."""
        array = tensor.reshape(self.shape(config))
        return to_halves(array) if official and self.pairs else array

    def to_file(self, array: np.ndarray, config: ModelConfig, official: bool) -> np.ndarray:
        """Turns one of our arrays into the tensor of a file: the inverse of `from_file`."""
        array = to_pairs(array) if official and self.pairs else array
        return array.reshape(self.file_shape(config))


def to_halves(array: np.ndarray) -> np.ndarray:
    """Orders the rows of each head, of [heads, head_dim, ...], from pairs to halves."""
    heads, head_dim, *rest = array.shape
    return array.reshape(heads, head_dim // 2, 2, *rest).swapaxes(1, 2).reshape(array.shape)


def to_pairs(array: np.ndarray) -> np.ndarray:
    """Orders the rows of each head, of [heads, head_dim, ...], from halves to pairs."""
    heads, head_dim, *rest = array.shape
    return array.reshape(heads, 2, head_dim // 2, *rest).swapaxes(1, 2).reshape(array.shape)


EMBED = Weight("embed/embedding", "tok_embeddings", "model.embed_tokens", "V D", "V D", 1)
HEAD = Weight("lm_head/kernel", "output", "lm_head", "V D", "V D", 0)
_NORM = Weight("final_norm/scale", "norm", "model.norm", "D", "D")
_LAYER = (
    Weight("attn_norm/scale", "attention_norm", "input_layernorm", "D", "D"),
    Weight(
        "attn/q_proj/kernel", "attention.wq", "self_attn.q_proj", "N H D", "NH D", 0, pairs=True
    ),
    Weight(
        "attn/k_proj/kernel", "attention.wk", "self_attn.k_proj", "K H D", "KH D", 0, pairs=True
    ),
    Weight("attn/v_proj/kernel", "attention.wv", "self_attn.v_proj", "K H D", "KH D", 0),
    Weight("attn/o_proj/kernel", "attention.wo", "self_attn.o_proj", "D N H", "D NH", 1),
    Weight("mlp_norm/scale", "ffn_norm", "post_attention_layernorm", "D", "D"),
    Weight("mlp/gate_proj/kernel", "feed_forward.w1", "mlp.gate_proj", "F D", "F D", 0),
    Weight("mlp/down_proj/kernel", "feed_forward.w2", "mlp.down_proj", "D F", "D F", 1),
    Weight("mlp/up_proj/kernel", "feed_forward.w3", "mlp.up_proj", "F D", "F D", 0),
)


def groups(config: ModelConfig) -> Iterator[list[Weight]]:
    """Yields the weights of a model in the order of its forward pass, a layer at a time."""
    yield [EMBED]
    for i in range(config.num_layers):
        yield [
            weight._replace(
                path=f"layers_{i}/{weight.path}",
                official=f"layers.{i}.{weight.official}",
                hf=f"model.layers.{i}.{weight.hf}",
            )
            for weight in _LAYER
        ]
    yield [_NORM] if config.tie_embeddings else [_NORM, HEAD]


def weights(config: ModelConfig) -> list[Weight]:
    """Returns all weights of a model."""
    return [weight for group in groups(config) for weight in group]


def _size(axis: str, config: ModelConfig) -> int:
    return math.prod(getattr(config, _FIELDS[letter]) for letter in axis)


_FIELDS = {
    "V": "vocab_size",
    "D": "embed_dim",
    "F": "mlp_dim",
    "N": "num_heads",
    "K": "num_kv_heads",
    "H": "head_dim",
}
