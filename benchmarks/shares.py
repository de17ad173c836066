"""Computes the least that a workload requires of a machine: bytes to read, or operations.

Each decode step reads every weight except the embedding once; keys and values do not count. A
prompt takes all matrix products, including those of attention within the window.
"""

import math

import engines

from mistral_jax.checkpoint import names
from mistral_jax.config import ModelConfig

# llama.cpp's q8_0 has a scale of two bytes for every 32 numbers.
_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
_Q8_0 = 34 / 32


def limit_of(work: str, dtype: str) -> str | None:
    """Returns the limit that bounds a workload, as a key of `limits.measure`."""
    return {"decode": "bytes", "prefill": dtype}.get(work)


def cost(work: str, engine: str, dtype: str, config: ModelConfig, batch: int, length: int) -> float:
    """Returns the bytes or operations that one token of an answer or of a prompt takes."""
    if work == "prefill":
        return operations(config, length) / length
    size = _Q8_0 if engine == engines.LLAMA and dtype == "int8" else _BYTES[dtype]
    return matrices(config) * size / batch


def matrices(config: ModelConfig, head: bool = True) -> int:
    """Returns the number of weights that multiply a token, with or without the output matrix."""
    left_out = (names.EMBED,) if head else (names.EMBED, names.HEAD)
    shapes = [row.shape(config) for row in names.weights(config) if row not in left_out]
    return sum(math.prod(shape) for shape in shapes if len(shape) > 1)


def operations(config: ModelConfig, length: int) -> int:
    """Returns the additions and multiplications to read a prompt, up to its last logits."""
    window = min(length, config.sliding_window or length)
    pairs = window * (window + 1) // 2 + (length - window) * window
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * pairs
    products = 2 * (matrices(config, head=False) * length + config.vocab_size * config.embed_dim)
    return products + attention
