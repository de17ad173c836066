"""The table of weights: the name and layout of each parameter in ours and in other formats.

Every format stores a matrix as (outputs, inputs). Ours has heads in an axis of their own, which
changes no bytes. The matrices of experts are weights of their own in other formats, and entries of
one parameter in ours. Official files rotate the pairs (2i, 2i + 1) of a head; Hugging Face and we
rotate (i, i + H / 2). So between official files and ours the rows of wq and wk are permuted.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mistral_jax.config import ModelConfig
from mistral_jax.model.layers import MATRICES, Axes


class Weight(NamedTuple):
    """One weight of the model.

    Attributes:
      path: its path in our tree of parameters.
      official: name of its module in `consolidated.*`.
      hf: name of its module in a Hugging Face folder.
      shard_axis: axis along which several `consolidated.NN.pth` partition it; None = each file has
        the whole weight.
      pairs: whether official files interleave the rotary pairs of its rows.
      expert: index of the weight in the parameter at `path`, which holds one for each expert; None
        = it is the whole parameter.
    """

    path: str
    official: str
    hf: str
    shard_axis: int | None = None
    pairs: bool = False
    expert: int | None = None

    @property
    def axes(self) -> Axes:
        """The logical axes of the weight. A norm's scale is in no table, and has no inputs."""
        return MATRICES.get(self.path.split("/")[-2], Axes(("embed",), ()))

    def module(self, official: bool) -> str:
        """Returns the name of its module in the model that a file is for."""
        return self.official if official else self.hf

    def name(self, official: bool) -> str:
        """Returns its name in a file."""
        return f"{self.module(official)}.weight"

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Returns its shape in our tree."""
        return self.axes.shape(config)

    def parameter_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Returns the shape of the parameter that it is, or is an entry of."""
        return (*(() if self.expert is None else (config.num_experts,)), *self.shape(config))

    def file_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Returns its shape in a file of either format."""
        return tuple(math.prod(sizes) for sizes in self.divided(config) if sizes)

    def divided(self, config: ModelConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the sizes of its output axes and of its input axes; a file flattens each."""
        return self.axes.divide(self.shape(config))

    def join(self, shards: Sequence[np.ndarray]) -> np.ndarray:
        """Joins the shards of a tensor, one from each file of a source."""
        if self.shard_axis is None or len(shards) == 1:
            return shards[0]
        return np.concatenate(shards, self.shard_axis)

    def from_file(self, tensor: np.ndarray, config: ModelConfig, official: bool) -> np.ndarray:
        """Converts the tensor of a file to ours: a view of it, unless rows are permuted."""
        array = tensor.reshape(self.shape(config))
        return to_halves(array) if official and self.pairs else array

    def to_file(self, array: np.ndarray, config: ModelConfig, official: bool) -> np.ndarray:
        """Converts one of our arrays to the tensor of a file: the inverse of `from_file`."""
        array = to_pairs(array) if official and self.pairs else array
        return array.reshape(self.file_shape(config))


def to_halves(array: np.ndarray) -> np.ndarray:
    """Permutes the rows of each head of [heads, head_dim, ...] from rotary pairs to halves."""
    heads, head_dim, *rest = array.shape
    return array.reshape(heads, head_dim // 2, 2, *rest).swapaxes(1, 2).reshape(array.shape)


def to_pairs(array: np.ndarray) -> np.ndarray:
    """Permutes the rows of each head of [heads, head_dim, ...] from halves to rotary pairs."""
    heads, head_dim, *rest = array.shape
    return array.reshape(heads, 2, head_dim // 2, *rest).swapaxes(1, 2).reshape(array.shape)


EMBED = Weight("embed/embedding", "tok_embeddings", "model.embed_tokens", 1)
HEAD = Weight("lm_head/kernel", "output", "lm_head", 0)
_NORM = Weight("final_norm/scale", "norm", "model.norm")
_ATTENTION = (
    Weight("attn_norm/scale", "attention_norm", "input_layernorm"),
    Weight("attn/q_proj/kernel", "attention.wq", "self_attn.q_proj", 0, pairs=True),
    Weight("attn/k_proj/kernel", "attention.wk", "self_attn.k_proj", 0, pairs=True),
    Weight("attn/v_proj/kernel", "attention.wv", "self_attn.v_proj", 0),
    Weight("attn/o_proj/kernel", "attention.wo", "self_attn.o_proj", 1),
    Weight("mlp_norm/scale", "ffn_norm", "post_attention_layernorm"),
)
_MLP = (
    Weight("mlp/gate_proj/kernel", "feed_forward.w1", "mlp.gate_proj", 0),
    Weight("mlp/down_proj/kernel", "feed_forward.w2", "mlp.down_proj", 1),
    Weight("mlp/up_proj/kernel", "feed_forward.w3", "mlp.up_proj", 0),
)
_ROUTER = Weight("moe/router/kernel", "feed_forward.gate", "block_sparse_moe.gate")


def _layer(config: ModelConfig) -> tuple[Weight, ...]:
    """Returns the weights of a layer, with names inside it."""
    if not config.num_experts:
        return (*_ATTENTION, *_MLP)

    def of_expert(weight, number):
        module = f"experts.{number}.{weight.official.rpartition('.')[2]}"
        return weight._replace(
            path=weight.path.replace("mlp/", "moe/"),
            official=f"feed_forward.{module}",
            hf=f"block_sparse_moe.{module}",
            expert=number,
        )

    experts = (of_expert(weight, e) for e in range(config.num_experts) for weight in _MLP)
    return (*_ATTENTION, _ROUTER, *experts)


def groups(config: ModelConfig) -> Iterator[list[Weight]]:
    """Yields the weights of a model in the order of its forward pass, one layer at a time."""
    yield [EMBED]
    for i in range(config.num_layers):
        yield [
            weight._replace(
                path=f"layers_{i}/{weight.path}",
                official=f"layers.{i}.{weight.official}",
                hf=f"model.layers.{i}.{weight.hf}",
            )
            for weight in _layer(config)
        ]
    yield [_NORM] if config.tie_embeddings else [_NORM, HEAD]


def weights(config: ModelConfig) -> list[Weight]:
    """Returns all weights of a model."""
    return [weight for group in groups(config) for weight in group]


def count_parameters(config: ModelConfig, active: bool = False) -> int:
    """Counts the parameters of a model, or only those that compute one token.

    Args:
      config: the model.
      active: whether to count only as many experts of a layer as compute a token.
    """
    return sum(
        math.prod(weight.shape(config))
        for weight in weights(config)
        if not active or (weight.expert or 0) < max(1, config.experts_per_token)
    )
