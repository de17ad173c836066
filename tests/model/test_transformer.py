"""Laws of the whole forward pass, with and without a cache."""

import functools
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny

from mistral_jax.config import ModelConfig
from mistral_jax.model.cache import init_cache
from mistral_jax.model.transformer import SAVED, Transformer, stack_layers, unstack_layers
from mistral_jax.ops.backend import Backend

# One model that has every kind of layer, YaRN, and queries that are scaled by their positions.
MIXED = {
    "n_layers": 4,
    "sliding_window": [None, 5, 1, 3],
    "dilation": [1, 1, 1, 2],
    "yarn": tiny.YARN | {"apply_scale": True},
    "llama_4_scaling": tiny.QUERIES,
}
TEXT = np.random.default_rng(0).integers(53, size=28)  # past five windows
# Sums of a few dozen float32 terms, in another order, through three layers (logits are near 1).
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def mixed():
    """The model and params of a Mistral with every kind of layer."""
    return tiny.build(**MIXED)


def test_every_kind_of_layer_has_the_logits_of_the_reference(mixed):
    tensors = reference.random_tensors(tiny.OFFICIAL | MIXED, seed=0)
    expected = reference.forward(tiny.OFFICIAL | MIXED, tensors, TEXT)
    np.testing.assert_allclose(tiny.alone(*mixed, TEXT), expected, **CLOSE)


def test_decode_equals_the_full_pass_at_every_position(mixed):
    model, params = mixed
    expected = tiny.alone(model, params, TEXT)
    cache = init_cache(model.config, 1, len(TEXT))
    for position, token in enumerate(TEXT):
        arguments = jnp.array([[token]]), jnp.array([[position]]), cache
        logits, cache = tiny.forward(model, params, *arguments)
        np.testing.assert_allclose(logits[0, 0], expected[position], **CLOSE)


@pytest.mark.parametrize(
    ("window", "dilation"), [(3, 1), pytest.param(2, 2, marks=pytest.mark.slow)]
)
def test_every_chunk_size_gives_the_same_cache_and_logits(window, dilation):
    model, params = tiny.build(n_layers=1, sliding_window=window, dilation=dilation)
    span = (window - 1) * dilation + 1
    text = TEXT[: 5 * span + 2]
    expected = tiny.alone(model, params, text)
    caches = []
    for size in range(1, 4 * span + 1):
        cache = init_cache(model.config, 1, len(text))
        for start in range(0, len(text), size):
            chunk = np.zeros((1, size), np.int32)  # the last one is padded to the same size
            chunk[0, : len(text) - start] = text[start : start + size]
            places = start + np.arange(size, dtype=np.int32)[None]
            places = np.where(places < len(text), places, -1)
            logits, cache = tiny.forward(model, params, chunk, places, cache)
            logits = np.asarray(logits)[0, : len(text) - start]
            np.testing.assert_allclose(logits, expected[start : start + size], **CLOSE)
        caches.append(jax.device_get(cache))
    for cache in caches[1:]:
        chex.assert_trees_all_equal(*([c.positions for c in x] for x in (cache, caches[0])))
        chex.assert_trees_all_close(cache, caches[0], **CLOSE)


def test_a_row_of_a_ragged_batch_equals_that_row_alone(mixed):
    model, params = mixed
    rows = [TEXT, TEXT[:4], TEXT[9:24], []]
    expected = [tiny.alone(model, params, row) for row in rows[:3]]
    tokens, positions = tiny.ragged(rows)
    together, _ = tiny.forward(model, params, tokens, positions)
    assert jnp.isfinite(together).all()  # padding and the empty row included
    for row, logits in zip(expected, together[:3], strict=True):
        np.testing.assert_allclose(logits[: len(row)], row, **CLOSE)

    # Now through a cache: all but the last 3 tokens in chunks of 9, then each row at its own pace.
    new = 3
    cache = init_cache(model.config, len(rows), len(TEXT))
    lengths = jnp.array([[len(row)] for row in rows])
    prompts = jnp.where(positions < lengths - new, positions, -1)
    for chunk in range(0, 27, 9):
        columns = slice(chunk, chunk + 9)
        arguments = tokens[:, columns], prompts[:, columns], cache
        _, cache = tiny.forward(model, params, *arguments)
    for step in range(new):
        places = jnp.maximum(lengths - new + step, -1)
        token = jnp.take_along_axis(tokens, places, axis=1)
        logits, cache = tiny.forward(model, params, token, places, cache)
        assert jnp.isfinite(logits).all()
        for row, ours in zip(expected, logits[:3, 0], strict=True):
            np.testing.assert_allclose(ours, row[len(row) - new + step], **CLOSE)


@pytest.mark.parametrize(
    "layers", [[(1, 1)], [(4, 1), (3, 1)], [(2, 1), (None, 1)], [(3, 2), (2, 5)], [(None, 3)]]
)
def test_a_token_reaches_exactly_as_far_as_its_windows(layers):
    """Each layer passes on what its window of keys holds: W - 1 steps further back."""
    windows, dilations = map(list, zip(*layers, strict=True))
    model, params = tiny.build(n_layers=len(layers), sliding_window=windows, dilation=dilations)
    length = 12
    reached = {length - 1}
    for window, dilation in layers:
        reached = {p for start in reached for p in range(start, -1, -dilation)[:window]}
    changed = np.tile(TEXT[:length], (length + 1, 1))
    changed[range(length), range(length)] += 1  # row i differs at position i; the last not at all
    changed %= model.config.vocab_size
    positions = jnp.arange(length)[None].repeat(length + 1, 0)

    tokens, positions = changed.astype(np.int32), np.asarray(positions)
    direct, _ = tiny.forward(model, params, tokens, positions)
    cache = init_cache(model.config, length + 1, length)
    _, cache = tiny.forward(model, params, tokens[:, :-1], positions[:, :-1], cache)
    cached, _ = tiny.forward(model, params, tokens[:, -1:], positions[:, -1:], cache)
    for logits in (np.asarray(direct)[:, -1], np.asarray(cached)[:, -1]):
        differs = np.abs(logits[:-1] - logits[-1:]).max(axis=1)
        for position in range(length):
            assert differs[position] > 1e-5 if position in reached else differs[position] == 0


def test_sharing_kv_heads_equals_repeating_their_kernels():
    model, params = tiny.build(n_layers=1)
    repeated = jax.tree_util.tree_map_with_path(
        lambda path, x: x.repeat(2, 0) if path[-2].key in ("k_proj", "v_proj") else x, params
    )
    twin, _ = tiny.build(n_layers=1, n_kv_heads=4)
    shared, copied = tiny.alone(model, params, TEXT), tiny.alone(twin, repeated, TEXT)
    np.testing.assert_allclose(copied, shared, **CLOSE)


def test_logits_at_picks_one_column_a_row(mixed):
    model, params = mixed
    batch = tiny.ragged([TEXT, TEXT[:9]])
    everything, _ = tiny.forward(model, params, *batch)
    picked, _ = tiny.forward(model, params, *batch, logits_at=jnp.array([27, 8]))
    assert picked.shape == (2, 1, model.config.vocab_size)
    np.testing.assert_allclose(picked[:, 0], everything[[0, 1], [27, 8]], **CLOSE)


def test_lower_precision_stays_near_float32():
    model, params = tiny.build()
    exact = tiny.alone(model, params, TEXT)
    for dtype, bits in ((jnp.bfloat16, 8), (jnp.float16, 11)):
        rough = Transformer(model.config, dtype)
        cache = init_cache(model.config, 1, len(TEXT), dtype)
        logits, cache = tiny.forward(rough, params, *tiny.ragged([TEXT]), cache)
        assert logits.dtype == jnp.float32
        assert {x.dtype for layer in cache for x in (layer.k, layer.v)} == {jnp.dtype(dtype)}
        # Some 12 roundings a layer, each by 2**-bits at most, add up like a random walk.
        bound = math.sqrt(12 * model.config.num_layers) * 2.0**-bits
        error = jnp.sqrt(jnp.mean((logits[0] - exact) ** 2) / jnp.mean(exact**2))
        assert bound / 100 < error < bound


def test_gradients_are_finite_and_blind_to_padding():
    model, params = tiny.build()

    @jax.jit
    def gradient(params, tokens, positions):
        def loss(params):
            logits = model.apply({"params": params}, tokens, positions)[0]
            return jnp.sum(jnp.where(positions[..., None] >= 0, jax.nn.log_softmax(logits), 0))

        return jax.grad(loss)(params)

    tokens, positions = tiny.ragged([TEXT[:9], TEXT[:4], []])
    grads = gradient(params, tokens, positions)
    chex.assert_tree_all_finite(grads)
    other = jnp.where(positions < 0, 7, tokens)
    chex.assert_trees_all_close(grads, gradient(params, other, positions), atol=1e-4, rtol=1e-5)


@pytest.mark.slow
def test_a_gradient_computes_again_what_it_does_not_keep():
    """Blocks where asked, and scores always: no T x T numbers wait for the way back."""
    model, params = tiny.build(n_layers=3, sliding_window=None, hidden_dim=256)
    tokens, positions = tiny.ragged([np.arange(200) % 53] * 2)

    def loss(model, params):
        return jnp.sum(jax.nn.logsumexp(model.apply({"params": params}, tokens, positions)[0]))

    kept, grads = {}, {}
    for remat in (None, "nothing_saveable"):
        _, back = jax.vjp(functools.partial(loss, model.clone(remat=remat)), params)
        kept[remat] = [leaf.nbytes for leaf in jax.tree.leaves(back)]
        (grads[remat],) = jax.jit(back)(jnp.float32(1))
    everything, nothing = kept.values()
    chex.assert_trees_all_close(*grads.values(), rtol=1e-5, atol=1e-5)
    assert max(everything) < 2 * model.config.num_heads * 200 * 200 * 4
    assert sum(nothing) < sum(everything) / 2


@pytest.mark.slow
def test_policies_save_more_and_more_and_leave_gradients_alone():
    model, params = tiny.build(n_layers=2)
    tokens, positions = tiny.ragged([TEXT[:9], TEXT[:4]])

    def loss(model, params):
        return jnp.sum(jax.nn.logsumexp(model.apply({"params": params}, tokens, positions)[0]))

    saved, grads = [], []
    for remat in ("nothing_saveable", *SAVED, "everything_saveable"):
        _, back = jax.vjp(functools.partial(loss, model.clone(remat=remat)), params)
        saved.append(sum(leaf.nbytes for leaf in jax.tree.leaves(back)))
        grads.append(jax.jit(back)(jnp.float32(1)))
    assert saved == sorted(set(saved))
    for other in grads[1:]:
        chex.assert_trees_all_close(other, grads[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("remat", [None, "save_products"])
def test_operands_written_to_memory_for_a_tpu_change_no_gradient(remat):
    model, params = tiny.build(n_layers=2)
    tokens, positions = tiny.ragged([TEXT[:9], TEXT[:4]])

    def loss(params, model):
        return jnp.sum(jax.nn.logsumexp(model.apply({"params": params}, tokens, positions)[0]))

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain = gradient(params, model.clone(backend=Backend()))
    stored = gradient(params, model.clone(backend=Backend("tpu"), remat=remat))
    chex.assert_trees_all_close(stored, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("remat", "runs"), [("nothing_saveable", 4), ("save_attention", 3)])
def test_saved_attention_runs_the_kernel_of_a_tpu_no_second_time(remat, runs):
    model, params = tiny.build(n_layers=1)
    tokens = positions = jnp.arange(128, dtype=jnp.int32)[None]
    model = model.clone(backend=Backend("tpu", alone=True, kernels=("splash",)), remat=remat)

    def loss(params):
        return jnp.sum(model.apply({"params": params}, tokens % 53, positions)[0])

    program = jax.jit(jax.grad(loss)).trace(params).lower(lowering_platforms=("tpu",)).as_text()
    assert program.count("tpu_custom_call") == runs


@pytest.mark.parametrize("remat", [None, "dots_saveable", "save_heads"])
def test_a_scan_over_layers_is_the_loop_over_them(remat):
    model, params = tiny.build(n_layers=3, sliding_window=3, dilation=2)
    tokens, positions = tiny.ragged([TEXT[:9], TEXT[:4]])
    chex.assert_trees_all_equal(unstack_layers(stack_layers(params)), params)

    def loss(params, model, pack):
        logits, _ = model.apply({"params": pack(params)}, tokens, positions)
        return jnp.sum(jax.nn.logsumexp(logits))

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2))
    looped = gradient(params, model.clone(remat=remat), lambda params: params)
    scanned = gradient(params, model.clone(remat=remat, scan=True), stack_layers)
    chex.assert_trees_all_close(scanned, looped, rtol=1e-5, atol=1e-5)
    made = jax.eval_shape(model.clone(scan=True).init, jax.random.key(0), tokens, positions)
    chex.assert_trees_all_equal_shapes(nn.unbox(made)["params"], stack_layers(params))


@pytest.mark.parametrize("fields", [{"sliding_window": [3, 5]}, {"dilation": [1, 2]}])
def test_a_scan_needs_equal_windows_and_no_cache(fields):
    model, params = tiny.build(**fields)
    tokens, positions = tiny.ragged([TEXT[:9]])
    with pytest.raises(ValueError, match="one window in all layers"):
        model.clone(scan=True).apply({"params": stack_layers(params)}, tokens, positions)


@pytest.mark.parametrize(
    ("lengths", "window", "dilation"),
    [
        ((9, 4, 1), None, 1),
        ((9, 4, 1), 3, 2),
        ((3, 300, 40), 5, 1),
        pytest.param((9, 4, 1), 5, 1, marks=pytest.mark.slow),
        pytest.param((3, 300, 40), None, 1, marks=pytest.mark.slow),
        pytest.param((3, 300, 40), 3, 2, marks=pytest.mark.slow),
    ],
)
def test_texts_in_one_row_do_not_see_each_other(window, dilation, lengths):
    """Packed, with padding between them, each has the logits that it has alone."""
    model, params = tiny.build(sliding_window=window, dilation=dilation)
    texts = [(np.arange(length) * 7 + length) % 53 for length in lengths]
    tokens, positions = [[0]], [[-1]]
    for gap, text in enumerate(texts):
        tokens += [text, [0] * gap]
        positions += [np.arange(len(text)), [-1] * gap]
    tokens, positions = (np.concatenate(x).astype(np.int32) for x in (tokens, positions))
    logits, _ = tiny.forward(model, params, tokens[None], positions[None])
    together = np.asarray(logits[0])[positions >= 0]
    alone = np.concatenate([tiny.alone(model, params, text) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5 * np.abs(alone).max())


def test_every_place_in_a_text_runs_one_program():
    model, params = tiny.build(n_layers=1)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, token, position, cache):
        return model.apply({"params": params}, token, position, cache)

    cache = init_cache(model.config, 1, 12)
    for position in range(12):
        _, cache = step(params, jnp.array([[position]]), jnp.array([[position]]), cache)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mistral-7b-v0.1", 7_241_732_096),
        pytest.param("mistral-7b-v0.2", 7_241_732_096, marks=pytest.mark.slow),
        ("mistral-7b-v0.3", 7_248_023_552),
    ],
)
def test_released_models_have_their_number_of_parameters(name, count):
    model = Transformer(ModelConfig.from_name(name))
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("tied", [False, True])
def test_init_makes_the_documented_tree(tied):
    model, params = tiny.build(tied=tied)
    tokens = jnp.zeros((1, 1), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)
    made = jax.tree.map(lambda x: x.shape, nn.unbox(variables)["params"])
    assert made == jax.tree.map(lambda x: x.shape, params)
