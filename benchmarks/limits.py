"""Measures the limits of this machine: bytes read a second, and matrix-product operations a second.

Each limit is the best of several implementations: PyTorch (if installed), XLA and NumPy.
"""

import importlib.util
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

_NUMBERS = 1 << 28  # of float32: 1 GiB, larger than any processor cache
_ROUNDS = 5
_SHAPES = ((512, 1024, 4096), (512, 4096, 1024), (2048, 2048, 2048))  # rows, inputs, outputs
_XLA = {
    "float32": (jnp.float32, jnp.float32),
    "bfloat16": (jnp.bfloat16, jnp.float32),
    "int8": (jnp.int8, jnp.int32),
}


def measure() -> dict[str, dict[str, float]]:
    """Returns the rate of each implementation: bytes a second, and operations in each precision."""
    return {
        kind: {way: count / _best(run) for way, count, run in _ways(kind)}
        for kind in ("bytes", *_XLA)
    }


def probe(kind: str, known: dict[str, dict[str, float]]) -> Callable[[], float]:
    """Returns a function that measures a limit again, by the implementation that was the best.

    A shared machine's limits change with its load.

    Args:
      kind: "bytes", or a precision.
      known: the result of `measure`.
    """
    _, count, run = max(_ways(kind), key=lambda way: known[kind].get(way[0], 0))
    return lambda: count / _best(run)


def _best(run: Callable[[], object]) -> float:
    """Returns the seconds of the fastest of several runs; the first is not counted."""
    times = [time.perf_counter()]
    for _ in range(1 + _ROUNDS):
        run()
        times.append(time.perf_counter())
    return min(end - begin for begin, end in itertools.pairwise(times[1:]))


def _ways(kind: str) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """Yields implementations: a name, the bytes or operations of a run, and the run itself."""
    if kind == "bytes":
        for way, run in _readings():
            yield way, 4 * _NUMBERS, run
        return
    for shape in _SHAPES:
        for way, run in _products(kind, *shape):
            yield f"{way}, {' x '.join(map(str, shape))}", 2 * math.prod(shape), run


def _readings() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yields implementations that read 1 GiB once."""
    cores = len(os.sched_getaffinity(0))
    numbers = np.ones(_NUMBERS, np.float32)
    vector = np.ones(1 << 13, np.float32)
    parts, pool = np.array_split(numbers, cores), ThreadPoolExecutor(cores)
    yield "sums by NumPy in threads", lambda: list(pool.map(np.sum, parts))
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(cores)
        flat = torch.from_numpy(numbers)
        halves = flat.view(2, -1)
        yield "sum by PyTorch", flat.sum
        yield "scalar product by PyTorch", lambda: halves[0] @ halves[1]
    matrix, column = jnp.asarray(numbers.reshape(-1, vector.size)), jnp.asarray(vector)
    total, multiply = jax.jit(jnp.sum), jax.jit(jnp.matmul)
    yield "sum by XLA", lambda: total(matrix).block_until_ready()
    yield "product by XLA", lambda: multiply(matrix, column).block_until_ready()


def _products(dtype, rows, inputs, outputs) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yields implementations that multiply a matrix by the transpose of another, as layers do."""
    kind, result = _XLA[dtype]
    left, right = jnp.ones((rows, inputs), kind), jnp.ones((outputs, inputs), kind)
    multiply = jax.jit(lambda x, y: jnp.einsum("RX,YX->RY", x, y, preferred_element_type=result))
    yield "XLA", lambda: multiply(left, right).block_until_ready()
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        kind = getattr(torch, dtype)
        x, y = torch.ones((rows, inputs), dtype=kind), torch.ones((outputs, inputs), dtype=kind)
        run = torch._int_mm if dtype == "int8" else torch.mm
        yield "PyTorch", lambda: run(x, y.T)
