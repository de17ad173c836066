"""Laws of the products of experts: every way to compute them equals the plain one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from mistral_jax.ops import experts
from mistral_jax.ops.backend import PLAIN, Backend
from mistral_jax.ops.experts import Choice, Stack, mix, plain
from mistral_jax.ops.quantized import QuantizedMatrix, to_int8

D, F = 8, 12
# Rows, tokens, experts, experts of a token.
SHAPES = [
    (1, 1, 4, 2),
    (3, 7, 4, 2),
    (2, 40, 3, 1),
    *(
        pytest.param(shape, marks=pytest.mark.slow)
        for shape in ((2, 1, 8, 2), (2, 5, 5, 5), (1, 3, 1, 1))
    ),
]
ACCELERATOR = Backend("tpu", "TPU v5 lite", True)


def make(rows, tokens, count, chosen, adapters=False, dtype=jnp.float32, width=D, inner=F):
    """Draws activations with some padding, their experts, and the stacks."""
    rng = np.random.default_rng(count)

    def draw(*shape):
        return jnp.asarray((rng.normal(size=shape) / np.sqrt(shape[-1])).astype(dtype))

    chances = scipy.special.softmax(rng.normal(scale=3, size=(rows, tokens, count)), axis=-1)
    picked = np.argsort(-chances)[..., :chosen].astype(np.int32)
    shares = np.take_along_axis(chances, picked, axis=-1).astype(np.float32)
    read = rng.random((rows, tokens)) < 0.8
    choice = Choice(*map(jnp.asarray, (picked, shares, np.where(read, 3, -1).astype(np.int32))))

    def stack(outputs, inputs):
        adapter = draw(count, 3, inputs), draw(count, outputs, 3)
        return Stack(draw(count, outputs, inputs), *(adapter if adapters else ()))

    stacks = [stack(inner, width), stack(inner, width), stack(width, inner)]
    return draw(rows, tokens, width), choice, stacks


@functools.partial(jax.jit, static_argnames=("compute", "options"))
def both(compute, x, choice, stacks, options=()):
    """Returns the outputs, and the gradients of a function of them."""

    def loss(x, shares, stacks):
        made = compute(x, choice._replace(shares=shares), stacks, x.dtype, *options)
        return jnp.sum(jnp.sin(made.astype(jnp.float32))), made

    (_, made), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, choice.shares, stacks)
    return made, grads


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", [PLAIN, ACCELERATOR], ids=["cpu", "accelerator"])
def test_outputs_and_gradients_are_the_plain_ones(shape, adapters, backend):
    case = make(*shape, adapters)
    expected, found = both(plain, *case), both(mix, *case, options=(backend,))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        bound = 2e-5 * max(1e-3, np.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound)
    assert (np.asarray(found[0])[np.asarray(case[1].positions) < 0] == 0).all()


@pytest.mark.parametrize("backend", [PLAIN, ACCELERATOR], ids=["cpu", "accelerator"])
def test_an_expert_that_no_token_chose_is_not_read(backend):
    x, choice, stacks = make(1, 5, 6, 1)
    used = {int(e) for e in choice.experts[choice.positions >= 0].ravel()}
    assert 0 < len(used) < 6
    idle = np.array([e not in used for e in range(6)])[:, None, None]
    spoiled = [Stack(jnp.where(idle, np.nan, stack.matrix)) for stack in stacks]
    compute = jax.jit(mix, static_argnums=(3, 4))
    np.testing.assert_array_equal(
        compute(x, choice, spoiled, jnp.float32, backend),
        compute(x, choice, stacks, jnp.float32, backend),
    )


@pytest.mark.parametrize("backend", [PLAIN, ACCELERATOR], ids=["cpu", "accelerator"])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_int8_experts_are_their_dequantised_matrices(shape, backend):
    x, choice, stacks = make(*shape)
    small = [Stack(QuantizedMatrix(*to_int8(stack.matrix, 2, jnp))) for stack in stacks]
    wide = [Stack(stack.matrix.dequantize(jnp.float32)) for stack in small]

    def summed(x, stacks):
        # Only the products of float matrices go the plain way.
        is_small = isinstance(stacks[0].matrix, QuantizedMatrix)
        compute = functools.partial(mix, backend=backend) if is_small else plain
        made = compute(x, choice, stacks, dtype=jnp.float32)
        return jnp.sum(made), made

    gradient = jax.jit(jax.grad(summed, has_aux=True))
    (grad, found), (other, expected) = gradient(x, small), gradient(x, wide)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(grad, other, rtol=0, atol=2e-5 * np.abs(other).max())


def test_the_kernel_of_a_tpu_is_the_plain_product(monkeypatch):
    for name in ("gmm", "tgmm"):
        function = functools.partial(getattr(experts, name), interpret=True)
        monkeypatch.setattr(experts, name, function)
    case = make(2, 30, 4, 2, dtype=jnp.bfloat16, width=128, inner=256)
    kernel = Backend("tpu", "TPU v5 lite", True, ("grouped",))
    assert experts._has_kernel(case[0], case[2][0].matrix, kernel)
    found, expected = both(mix, *case, options=(kernel,)), both(plain, *case)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
        assert np.abs(ours - theirs).max() <= 2**-6 * np.abs(theirs).max()


@pytest.mark.parametrize("rows", [1, 3, 8, 64])
@pytest.mark.parametrize("backend", [PLAIN, ACCELERATOR], ids=["cpu", "accelerator"])
def test_blocks_hold_every_choice(rows, backend):
    """Whatever the tokens choose, all at once or each another expert, no pair is dropped."""
    sort = jax.jit(experts._sort, static_argnums=(2, 3))
    for experts_of in (np.zeros((1, rows, 1)), np.arange(rows)[None, :, None] % 5):
        chosen = jnp.asarray(experts_of, jnp.int32)
        choice = Choice(chosen, jnp.ones(chosen.shape), jnp.zeros((1, rows), jnp.int32))
        blocks = jax.device_get(sort(choice, 0, 5, backend))
        slots = np.asarray(blocks.slots)
        assert len(set(slots)) == rows
        assert slots.min() >= 0
        np.testing.assert_array_equal(np.asarray(blocks.pairs)[slots], np.arange(rows))
        np.testing.assert_array_equal(
            np.asarray(blocks.experts)[slots // blocks.rows], chosen.ravel()
        )
        assert int(blocks.count) <= len(blocks.experts)
