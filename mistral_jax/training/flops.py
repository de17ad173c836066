"""FLOPs: what a model's own arithmetic needs, and what the devices could do. It times no step.

Two a weight and token, and 4 N H a pair of query and key that sees it. Masked scores, filling,
lookups, and what is computed twice are not the model's. The share of the devices' peak that this
uses is the model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B).
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from mistral_jax.config import ModelConfig
from mistral_jax.parallel import hardware


def of_weights(config: ModelConfig, count: float, scored: float) -> float:
    """Counts those of the matrices' products, forward.

    Args:
      config: the model.
      count: tokens.
      scored: those of them whose logits are wanted.
    """
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layer = config.embed_dim * (heads + 3 * config.mlp_dim)
    return 2 * (count * config.num_layers * layer + scored * config.vocab_size * config.embed_dim)


def of_attention(config: ModelConfig, count: float, seen: float) -> float:
    """Counts those of scores and of weighted sums, forward.

    Args:
      config: the model.
      count: tokens.
      seen: keys that each sees, in all layers together.
    """
    return 4 * count * seen * config.num_heads * config.head_dim


def keys_seen(config: ModelConfig, position: np.ndarray | int) -> np.ndarray | int:
    """Counts the keys that the token at a position sees, in all layers together."""
    layers = zip(config.windows, config.dilations, strict=True)
    reached = ((position // dilation + 1, window) for window, dilation in layers)
    return sum(np.minimum(keys, window or np.inf) for keys, window in reached)


def mean_seen(config: ModelConfig, length: int) -> float:
    """Returns the keys that a token of a text sees on average, in all layers together."""
    return np.mean(keys_seen(config, np.arange(length)))


def per_token(
    config: ModelConfig, context: int, *, adapters: bool = False, reference: bool = False
) -> float:
    """Counts the model's floating-point operations for a token that is trained on.

    The way back takes twice as many as the way forward: by the activations and by the weights.
    Frozen weights need only the former. The adapters' own are left out: about a hundredth.

    Args:
      config: the model.
      context: tokens a row; a token counts as their average, of one text that fills the row.
      adapters: whether adapters are trained beside frozen weights, instead of all weights.
      reference: whether another model, or this one as it was, reads every token too (DPO).
    """
    weights = of_weights(config, 1, 1)
    attention = of_attention(config, 1, mean_seen(config, context))
    return weights * (2 + (not adapters) + reference) + attention * (3 + reference)


def peak() -> float | None:
    """Returns the FLOP/s that all devices of a run could do; None = nobody has told.

    Accelerators: in bfloat16, as `configs/hardware.toml` has them. A CPU is measured, in float32:
    as many times as there are processes, of which each counts as a machine.
    """
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return _measured_flops() * jax.process_count()
    peaks = {kind: chip.flops for chip in hardware.known().values() for kind in chip.kinds}
    kinds = [device.device_kind for device in devices]
    return sum(peaks[kind] for kind in kinds) if peaks.keys() >= set(kinds) else None


@functools.cache
def _measured_flops() -> float:
    """Measures the FLOP/s of a CPU by products of matrices, the best of some, within a second.

    CPU devices are made of the same cores, and one product takes them all. Which size is the
    fastest depends on how many those are.
    """
    return max(map(_product_flops, (512, 1024, 2048)))


def _product_flops(size: int) -> float:
    matrix = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(jnp.dot)

    def seconds():
        began = time.perf_counter()
        multiply(matrix, matrix).block_until_ready()
        return time.perf_counter() - began

    seconds()  # compiles
    times = []
    while sum(times) < 0.1:
        times.append(seconds())
    return 2 * size**3 / min(times)
