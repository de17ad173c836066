"""How much of the machine training uses: FLOPs, and memory. It times no step.

Model FLOPs utilisation is what the model's own arithmetic needs, over what the devices could do
(PaLM, arXiv 2204.02311, appendix B): computing activations again does not raise it.
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp

from mistral_jax.config import ModelConfig
from mistral_jax.parallel import hardware
from mistral_jax.training import flops


def flops_per_token(
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
    weights = flops.of_weights(config, 1, 1)
    attention = flops.of_attention(config, 1, flops.mean_seen(config, context))
    return weights * (2 + (not adapters) + reference) + attention * (3 + reference)


def peak_flops() -> float | None:
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


def peak_memory() -> int | None:
    """Returns the most bytes in use so far, in the fullest memory here; None = nobody has told.

    Accelerators: of their own memory. CPU devices: of the machine's, by this process.
    """
    if jax.local_devices()[0].platform != "cpu":
        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        return max(
            (s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None
        )
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
