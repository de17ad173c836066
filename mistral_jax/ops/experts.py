"""A mixture of experts: each token's products with the matrices of the experts that it chose.

The pairs of a token and one of its experts are sorted by expert, and each expert's pairs begin a
new block of rows. A product then goes through the blocks that have rows, each with one matrix
(MegaBlocks, arXiv 2211.15841): no expert has a capacity, no pair is dropped, padding costs
nothing, and a step of decoding reads the chosen matrices only.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from mistral_jax.ops.backend import PLAIN, V6E, Backend
from mistral_jax.ops.expert_partition import Stack, by_device
from mistral_jax.ops.partition import Rules
from mistral_jax.ops.products import multiply
from mistral_jax.ops.quantized import MaybeQuantized, QuantizedMatrix, einsum

# The most rows of a block on a CPU, and on other devices: a block's product should take as long as
# reading its matrix. A v6e computes faster than it reads.
_CPU_ROWS, _ROWS, _V6E_ROWS = 128, 256, 512
# The most rows of which every expert gets one block: reading its matrix takes longer than them.
_FEW = 128
# Tiles of inputs and of outputs of the TPU's kernel, which fit in 16 MiB with the rows of a block.
_TILES = 512, 2048
# Tiles of both axes of a matrix, for its gradient.
_GRADIENT_TILES = 512, 1024
_LANES = 128


class Choice(NamedTuple):
    """The experts that each token chose.

    Attributes:
      experts: their indices, [B, T, k] int32.
      shares: the weight of each in the token's sum, [B, T, k] float32.
      positions: position of each token in its text, [B, T] int32; -1 = padding, which no expert
        computes.
    """

    experts: jax.Array
    shares: jax.Array
    positions: jax.Array


class Dropout(NamedTuple):
    """Dropout of the adapters' inputs: a key and a rate."""

    key: jax.Array
    rate: float


def mix(
    x: jax.Array,
    choice: Choice,
    stacks: Sequence[Stack],
    dtype: jnp.dtype,
    backend: Backend = PLAIN,
    rules: Rules = (),
    dropout: Dropout | None = None,
) -> jax.Array:
    """Sums the outputs of the experts that each token chose: down(silu(gate(x)) * up(x)).

    On a mesh, each device computes its own experts, its own part of their width and its own rows.

    Args:
      x: activations, [B, T, D].
      choice: the experts of each token.
      stacks: the projections gate, up and down of all experts.
      dtype: dtype of the operands; sums are float32.
      backend: the backend that this is traced for.
      rules: mesh axes of the logical axes.
      dropout: dropout of the adapters' inputs; None = none.

    Returns:
      [B, T, D] in `dtype`; 0 for padding.
    """
    key, rate = dropout or (None, 0.0)
    pairs = None
    if key is not None:  # Dropout is drawn from the number of each pair, on any device.
        pairs = jnp.arange(choice.experts.size, dtype=jnp.int32).reshape(choice.experts.shape)
    no_mesh = jax.sharding.get_abstract_mesh().empty
    if no_mesh and not backend.alone:  # XLA cannot partition the kernel.
        backend = dataclasses.replace(backend, kernels=())
    local = functools.partial(_mix, rate=rate, dtype=dtype, backend=backend)
    given = (x.astype(dtype), choice, pairs), list(stacks), key
    return local(*given) if no_mesh else by_device(local, rules, *given)


def plain(
    x: jax.Array, choice: Choice, stacks: Sequence[Stack], dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """Computes `mix` with every expert for every token. Tests compare `mix` with it."""
    gate, up, down = stacks
    count = gate.matrix.shape[0]
    mine = jax.nn.one_hot(choice.experts, count, dtype=jnp.float32)
    shares = jnp.where(choice.positions[..., None] >= 0, choice.shares, 0)
    each = jnp.sum(mine * shares[..., None], axis=-2)  # [B, T, E]

    def project(rows, stack):
        product = einsum("...ex,eyx->...ey", rows, _wide(stack.matrix, dtype))
        if stack.a is not None:
            inner = einsum("...ex,erx->...er", rows, stack.a.astype(dtype)).astype(dtype)
            product += einsum("...er,eyr->...ey", inner, stack.b.astype(dtype))
        return product.astype(dtype)

    shape = (*x.shape[:2], count, x.shape[-1])
    rows = jnp.broadcast_to(x.astype(dtype)[..., None, :], shape)
    opened, raised = project(rows, gate), project(rows, up)
    gated = jax.nn.silu(opened.astype(jnp.float32)).astype(dtype) * raised
    outputs = project(gated, down).astype(jnp.float32)
    return jnp.sum(outputs * each[..., None], axis=-2).astype(dtype)


def _mix(tokens, stacks, key, first=0, *, rate, dtype, backend):
    """Computes `mix` on one device, which holds the experts from number `first` on."""
    x, choice, pairs = tokens
    (gate, up, down), chosen = stacks, choice.experts.shape[-1]
    width = x.shape[-1]
    blocks = _sort(choice, first, gate.matrix.shape[0], backend)
    # Rows of the blocks that belong to no pair are 0, and so are their gradients.
    own = blocks.pairs[:, None] >= 0
    pick = jnp.maximum(blocks.pairs, 0)
    rows = jnp.where(own, x.reshape(-1, width)[pick // chosen], 0)
    drawn = None if key is None else pairs.reshape(-1)[pick]

    def project(rows, stack, number):
        if stack.a is None:
            return _grouped(blocks, dtype, backend, rows, stack.matrix)
        product = _grouped(blocks, jnp.float32, backend, rows, stack.matrix)
        if key is not None:
            each = functools.partial(_keep, jax.random.fold_in(key, number), rate, rows.shape[-1])
            rows = jnp.where(jax.vmap(each)(drawn), rows / (1 - rate), 0).astype(dtype)
        inner = _grouped(blocks, dtype, backend, rows, stack.a)
        return (product + _grouped(blocks, jnp.float32, backend, inner, stack.b)).astype(dtype)

    opened = checkpoint_name(project(rows, gate, 0), "mlp")
    raised = checkpoint_name(project(rows, up, 1), "mlp")
    gated = jax.nn.silu(opened.astype(jnp.float32)).astype(dtype) * raised
    outputs = project(gated, down, 2)
    # Blocks without rows may hold any number.
    found = blocks.slots[:, None] >= 0
    outputs = jnp.where(found, outputs[jnp.maximum(blocks.slots, 0)], 0).astype(jnp.float32)
    outputs = outputs.reshape(*choice.experts.shape, width) * choice.shares[..., None]
    return jnp.sum(outputs, axis=-2).astype(dtype)


def _keep(key, rate, width, pair):
    """Draws which inputs of a pair's row dropout keeps."""
    return jax.random.bernoulli(jax.random.fold_in(key, pair), jnp.float32(1 - rate), (width,))


@flax.struct.dataclass
class _Blocks:
    """The pairs of tokens and experts, sorted into blocks of rows.

    Attributes:
      pairs: the pair of each row, [P] int32; -1 = none.
      slots: the row of each pair, [B * T * k] int32; -1 = another device computes it, or none.
      experts: the expert of each block, [P / rows] int32.
      sizes: rows of each expert, in whole blocks, [E] int32.
      rows: rows of a block.
    """

    pairs: jax.Array
    slots: jax.Array
    experts: jax.Array
    sizes: jax.Array
    rows: int = flax.struct.field(pytree_node=False)

    @property
    def count(self) -> jax.Array:
        """The number of blocks that have rows."""
        return jnp.sum(self.sizes) // self.rows


def _sort(choice: Choice, first: jax.Array | int, count: int, backend: Backend) -> _Blocks:
    """Sorts the pairs that chose one of `count` experts from number `first` on."""
    own = choice.experts - first
    good = (choice.positions[..., None] >= 0) & (own >= 0) & (own < count)
    own = jnp.where(good, own, count).reshape(-1)
    many, total = own.size, min(own.size, count)
    rows = _block_rows(many, count, backend)
    length = total + (many - total) // rows  # The most blocks that any choice fills.
    hits = jnp.cumsum(jax.nn.one_hot(own, count, dtype=jnp.int32), axis=0)
    sizes = -(-hits[-1] // rows) * rows
    ends = jnp.cumsum(sizes)
    begins = jnp.append(ends - sizes, 0)
    rank = jnp.take_along_axis(hits, jnp.minimum(own, count - 1)[:, None], axis=1)[:, 0] - 1
    slots = jnp.where(own < count, begins[own] + rank, -1)
    pairs = jnp.full(length * rows, -1, jnp.int32)
    drop = jnp.where(slots < 0, length * rows, slots)
    pairs = pairs.at[drop].set(jnp.arange(many, dtype=jnp.int32), mode="drop")
    blocks = jnp.arange(length, dtype=jnp.int32) * rows
    experts = jnp.searchsorted(ends, blocks, side="right").astype(jnp.int32)
    return _Blocks(pairs, slots, jnp.minimum(experts, count - 1), sizes, rows)


def _block_rows(pairs: int, experts: int, backend: Backend) -> int:
    """Chooses the rows of a block."""
    if backend.platform == "cpu":  # A row costs more than the part of a matrix that it shares.
        return min(_CPU_ROWS, 1 << max(0, (pairs // experts - 1).bit_length()))
    if pairs <= _FEW:
        return -(-pairs // 16) * 16  # Whole tiles of 16-bit numbers.
    return _V6E_ROWS if backend.chip in V6E and pairs >= 4 * _V6E_ROWS else _ROWS


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _grouped(
    blocks: _Blocks, dtype: jnp.dtype, backend: Backend, rows: jax.Array, matrix: MaybeQuantized
) -> jax.Array:
    """Multiplies each block of `rows` [P, X] by the matrix [Y, X] of its expert: [P, Y]."""
    if _has_kernel(rows, matrix, backend):
        wide = matrix.astype(rows.dtype)
        return _kernel(rows, wide, blocks, dtype, transpose_rhs=True)

    def multiply_block(x, number):
        return multiply(x[None], _entry(matrix, number), 1, rows.dtype, backend)[0]

    return _each_block(blocks, multiply_block, rows, matrix.shape[1], dtype)


def _forward(blocks, dtype, backend, rows, matrix):
    return _grouped(blocks, dtype, backend, rows, matrix), (blocks, rows, matrix)


def _backward(dtype, backend, kept, grad):
    blocks, rows, matrix = kept
    grad = grad.astype(rows.dtype)
    if _has_kernel(rows, matrix, backend):
        wide = matrix.astype(rows.dtype)
        of_rows = _kernel(grad, wide, blocks, rows.dtype, transpose_rhs=False)
        tiles = (blocks.rows, *_GRADIENT_TILES)
        with jax.numpy_dtype_promotion("standard"):  # JAX's own kernels mix dtypes.
            of_matrix = tgmm(grad.swapaxes(0, 1), rows, blocks.sizes, matrix.dtype, tiles)
        return _nothing(blocks), of_rows, of_matrix

    def multiply_block(x, number):
        return einsum("by,yx->bx", x, _wide(_entry(matrix, number), x.dtype))

    of_rows = _each_block(blocks, multiply_block, grad, rows.shape[1], rows.dtype)
    if isinstance(matrix, QuantizedMatrix):  # Quantised matrices are frozen.
        return _nothing(blocks), of_rows, _nothing(matrix)

    def add(i, total):
        y, x = (_block(z, i, blocks.rows) for z in (grad, rows))
        new = _entry(total, blocks.experts[i]) + einsum("by,bx->yx", y, x)
        return jax.lax.dynamic_update_index_in_dim(total, new, blocks.experts[i], 0)

    zeros = jnp.zeros(matrix.shape, jnp.float32)
    of_matrix = jax.lax.fori_loop(0, blocks.count, add, zeros).astype(matrix.dtype)
    return _nothing(blocks), of_rows, of_matrix


_grouped.defvjp(_forward, _backward)


def _each_block(blocks, function, rows, width, dtype):
    """Applies a function of a block's rows and expert to the blocks that have rows."""

    def add(i, total):
        made = function(_block(rows, i, blocks.rows), blocks.experts[i]).astype(dtype)
        return jax.lax.dynamic_update_slice_in_dim(total, made, i * blocks.rows, 0)

    return jax.lax.fori_loop(0, blocks.count, add, jnp.zeros((len(rows), width), dtype))


def _block(rows, i, size):
    return jax.lax.dynamic_slice_in_dim(rows, i * size, size, 0)


def _entry(tree: Any, number: jax.Array) -> Any:
    """Returns one entry along the first axis of each array."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, 0, False), tree)


def _has_kernel(rows: jax.Array, matrix: MaybeQuantized, backend: Backend) -> bool:
    """Tells whether the TPU's kernel takes a product.

    `jax.lax.ragged_dot` would copy the matrices, to have their input axis first.
    """
    return (
        "grouped" in backend.kernels
        and rows.dtype == jnp.bfloat16
        and not isinstance(matrix, QuantizedMatrix)
        and all(size % _LANES == 0 for size in matrix.shape[1:])
    )


def _kernel(rows, matrix, blocks, dtype, transpose_rhs):
    tiles = (blocks.rows, *_TILES)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own kernels mix dtypes.
        return gmm(rows, matrix, blocks.sizes, dtype, tiles, transpose_rhs=transpose_rhs)


def _wide(matrix: MaybeQuantized, dtype: jnp.dtype) -> jax.Array:
    if isinstance(matrix, QuantizedMatrix):
        return matrix.dequantize(dtype)
    return matrix.astype(dtype)


def _nothing(tree: Any) -> Any:
    """Returns the gradients of arrays that have none."""

    def zero(x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros_like(x)
        return np.zeros(x.shape, jax.dtypes.float0)

    return jax.tree.map(zero, tree)
