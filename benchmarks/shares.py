"""What a workload asks of a machine at least: bytes to read, or operations to do.

Decoding reads every matrix but the embedding once a step; keys and values are not counted. A prompt
takes all products, those of attention within the window.
"""

import math

import engines

from mistral_jax.checkpoint import names
from mistral_jax.config import ModelConfig

# llama.cpp's q8_0 has a scale of two bytes for 32 numbers.
_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
_Q8_0 = 34 / 32


def limit_of(work: str, dtype: str) -> str | None:
    """Returns which limit a workload meets, as `limits.measure` calls it."""
    return {"decode": "bytes", "prefill": dtype}.get(work)


def cost(work: str, engine: str, dtype: str, config: ModelConfig, batch: int, length: int) -> float:
    """Returns how much of its limit a token takes, of an answer or of a prompt."""
    if work == "prefill":
        return operations(config, length) / length
    size = _Q8_0 if engine == engines.LLAMA and dtype == "int8" else _BYTES[dtype]
    return matrices(config) * size / batch


def matrices(config: ModelConfig, head: bool = True) -> int:
    """Returns how many weights a token is multiplied by, in the output's matrix too or not."""
    left_out = (names.EMBED,) if head else (names.EMBED, names.HEAD)
    shapes = [row.shape(config) for row in names.weights(config) if row not in left_out]
    return sum(math.prod(shape) for shape in shapes if len(shape) > 1)


def operations(config: ModelConfig, length: int) -> int:
    """Returns the additions and multiplications that one prompt takes, to the logits of its end."""
    window = min(length, config.sliding_window or length)
    pairs = window * (window + 1) // 2 + (length - window) * window
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * pairs
    products = 2 * (matrices(config, head=False) * length + config.vocab_size * config.embed_dim)
    return products + attention
