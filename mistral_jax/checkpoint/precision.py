"""The dtype to load a model in: the caller's choice, or the best one that fits in memory."""

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
    """Returns the name of a dtype, or None for None.

    Raises:
      ValueError: no model is loaded in this dtype.
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
      kept: the shapes and shardings of the parameters in memory, where quantised matrices have
        their own dtypes.
      stored: the shapes and dtypes on disk.
      dtype: the caller's choice; None = on a CPU float32 if it fits, else the dtype on disk.
      tell: called with a message if there is too little memory for the first choice.

    Raises:
      ValueError: there is too little memory.
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
        # All processes must choose the same dtype.
        if not distributed.any_of(bool(short)):
            if lacked:
                tell(
                    f"{path} is loaded in {jnp.dtype(choice)}, as it is stored: {lacked}, and "
                    "only float32 is exact on a CPU; name a dtype to have the same everywhere"
                )
            return jnp.dtype(choice)
        lacked = "another process has too little memory for float32"
        if short:
            place, needed, free = short[0]
            lacked = f"{place} has {decimal(free)} free, float32 needs {decimal(needed)}"
    if not short:
        raise ValueError(f"{path} needs more memory than another process has free")
    raise ValueError(
        f"{path} needs {decimal(needed)} of memory on {place}, which has {decimal(free)} free: "
        "load it in a smaller dtype, or spread it over more devices"
    )


def typed(abstract: Params, dtype: jnp.dtype | str) -> Params:
    """Sets the dtype of described arrays; quantised matrices keep their own."""

    def change(leaf):
        return leaf if isinstance(leaf, QuantizedMatrix) else leaf.update(dtype=jnp.dtype(dtype))

    return jax.tree.map(change, abstract, is_leaf=lambda x: isinstance(x, QuantizedMatrix))
