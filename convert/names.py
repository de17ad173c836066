"""The table of tensors: what each is called, and how it lies, in each format. It reads no files.

Sources store a matrix as (out, in), and so do we, with the heads unfolded: the bytes are the same.
But official files rotate the pairs (2i, 2i + 1) of a head, and Hugging Face and we the halves
(i, i + H / 2): between the two, the rows of wq and wk change places.
"""

import math
import re
from collections.abc import Iterator, Sequence
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
      file_axes: the same in a file, where two letters in one word are one axis.
      split: axis that several `consolidated.NN.pth` divide among them; None = each has all.
      pairs: whether official files interleave the rotary pairs.
    """

    path: str
    official: str
    hf: str
    axes: str
    file_axes: str
    split: int | None = None
    pairs: bool = False

    def name(self, official: bool) -> str:
        """Returns the name of the tensor in a source."""
        return f"{self.official if official else self.hf}.weight"

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Returns the shape in our tree."""
        return tuple(_size(axis, config) for axis in self.axes.split())

    def file_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Returns the shape in a source, of either format."""
        return tuple(_size(axis, config) for axis in self.file_axes.split())

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Puts the tensor of a source together from its part in each file."""
        return (
            parts[0] if self.split is None or len(parts) == 1 else np.concatenate(parts, self.split)
        )

    def from_file(self, tensor: np.ndarray, config: ModelConfig, official: bool) -> np.ndarray:
        """Turns the tensor of a source into ours: a view, unless rows change places."""
        if official and self.pairs:
            heads, head_dim, width = self.shape(config)
            tensor = tensor.reshape(heads, head_dim // 2, 2, width).swapaxes(1, 2)
        return tensor.reshape(self.shape(config))

    def to_file(self, array: np.ndarray, config: ModelConfig, official: bool) -> np.ndarray:
        """Turns one of our arrays into the tensor of a source: the inverse of `from_file`."""
        if official and self.pairs:
            heads, head_dim, width = self.shape(config)
            array = array.reshape(heads, 2, head_dim // 2, width).swapaxes(1, 2)
        return array.reshape(self.file_shape(config))


EMBED = Row("embed/embedding", "tok_embeddings", "model.embed_tokens", "V D", "V D", 1)
HEAD = Row("lm_head/kernel", "output", "lm_head", "V D", "V D", 0)
_NORM = Row("final_norm/scale", "norm", "model.norm", "D", "D")
_LAYER = (
    Row("attn_norm/scale", "attention_norm", "input_layernorm", "D", "D"),
    Row("attn/q_proj/kernel", "attention.wq", "self_attn.q_proj", "N H D", "NH D", 0, pairs=True),
    Row("attn/k_proj/kernel", "attention.wk", "self_attn.k_proj", "K H D", "KH D", 0, pairs=True),
    Row("attn/v_proj/kernel", "attention.wv", "self_attn.v_proj", "K H D", "KH D", 0),
    Row("attn/o_proj/kernel", "attention.wo", "self_attn.o_proj", "D N H", "D NH", 1),
    Row("mlp_norm/scale", "ffn_norm", "post_attention_layernorm", "D", "D"),
    Row("mlp/gate_proj/kernel", "feed_forward.w1", "mlp.gate_proj", "F D", "F D", 0),
    Row("mlp/down_proj/kernel", "feed_forward.w2", "mlp.down_proj", "D F", "D F", 1),
    Row("mlp/up_proj/kernel", "feed_forward.w3", "mlp.up_proj", "F D", "F D", 0),
)

# Tables of rotary angles, which a model computes: each layer's or, in newer files, the model's.
IGNORABLE = re.compile(
    r"rope\.freqs|(.*\.)?rotary_emb\.((original_)?inv_freq|cos_cached|sin_cached)", re.DOTALL
)
# Matrices of LoRA, in files of either format.
ADAPTER = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.|$)")


def groups(config: ModelConfig) -> Iterator[list[Row]]:
    """Yields the rows of a model in the order of its forward pass, a layer at a time."""
    yield [EMBED]
    for i in range(config.num_layers):
        yield [
            row._replace(
                path=f"layers_{i}/{row.path}",
                official=f"layers.{i}.{row.official}",
                hf=f"model.layers.{i}.{row.hf}",
            )
            for row in _LAYER
        ]
    yield [_NORM] if config.tie_embeddings else [_NORM, HEAD]


def rows(config: ModelConfig) -> list[Row]:
    """Returns all rows of a model."""
    return [row for group in groups(config) for row in group]


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
