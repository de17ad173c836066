"""Compares the C++ kernels for products of few rows with XLA's products, in weights a second.

The two take turns. Prints one JSON line for each dtype and number of rows. The matrices have the
shape of an MLP weight of the 229M model. As in decoding, together they are larger than a
processor's caches.

    python benchmarks/products.py [--dtype float32 bfloat16 int8] [--rows 1 2 4 8 16] [--rounds 5]
"""

import argparse
import dataclasses
import json
import math
import statistics
import time

import jax
import jax.numpy as jnp

from mistral_jax.base import memory
from mistral_jax.ops import backend, kernels
from mistral_jax.ops.products import multiply
from mistral_jax.ops.quantized import QuantizedMatrix, to_int8

SHAPE = (3584, 1024)
MATRICES = 24


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", nargs="+", choices=kernels.DTYPES, default=kernels.DTYPES)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    here = backend.default()
    if not here.has_native:
        raise SystemExit("the kernels are not here: they need a CPU and a C++ compiler")
    for dtype in arguments.dtype:
        matrices = memory.to_large_pages([matrix(dtype, seed) for seed in range(MATRICES)])
        for rows in arguments.rows:
            x = jax.random.normal(jax.random.key(0), (rows, 1, SHAPE[1]))
            plain = dataclasses.replace(here, kernels=())
            runs = {
                "kernels": program(matrices, dtype, x, here),
                "xla": program(matrices, dtype, x, plain),
            }
            rounds = [
                {name: rate(run) for name, run in runs.items()} for _ in range(1 + arguments.rounds)
            ]
            found = {name: [line[name] for line in rounds[1:]] for name in runs}
            ratios = [a / b for a, b in zip(found["kernels"], found["xla"], strict=True)]
            line = {"benchmark": "products", "dtype": dtype, "rows": rows}
            line |= {
                f"{name}_weights_per_second": float(f"{statistics.median(rates):.3g}")
                for name, rates in found.items()
            }
            print(json.dumps(line | {"ratio": round(statistics.median(ratios), 2)}), flush=True)


def matrix(dtype: str, seed: int):
    """Returns a random matrix in the form that the model stores."""
    wide = jax.random.normal(jax.random.key(seed), SHAPE)
    if dtype == "int8":
        return QuantizedMatrix(*to_int8(wide, 1, jnp))
    return wide.astype(dtype)


def program(matrices, dtype: str, x: jax.Array, of: backend.Backend):
    """Compiles products of the rows with each matrix; each product depends on the one before."""
    compute = "float32" if dtype == "int8" else dtype

    @jax.jit
    def run(matrices, x):
        for matrix in matrices:
            x = x + 1e-9 * jnp.sum(multiply(x, matrix, 1, jnp.dtype(compute), of))
        return x

    compiled = run.lower(matrices, x).compile()
    return lambda: compiled(matrices, x).block_until_ready()


def rate(run) -> float:
    """Returns the weights read per second in the fastest of three runs."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return MATRICES * math.prod(SHAPE) / min(times)


if __name__ == "__main__":
    main()
