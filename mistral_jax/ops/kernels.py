"""C++ kernels used on a CPU, as functions of JAX arrays.

They multiply few rows by matrices, widen matrices to float32, attend from single tokens, and copy
rows of tables. `library` compiles them, and a `Backend` says whether programs may call them. Each
call is a JAX primitive that also has a plain form in XLA's operations. XLA compiles the plain form
for any other platform, and in exported programs, which run in processes without the library.
"""

import ctypes
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.extend
import jax.numpy as jnp
from jax.interpreters import batching, mlir

from mistral_jax.ops import library
from mistral_jax.ops.library import DTYPES, MOST_ROWS
from mistral_jax.ops.quantized import einsum

# With this many rows or more, it pays to write a bfloat16 matrix out in float32.
_MANY = 64


def suit(rows: jax.Array, matrices: Sequence[jax.Array]) -> bool:
    """Tells whether `products` takes these arrays and is faster than XLA.

    Args:
      rows: [..., X].
      matrices: each [Y, X].
    """
    count, kinds = math.prod(rows.shape[:-1]), {matrix.dtype.name for matrix in matrices}
    if len(kinds) > 1 or not kinds.issubset(DTYPES):
        return False
    if count <= MOST_ROWS:
        return True
    # With many rows in 16 bits, XLA is faster than this kernel, which multiplies three 8-bit parts
    # of each row.
    return kinds == {"int8"} and rows.dtype == jnp.float32 and count <= _constant("most_rows_int8")


def should_widen(rows: jax.Array, matrix: jax.Array) -> bool:
    """Tells whether XLA multiplies `rows` faster by `matrix` after `widen`.

    It does with many bfloat16 rows, on a processor without instructions that multiply bfloat16.
    """
    many = math.prod(rows.shape[:-1]) >= _MANY and rows.dtype == jnp.bfloat16
    narrow = matrix.dtype.name in ("bfloat16", "int8")
    return many and narrow and not _constant("multiplies_bfloat16")


@jax.custom_jvp
def products(rows: jax.Array, matrices: Sequence[jax.Array]) -> list[jax.Array]:
    """Multiplies `rows` [..., X] by each of `matrices` [Y, X], in one call.

    Args:
      rows: float32, or a dtype that widens to it; with bfloat16 matrices, bfloat16.
      matrices: all float32, all bfloat16, or all int8. int8 values are not scaled.

    Returns:
      [..., Y] float32 for each matrix: sums in float32 of exact products.
    """
    flat = rows.astype(jnp.float32).reshape(-1, rows.shape[-1])
    results = [jax.ShapeDtypeStruct((len(flat), len(matrix)), jnp.float32) for matrix in matrices]
    name = f"product_{matrices[0].dtype.name}"
    called = _call(name, _plain_products, results, flat, *matrices)
    return [sums.reshape(*rows.shape[:-1], -1) for sums in called]


@products.defjvp
def _differentiate(primals, tangents):
    """Differentiates the plain form, for the kernel has no gradient."""
    return products(*primals), jax.jvp(_plain, primals, tangents)[1]


def _plain(rows, matrices):
    wide = rows.astype(jnp.float32)
    return [einsum("...X,YX->...Y", wide, matrix.astype(jnp.float32)) for matrix in matrices]


def _plain_products(rows, *matrices):
    return _plain(rows, matrices)


def widen(matrix: jax.Array, after: jax.Array) -> jax.Array:
    """Converts `matrix` [Y, X], bfloat16 or int8, to float32; it has no gradient.

    Args:
      matrix: the matrix.
      after: an array that must be computed first. Without it XLA widens the matrices of all layers
        at the start, and holds them all in memory.
    """
    result = jax.ShapeDtypeStruct(matrix.shape, jnp.float32)
    return _call(f"widen_{matrix.dtype.name}", _plain_widen, [result], matrix, after)[0]


def _plain_widen(matrix, after):
    return [matrix.astype(jnp.float32)]


@jax.custom_jvp
def take(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Takes rows of `table` [V, D].

    Args:
      table: an array of any dtype.
      tokens: indices of rows, [B, T] integers, clipped to 0 and V - 1.

    Returns:
      [B, T, D].
    """
    result = jax.ShapeDtypeStruct((tokens.size, table.shape[1]), table.dtype)
    which = tokens.reshape(-1).astype(jnp.int32)
    return _call("take", _plain_take, [result], table, which)[0].reshape(*tokens.shape, -1)


@take.defjvp
def _differentiate_take(primals, tangents):
    """Differentiates the plain form, for the kernel has no gradient."""
    return take(*primals), jnp.take(tangents[0], primals[1], axis=0, mode="clip")


def _plain_take(table, tokens):
    return [jnp.take(table, tokens, axis=0, mode="clip")]


def once(x: jax.Array) -> jax.Array:
    """Returns `x` [..., D], computed once, where XLA's CPU backend would compute it for each use.

    That backend removes optimization barriers before it fuses operations, but it cannot fuse into
    the call of a kernel. So this copies `x` with one.
    """
    rows = x.reshape(-1, x.shape[-1])
    return take(rows, jnp.arange(len(rows), dtype=jnp.int32)[None]).reshape(x.shape)


@jax.custom_jvp
def put(table: jax.Array, rows: jax.Array, places: jax.Array) -> jax.Array:
    """Writes one row into each of B tables, in place if nothing else uses the old tables.

    Args:
      table: the tables, [B, S, ...], of any dtype.
      rows: one row for each table, [B, 1, ...], of the same dtype.
      places: index of the row to overwrite, [B, 1] integers; a row with an index out of range is
        not written.

    Returns:
      The new table.
    """
    result = jax.ShapeDtypeStruct(table.shape, table.dtype)
    where = places.reshape(-1).astype(jnp.int32)
    return _call("put", _plain_put, [result], table, rows, where, in_place=True)[0]


@put.defjvp
def _differentiate_put(primals, tangents):
    """Differentiates the plain form, for the kernel has no gradient."""
    scatter = functools.partial(_plain_put, places=primals[2].reshape(-1))
    return put(*primals), jax.jvp(scatter, primals[:2], tangents[:2])[1][0]


def _plain_put(table, rows, places):
    def one(part, row, place):
        return part.at[place].set(row[0], mode="drop", wrap_negative_indices=False)

    return [jax.vmap(one)(table, rows, places)]


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *scales: jax.Array
) -> jax.Array:
    """Attends from one query of each row to the keys of that row; it has no gradient.

    Args:
      q: queries, [B, N, H].
      k: keys, [B, S, K, H] float32, bfloat16 or int8, each shared by N / K query heads.
      v: values, in the same form.
      mask: True where a row sees a key, [B, S].
      scales: for int8, the scales of the keys and of the values, each [B, S, K] float32.

    Returns:
      [B, N, H] float32; zeros for a row that sees no key.
    """
    result = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    operands = q.astype(jnp.float32), k, v, mask, *scales
    return _call(f"attend_{k.dtype.name}", _plain_attend, [result], *operands)[0]


def _plain_attend(q, k, v, mask, *scales):
    k, v = (x.astype(jnp.float32) for x in (k, v))
    if scales:
        k, v = (x * scale[..., None] for x, scale in zip((k, v), scales, strict=True))
    grouped = q.reshape(q.shape[0], k.shape[2], -1, q.shape[2])
    scores = einsum("BKGH,BSKH->BKGS", grouped, k) * q.shape[2] ** -0.5
    seen = mask[:, None, None]
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.where(seen, jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)), 0)
    # A masked value may be infinite, and infinity times a weight of 0 is NaN.
    mixed = einsum("BKGS,BSKH->BKGH", weights, jnp.where(mask[..., None, None], v, 0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return [(mixed / jnp.where(total == 0, 1, total)).reshape(q.shape)]


@functools.cache
def _constant(name: str) -> int:
    """Returns an integer constant that the library exports, which depends on the processor."""
    return ctypes.c_int.in_dll(library.load(), name).value


def _call(
    name: str,
    plain: Callable[..., list[jax.Array]],
    results: Sequence[jax.ShapeDtypeStruct],
    *operands: jax.Array,
    in_place: bool = False,
) -> list[jax.Array]:
    """Calls a kernel by the name under which `library` registers it.

    Args:
      name: the kernel's name, without the prefix "mistral_jax_".
      plain: a function at module level that computes the same with XLA's operations.
      results: shapes and dtypes of the results.
      operands: the kernel's operands.
      in_place: whether the first result may reuse the memory of the first operand.
    """
    results = tuple((one.shape, jnp.dtype(one.dtype)) for one in results)
    return _kernel.bind(*operands, name=name, plain=plain, results=results, in_place=in_place)


_kernel = jax.extend.core.Primitive("kernel_or_plain")
_kernel.multiple_results = True


@_kernel.def_impl
def _run(*operands, **how):
    return _jitted(operands, tuple(how.items()))


@functools.partial(jax.jit, static_argnums=1)
def _jitted(operands, how):
    return _kernel.bind(*operands, **dict(how))


@_kernel.def_abstract_eval
def _shape(*operands, results, **how):
    return [jax.core.ShapedArray(*one) for one in results]


def _batch(operands, axes, *, results, **how):
    """Implements `jax.vmap`: calls the kernel once for each element of the mapped axis."""
    moved = [
        x if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    ]

    def one(mapped):
        rest = iter(mapped)
        given = [x if axis is None else next(rest) for x, axis in zip(moved, axes, strict=True)]
        return _kernel.bind(*given, results=results, **how)

    mapped = [x for x, axis in zip(moved, axes, strict=True) if axis is not None]
    return jax.lax.map(one, mapped), [0] * len(results)


def _lower_plain(context, *operands, plain, **how):
    return mlir.lower_fun(plain)(context, *operands)


def _lower_on_a_cpu(context, *operands, name, plain, results, in_place):
    if context.module_context.lowering_parameters.for_export:
        return _lower_plain(context, *operands, plain=plain)
    call = jax.ffi.ffi_call(
        f"mistral_jax_{name}",
        [jax.ShapeDtypeStruct(*one) for one in results],
        input_output_aliases={0: 0} if in_place else None,
    )
    return mlir.lower_fun(lambda *operands: call(*operands))(context, *operands)


batching.primitive_batchers[_kernel] = _batch
mlir.register_lowering(_kernel, _lower_plain)
mlir.register_lowering(_kernel, _lower_on_a_cpu, platform="cpu")
