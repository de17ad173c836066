"""The dtype that a model is loaded in: the one asked for, or the best that there is memory for.

It reads no arrays.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.filesize import decimal

from mistral_jax.base import DTYPES, memory
from mistral_jax.checkpoint import arrays
from mistral_jax.ops.quantized import QuantizedMatrix
from mistral_jax.parallel import distributed

Params = Mapping[str, Any]


def check(dtype: jnp.dtype | str | None) -> str | None:
    """Returns a dtype's name.

    Raises:
      ValueError: it is none that a model may have.
    """
    if dtype is None:
        return None
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; expected {' or '.join(DTYPES)}")
    return name


def choose(
    path: Path,
    kept: Params,
    stored: Params,
    dtype: str | None,
    tell: Callable[[str], None] = lambda line: None,
) -> jnp.dtype:
    """Chooses the dtype to load a model in.

    Args:
      path: the checkpoint, for messages.
      kept: the shapes and shardings of what stays in memory; quantised matrices have their dtypes.
      stored: the shapes and dtypes on disk.
      dtype: the one that is asked for; None = on a CPU float32 if it fits, else as stored.
      tell: is given a sentence where that is not the first choice, for want of memory.

    Raises:
      ValueError: there is no memory for it.
    """
    leaves = jax.tree.leaves(kept)
    on_cpu = next(iter(leaves[0].sharding.device_set)).platform == "cpu"
    floats = [x for x in jax.tree.leaves(stored) if jnp.issubdtype(x.dtype, jnp.floating)]
    largest = max(floats, key=lambda array: math.prod(array.shape))
    default = ["float32", largest.dtype] if on_cpu else [largest.dtype]
    staging, lacked = arrays.least_in_flight(kept), ""
    for choice in [dtype] if dtype is not None else default:
        short = [
            demand
            for demand in memory.demands(jax.tree.leaves(typed(kept, choice)), staging)
            if demand.free is not None and demand.needed > demand.free
        ]
        # Of several processes all must choose the same.
        if not distributed.any_of(bool(short)):
            if lacked:
                tell(
                    f"{path} is loaded in {jnp.dtype(choice)}, as it is stored: {lacked} for "
                    "float32, in which a CPU is exact; name a dtype to have the same everywhere"
                )
            return jnp.dtype(choice)
        lacked = "another process has no memory"
        if short:
            place, needed, free = short[0]
            lacked = f"{place} has {decimal(free)} free, of {decimal(needed)}"
    if not short:
        raise ValueError(f"{path} needs more memory than another process has free")
    raise ValueError(
        f"{path} needs {decimal(needed)} of memory on {place}, which has {decimal(free)} free: "
        "load it in a smaller dtype, or spread it over more devices"
    )


def typed(abstract: Params, dtype: jnp.dtype | str) -> Params:
    """Returns shapes in a dtype; quantised matrices keep theirs."""

    def change(leaf):
        return leaf if isinstance(leaf, QuantizedMatrix) else leaf.update(dtype=jnp.dtype(dtype))

    return jax.tree.map(change, abstract, is_leaf=lambda x: isinstance(x, QuantizedMatrix))
