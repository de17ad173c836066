"""FLOPs: how many a model's arithmetic needs, and how many the devices can do per second.

A matrix product costs 2 FLOPs per weight and token; attention costs 4 N H per pair of a query and
a key that it sees. Masked scores, padding, lookups and recomputation are not counted. The share of
the devices' peak is the model FLOPs utilisation, MFU (PaLM, arXiv 2204.02311, appendix B).
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from mistral_jax.config import ModelConfig
from mistral_jax.parallel import hardware


def of_weights(config: ModelConfig, count: float, scored: float) -> float:
    """Counts the FLOPs of the matrix products in a forward pass.

    Args:
      config: the model.
      count: number of tokens.
      scored: number of tokens whose logits are computed.
    """
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    width = 3 * config.mlp_dim
    if config.num_experts:  # The experts that compute a token, and the router.
        width = config.experts_per_token * width + config.num_experts
    layer = config.embed_dim * (heads + width)
    return 2 * (count * config.num_layers * layer + scored * config.vocab_size * config.embed_dim)


def of_attention(config: ModelConfig, count: float, seen: float) -> float:
    """Counts the FLOPs of the attention scores and weighted sums in a forward pass.

    Args:
      config: the model.
      count: number of tokens.
      seen: keys that each token sees, summed over all layers.
    """
    return 4 * count * seen * config.num_heads * config.head_dim


def keys_seen(config: ModelConfig, position: np.ndarray | int) -> np.ndarray | int:
    """Counts the keys that the token at a position sees, summed over all layers."""
    layers = zip(config.windows, config.dilations, strict=True)
    reached = ((position // dilation + 1, window) for window, dilation in layers)
    return sum(np.minimum(keys, window or np.inf) for keys, window in reached)


def mean_seen(config: ModelConfig, length: int) -> float:
    """Returns the mean number of keys that a token of a text sees, summed over all layers."""
    return np.mean(keys_seen(config, np.arange(length)))


def per_token(
    config: ModelConfig, context: int, *, adapters: bool = False, reference: bool = False
) -> float:
    """Counts the FLOPs of training per token.

    The backward pass computes gradients of activations and of weights, each as costly as the
    forward pass; frozen weights need only the former. The FLOPs of the adapters themselves, about
    a hundredth, are not counted.

    Args:
      config: the model.
      context: tokens per row (T); attention is averaged over the positions of a text of T tokens.
      adapters: whether adapters are trained beside frozen weights, instead of all weights.
      reference: whether a reference model reads every token too (DPO).
    """
    weights = of_weights(config, 1, 1)
    attention = of_attention(config, 1, mean_seen(config, context))
    return weights * (2 + (not adapters) + reference) + attention * (3 + reference)


def peak() -> float | None:
    """Returns the FLOP/s that all devices of a run can do together; None = unknown.

    Accelerators have the bfloat16 figures of `configs/hardware.toml`. A CPU is measured in
    float32; each process counts as a machine of its own.
    """
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return _measured_flops() * jax.process_count()
    peaks = {kind: chip.flops for chip in hardware.known().values() for kind in chip.kinds}
    kinds = [device.device_kind for device in devices]
    return sum(peaks[kind] for kind in kinds) if peaks.keys() >= set(kinds) else None


@functools.cache
def _measured_flops() -> float:
    """Measures the FLOP/s of the CPU in less than a second: the best of three matrix products.

    All CPU devices share the same cores, and one product uses all of them. Which size is the
    fastest depends on the number of cores.
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
