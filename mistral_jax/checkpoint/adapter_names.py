"""`Slot`: what an adapter is called, and how it lies, in each kind of file. It opens none.

Files hold two matrices, A (R, in) and B (out, R); we unfold the heads of both. As in whole models,
official files rotate the pairs (2i, 2i + 1) of a head, and PEFT's and we the halves (i, i + H / 2):
between the two, the rows of B of wq and wk change places.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from mistral_jax.checkpoint.lora import HEAD
from mistral_jax.config import ModelConfig
from mistral_jax.model.layers import MATRICES
from mistral_jax.model.transformer import Transformer
from mistral_jax.ops.backend import PLAIN
from mistral_jax.parallel.sharding import abstract_params

PREFIX = "base_model.model."  # Of all tensors in PEFT's files.

_OFFICIAL = {
    "q_proj": "attention.wq",
    "k_proj": "attention.wk",
    "v_proj": "attention.wv",
    "o_proj": "attention.wo",
    "gate_proj": "feed_forward.w1",
    "down_proj": "feed_forward.w2",
    "up_proj": "feed_forward.w3",
    HEAD: "output",
}
_DTYPES = ("float32", "bfloat16", "float16", "float64")
MOST_RANK = 1 << 16
_PAIRED = ("q_proj", "k_proj")

Pair = tuple[np.ndarray, np.ndarray]


class Slot(NamedTuple):
    """The place of an adapter: a projection of the model.

    Attributes:
      path: of the projection, in the tree of parameters.
      outputs: sizes of those axes of its kernel that are its results.
      inputs: sizes of the others.
    """

    path: tuple[str, ...]
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]

    @property
    def projection(self) -> str:
        """Which of a layer's projections it is, or "lm_head"."""
        return self.path[-1]

    def module(self, official: bool) -> str:
        """Returns the name of the projection in the model that a file is for."""
        if self.projection == HEAD:
            return _OFFICIAL[HEAD] if official else HEAD
        layer, block, projection = self.path
        number = layer.removeprefix("layers_")
        if official:
            return f"layers.{number}.{_OFFICIAL[projection]}"
        return f"model.layers.{number}.{block.replace('attn', 'self_attn')}.{projection}"

    def names(self, official: bool) -> tuple[str, str]:
        """Returns the names of both matrices in a file."""
        module = self.module(official) if official else PREFIX + self.module(official)
        return f"{module}.lora_A.weight", f"{module}.lora_B.weight"

    def checked(self, pair: Sequence[np.ndarray], official: bool, where: Any) -> Pair:
        """Returns the matrices of a file in float32.

        Raises:
          ValueError: they do not fit, or are not finite.
        """
        rank = len(pair[0]) if pair[0].ndim else 0
        shapes = (rank, math.prod(self.inputs)), (math.prod(self.outputs), rank)
        for name, array, shape in zip(self.names(official), pair, shapes, strict=True):
            if array.shape != shape:
                raise ValueError(
                    f"{where} has {array.shape} as {name}; expected {shape}: it is of another model"
                )
            if not 1 <= rank <= MOST_RANK:
                raise ValueError(f"{where} has rank {rank} for {name}; expected 1 to {MOST_RANK}")
            if array.dtype.name not in _DTYPES:
                raise ValueError(
                    f"{where} has {array.dtype} as {name}; expected {' or '.join(_DTYPES)}"
                )
        with np.errstate(over="ignore", invalid="ignore"):
            a, b = (array.astype(np.float32) for array in pair)
        for name, array in zip(self.names(official), (a, b), strict=True):
            if not np.isfinite(array).all():
                raise ValueError(f"{where} has values in {name} that are not finite")
        return a, b

    def zeros(self, rank: int) -> Pair:
        """Returns matrices of a file that change nothing."""
        rows, columns = math.prod(self.outputs), math.prod(self.inputs)
        return np.zeros((rank, columns), np.float32), np.zeros((rows, rank), np.float32)

    def from_file(self, pair: Pair, official: bool) -> dict[str, np.ndarray]:
        """Turns the matrices of a file into ours."""
        a, b = pair
        if official and self.projection in _PAIRED:
            heads, head_dim = self.outputs
            b = b.reshape(heads, head_dim // 2, 2, -1).swapaxes(1, 2)
        return {"lora_a": a.reshape(-1, *self.inputs), "lora_b": b.reshape(*self.outputs, -1)}

    def to_file(self, own: dict[str, np.ndarray], official: bool) -> Pair:
        """Turns our matrices into those of a file: the inverse of `from_file`."""
        a, b = own["lora_a"], own["lora_b"]
        if official and self.projection in _PAIRED:
            heads, head_dim = self.outputs
            b = b.reshape(heads, 2, head_dim // 2, -1).swapaxes(1, 2)
        return a.reshape(a.shape[0], -1), b.reshape(-1, own["lora_b"].shape[-1])


def slots(config: ModelConfig) -> list[Slot]:
    """Returns the places that adapters can have in a model."""
    params = flatten_dict(abstract_params(Transformer(config, backend=PLAIN)))
    return [
        Slot(path[:-1], *MATRICES[path[-2]].divide(kernel.shape))
        for path, kernel in params.items()
        if path[-1] == "kernel"
    ]
