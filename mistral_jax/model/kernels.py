"""What is C++ on a CPU: products of few rows, wide matrices, a token's attention, rows of a table.

The sources, in `native`, are compiled at the first call. Where there is no compiler, `available`
says so, and XLA's own operations do.
"""

import ctypes
import functools
import hashlib
import logging
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from mistral_jax import machine
from mistral_jax.model.einsum import einsum

_SOURCES = sorted((Path(__file__).parent / "native").iterdir())
# Of matrices, keys and values.
DTYPES = ("float32", "bfloat16", "int8")
# Rows up to which products are faster here than XLA's; of int8, where the processor multiplies
# bytes, any number.
MOST_ROWS = 8
# Rows from which on it pays to write a matrix of bfloat16 out in float32.
_MANY = 64
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w"),
    f"-DMOST_ROWS={MOST_ROWS}",
)
_SECONDS = 60


def suit(rows: jax.Array, matrices: Sequence[jax.Array]) -> bool:
    """Whether `products` of these is there, and faster than XLA's."""
    count, kinds = math.prod(rows.shape[:-1]), {matrix.dtype.name for matrix in matrices}
    if len(kinds) > 1 or not kinds.issubset(DTYPES) or not here():
        return False
    if count <= MOST_ROWS:
        return True
    # Many rows of 16 bits XLA multiplies faster than three parts of 8 bits are.
    return kinds == {"int8"} and rows.dtype == jnp.float32 and count <= _constant("most_rows_int8")


def should_widen(rows: jax.Array, matrix: jax.Array) -> bool:
    """Whether XLA multiplies `rows` faster in float32, by what `widen` makes of `matrix`.

    So it is with many rows of bfloat16, where the processor does not multiply that.
    """
    many = math.prod(rows.shape[:-1]) >= _MANY and rows.dtype == jnp.bfloat16
    narrow = matrix.dtype.name in ("bfloat16", "int8")
    return many and narrow and here() and not _constant("multiplies_bfloat16")


def here() -> bool:
    """Whether these may be called: what is traced now is for one CPU, and they are compiled."""
    return machine.is_one_cpu() and available()


@jax.custom_jvp
def products(rows: jax.Array, matrices: Sequence[jax.Array]) -> list[jax.Array]:
    """Multiplies `rows` [..., X] by each of `matrices` [Y, X], in one call.

    Args:
      rows: float32, or what else widens to it; with bfloat16 matrices, bfloat16.
      matrices: all float32, all bfloat16, or all int8, whose values are used as they are.

    Returns:
      [..., Y] float32 for each: sums in float32 of exact products.
    """
    flat = rows.astype(jnp.float32).reshape(-1, rows.shape[-1])
    results = [jax.ShapeDtypeStruct((len(flat), len(matrix)), jnp.float32) for matrix in matrices]
    call = jax.ffi.ffi_call(
        f"mistral_jax_product_{matrices[0].dtype.name}", results, vmap_method="sequential"
    )
    return [sums.reshape(*rows.shape[:-1], -1) for sums in call(flat, *matrices)]


@products.defjvp
def _differentiate(primals, tangents):
    """Differentiates what XLA knows to be the same."""
    return products(*primals), jax.jvp(_plain, primals, tangents)[1]


def _plain(rows, matrices):
    wide = rows.astype(jnp.float32)
    return [einsum("...X,YX->...Y", wide, matrix.astype(jnp.float32)) for matrix in matrices]


def widen(matrix: jax.Array, after: jax.Array) -> jax.Array:
    """Returns `matrix` [Y, X], bfloat16 or int8, in float32, computed not before `after`.

    XLA would else widen all matrices first, and hold them. It is not differentiated.
    """
    result = jax.ShapeDtypeStruct(matrix.shape, jnp.float32)
    name = f"mistral_jax_widen_{matrix.dtype.name}"
    return jax.ffi.ffi_call(name, result, vmap_method="sequential")(matrix, after)


@jax.custom_jvp
def take(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Takes rows of `table` [V, D]; out of range, the first or the last.

    Args:
      table: of any dtype.
      tokens: numbers of rows, [B, T] integers.

    Returns:
      [B, T, D].
    """
    result = jax.ShapeDtypeStruct((tokens.size, table.shape[1]), table.dtype)
    call = jax.ffi.ffi_call("mistral_jax_take", result, vmap_method="sequential")
    return call(table, tokens.reshape(-1).astype(jnp.int32)).reshape(*tokens.shape, -1)


@take.defjvp
def _differentiate_take(primals, tangents):
    """Differentiates what XLA knows to be the same."""
    return take(*primals), jnp.take(tangents[0], primals[1], axis=0, mode="clip")


def once(x: jax.Array) -> jax.Array:
    """Returns `x` [..., D], computed once, where XLA's CPU backend would compute it for each use.

    It drops optimization barriers before it fuses, but does not look into a call.
    """
    if not here():
        return x
    rows = x.reshape(-1, x.shape[-1])
    return take(rows, jnp.arange(len(rows), dtype=jnp.int32)[None]).reshape(x.shape)


@jax.custom_jvp
def put(table: jax.Array, rows: jax.Array, places: jax.Array) -> jax.Array:
    """Writes one row into each part of `table`, in place where nothing else needs the old one.

    Args:
      table: [B, S, ...], of any dtype.
      rows: [B, 1, ...] of the same.
      places: where in its part a row goes, [B, 1] integers; out of range, nowhere.

    Returns:
      The new table.
    """
    result = jax.ShapeDtypeStruct(table.shape, table.dtype)
    call = jax.ffi.ffi_call(
        "mistral_jax_put", result, vmap_method="sequential", input_output_aliases={0: 0}
    )
    return call(table, rows, places.reshape(-1).astype(jnp.int32))


@put.defjvp
def _differentiate_put(primals, tangents):
    """Differentiates what XLA knows to be the same."""

    def scatter(table, rows):
        return jax.vmap(lambda x, row, place: x.at[place].set(row, mode="drop"))(
            table, rows, primals[2]
        )

    return put(*primals), jax.jvp(scatter, primals[:2], tangents[:2])[1]


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *scales: jax.Array
) -> jax.Array:
    """Attends from one query of each row to its keys. It is not differentiated.

    Args:
      q: queries, [B, N, H].
      k: keys, [B, S, K, H], float32, bfloat16 or int8; each serves N / K query heads.
      v: values, likewise.
      mask: what each row sees, [B, S] bool.
      scales: of keys and of values, where these are int8: two of [B, S, K] float32.

    Returns:
      [B, N, H] float32; zeros for a row that sees nothing.
    """
    result = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    call = jax.ffi.ffi_call(f"mistral_jax_attend_{k.dtype.name}", result, vmap_method="sequential")
    return call(q.astype(jnp.float32), k, v, mask, *scales)


@functools.cache
def available() -> bool:
    """Compiles and registers the kernels, once; whether that worked."""
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logging.getLogger(__name__).debug("no kernels, XLA's operations instead: %s", error)
        return False
    typed = (f"{name}_{dtype}" for name in ("product", "attend") for dtype in DTYPES)
    for name in (*typed, "widen_bfloat16", "widen_int8", "take", "put"):
        handler = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(f"mistral_jax_{name}", handler, platform="cpu")
    return True


@functools.cache
def _constant(name: str) -> int:
    """Returns what is compiled for this processor under a name."""
    return ctypes.c_int.in_dll(ctypes.CDLL(str(_compiled())), name).value


def find_compiler() -> str | None:
    """Returns the path of the C++ compiler that CXX names, or of the system's; None without one."""
    return shutil.which(os.environ.get("CXX", "c++"))


def _compiled() -> Path:
    """Returns the library, which is kept among the user's caches."""
    if (compiler := find_compiler()) is None:
        raise FileNotFoundError("there is no C++ compiler")
    # What it depends on names it: another processor or JAX gets another.
    about = [path.read_bytes() for path in _SOURCES], _FLAGS, jax.__version__, machine.processor()
    name = hashlib.sha256(repr(about).encode()).hexdigest()[:16]
    path = machine.cache_folder("kernels") / f"{name}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as work:
            made = Path(work) / path.name
            sources = (str(path) for path in _SOURCES if path.suffix == ".cc")
            command = [compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", *sources]
            subprocess.run(
                [*command, "-o", str(made)], check=True, timeout=_SECONDS, capture_output=True
            )
            made.replace(path)  # Whole or not at all, whoever else compiles it now.
    return path
