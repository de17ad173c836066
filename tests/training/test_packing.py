"""Laws of rows: every target once an epoch, with its weight; one order, however it is read."""

import collections
import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mistral_jax.training.data import batches, packing
from mistral_jax.training.data.records import Example, Pair
from mistral_jax.training.loss import cross_entropy

CONTEXT = 16


def example(rng, length, learnt="answers"):
    """An example whose every token is told from any other's."""
    example.next += length
    tokens = np.arange(example.next - length, example.next, dtype=np.int32)
    weights = np.ones(length, np.float32)
    if learnt == "answers":
        weights = rng.choice(np.float32([0, 0.5, 1]), length)
        weights[1:2] = 0  # never learnt from end to end, as a text is
        weights[-1] = 1
    weights[0] = 0
    return Example(tokens, weights)


example.next = 1


@pytest.fixture
def examples():
    """Examples of all lengths that fit, and texts of any length."""
    rng = np.random.default_rng(0)
    answers = [example(rng, int(n)) for n in rng.integers(3, CONTEXT + 2, 60)]
    texts = [example(rng, int(n), "all") for n in rng.integers(2, 5 * CONTEXT, 20)]
    order = rng.permutation(80)
    return [(answers + texts)[i] for i in order]


def lessons(batches):
    """What rows teach: how often each (tokens up to here, target, weight) occurs.

    The tokens of one text are those whose index less their position is one number.
    """
    found = collections.Counter()
    for batch in batches:
        arrays = (batch.tokens, batch.positions, batch.targets, batch.weights)
        flat = [x.reshape(-1, x.shape[-1]) for x in arrays]
        for tokens, positions, targets, weights in zip(*flat, strict=True):
            texts = collections.defaultdict(list)
            for index in np.flatnonzero(positions >= 0):
                start = index - positions[index]
                assert len(texts[start]) == positions[index]  # rises by one from 0
                texts[start].append(int(tokens[index]))
                if targets[index] >= 0:
                    lesson = tuple(texts[start]), int(targets[index]), float(weights[index])
                    found[lesson] += 1
            empty = positions < 0
            assert (targets[empty] == -1).all()
            assert (tokens[empty] == 0).all()
            assert (weights[targets < 0] == 0).all()
            assert (weights[targets >= 0] > 0).all()
    return found


def expected_lessons(examples, context):
    found = collections.Counter()
    for one in examples:
        is_text = one.weights[1:].all()
        for i in range(1, len(one.tokens)):
            start = (i - 1) // context * context if is_text else 0
            if one.weights[i] and i - start <= context:
                before = tuple(one.tokens[start:i].tolist())
                found[before, int(one.tokens[i]), float(one.weights[i])] += 1
    return found


def equal(a, b):
    chex.assert_trees_all_equal(a, b, strict=True)


# Rows


@pytest.mark.parametrize("pack", [True, False])
def test_every_target_is_learnt_once_after_the_tokens_of_its_own_text(tmp_path, examples, pack):
    summary = packing.write_rows(tmp_path / "rows", iter(examples), CONTEXT, pack=pack)
    written = packing.PackedRows(tmp_path / "rows")
    found = lessons(batches.in_order(written, 4))
    assert found == expected_lessons(examples, CONTEXT)
    assert written.summary == summary
    assert summary.rows == len(written)
    assert summary.examples == 80
    assert summary.learnt == found.total()
    assert summary.tokens == sum(len(one.tokens) - 1 for one in examples)
    assert summary.too_long == sum(len(one.tokens) > CONTEXT + 1 for one in examples) > 5
    assert summary.left_out == 0


def test_packing_fills_the_rows(tmp_path, examples):
    packed = packing.write_rows(tmp_path / "packed", examples, CONTEXT)
    single = packing.write_rows(tmp_path / "single", examples, CONTEXT, pack=False)
    assert packed.fill > 0.9
    assert single.fill < 0.8
    assert packed.tokens == single.tokens


def test_the_seed_alone_decides_which_examples_share_a_row(tmp_path, examples):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        packing.write_rows(tmp_path / name, examples, CONTEXT, seed=seed)
    a, b, c = ((tmp_path / name / "rows.bin").read_bytes() for name in "abc")
    assert a == b != c


def test_what_is_too_long_and_no_text_is_cut_at_its_end_or_left_out(tmp_path):
    rng = np.random.default_rng(0)
    fits, long, late = (example(rng, n) for n in (CONTEXT + 1, CONTEXT + 2, CONTEXT + 9))
    long.weights[5] = 1
    late.weights[: CONTEXT + 1] = 0
    summary = packing.write_rows(tmp_path / "rows", [fits, long, late], CONTEXT)
    assert (summary.examples, summary.too_long, summary.left_out, summary.rows) == (3, 2, 1, 2)
    written = packing.PackedRows(tmp_path / "rows")
    assert lessons(batches.in_order(written, 1)) == expected_lessons([fits, long], CONTEXT)


def test_nothing_to_learn_is_an_error_that_leaves_nothing_behind(tmp_path):
    late = example(np.random.default_rng(0), 40)
    late.weights[:-1] = 0
    nothing = "^1 examples have nothing to be learnt in their first 16 tokens"
    for examples, pairs, message in (
        ([], False, "^there are no examples; expected at least one record"),
        ([late], False, nothing),
        ([Pair(late, late)], True, nothing),
    ):
        with pytest.raises(ValueError, match=message):
            packing.write_rows(tmp_path / "rows", examples, CONTEXT, pairs=pairs)
    assert not list(tmp_path.iterdir())


def test_a_pair_has_a_row_of_its_own_with_the_chosen_first(tmp_path):
    rng = np.random.default_rng(0)
    pairs = [Pair(example(rng, int(n)), example(rng, 21 - int(n))) for n in rng.integers(4, 18, 9)]
    late = example(rng, 30)
    late.weights[: CONTEXT + 1] = 0
    summary = packing.write_rows(
        tmp_path / "rows", [*pairs, Pair(pairs[0].chosen, late)], CONTEXT, pairs=True
    )
    assert (summary.examples, summary.too_long, summary.left_out, summary.rows) == (10, 1, 1, 9)
    (batch,) = batches.in_order(packing.PackedRows(tmp_path / "rows"), 9)
    assert batch.tokens.shape == (9, 2, CONTEXT)
    for side, name in enumerate(("chosen", "rejected")):
        one_side = jax.tree.map(lambda x, side=side: x[:, side], batch)
        assert lessons([one_side]) == expected_lessons([getattr(p, name) for p in pairs], CONTEXT)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_examples(tmp_path):
    program = """
import resource, sys
import numpy as np
from mistral_jax.training.data import packing
from mistral_jax.training.data.records import Example
def anonymous():  # pages of files do not count: the system takes them back
    return int(next(l.split()[1] for l in open("/proc/self/status") if l.startswith("RssAnon")))
def examples(count):
    for i in range(count):
        if i % 1000 == 0:
            peak[0] = max(peak[0], anonymous())
        yield Example(np.full(1000, 7, np.int32), np.ones(1000, np.float32))
peak = [0]
packing.write_rows(sys.argv[1] + "/first", examples(2000), 1024)
peak[0] = 0
before = anonymous()
summary = packing.write_rows(sys.argv[1] + "/rows", examples(8000), 1024)
print(max(peak[0], anonymous()) - before, summary.tokens * 16 // 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True
    )
    growth, written = map(int, done.stdout.split())
    assert written > 100_000  # KiB
    assert growth < 40_000


def test_the_loss_of_packed_rows_is_that_of_every_example_alone(tmp_path):
    model, params = tiny.build()

    @jax.jit
    def loss(tokens, positions, targets, weights):
        logits, _ = model.apply({"params": params}, tokens, positions)
        return jnp.stack(cross_entropy(logits, targets, weights))

    rng = np.random.default_rng(0)
    lengths = rng.choice([3, 12, 25], 20)  # few, as each is compiled
    examples = [example(rng, int(length), rng.choice(["all", "answers"])) for length in lengths]
    examples = [Example(one.tokens % 53, one.weights) for one in examples]
    alone = np.zeros(2)
    for one in examples:
        tokens, weights = one.tokens[None], one.weights[None]
        positions = np.arange(len(one.tokens) - 1, dtype=np.int32)[None]
        alone += loss(tokens[:, :-1], positions, tokens[:, 1:], weights[:, 1:])
    for name, pack in (("packed", True), ("single", False)):
        packing.write_rows(tmp_path / name, examples, 32, pack=pack)
        written = packing.PackedRows(tmp_path / name)
        (batch,) = batches.in_order(written, len(written))
        found = loss(batch.tokens, batch.positions, batch.targets, batch.weights)
        np.testing.assert_allclose(found, alone, rtol=1e-5)


# Batches


@pytest.fixture
def written(tmp_path, examples):
    packing.write_rows(tmp_path / "rows", examples, CONTEXT)
    return packing.PackedRows(tmp_path / "rows")


def take(written, steps, **options):
    return list(batches.feed(written, **{"batch_rows": 4, "seed": 3, "steps": steps, **options}))


def test_an_epoch_reads_every_row_once_and_in_another_order(written):
    count = len(written)
    by_one = take(written, range(3 * count), batch_rows=1)
    epochs = [by_one[epoch * count : (epoch + 1) * count] for epoch in range(3)]
    whole = lessons(batches.in_order(written, 1))
    assert [lessons(epoch) for epoch in epochs] == [whole] * 3
    orders = [[batch.tokens.tobytes() for batch in epoch] for epoch in epochs]
    assert len({tuple(order) for order in orders}) == 3
    assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(orders[0]))}
    other = take(written, range(count), batch_rows=1, seed=4)
    assert [batch.tokens.tobytes() for batch in other] not in orders
    # Batches of four are the same rows, over the ends of epochs too.
    assert count % 4
    for step, batch in enumerate(take(written, range(3 * count // 4))):
        equal(batch, jax.tree.map(lambda *x: np.concatenate(x), *by_one[4 * step : 4 * step + 4]))


def test_a_run_that_goes_on_sees_what_it_would_have_seen(written):
    whole = take(written, range(40))
    for start in (1, 7, 39, 40):
        equal(take(written, range(start, 40)), whole[start:])


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_rows_of_all_processes_are_the_whole(written, processes):
    parts = [range(p * 4 // processes, (p + 1) * 4 // processes) for p in range(processes)]
    reads = [
        (take(written, range(20)), [take(written, range(20), own=part) for part in parts]),
        (
            list(batches.in_order(written, 4)),
            [list(batches.in_order(written, 4, own=part)) for part in parts],
        ),
    ]
    for whole, shares in reads:
        for batch, *own in zip(whole, *shares, strict=True):
            for part, share in zip(parts, own, strict=True):
                equal(*(jax.tree.map(lambda x, part=part: x[part], b) for b in (batch, share)))
                others = [row for row in range(4) if row not in part]
                assert (share.positions[others] == -1).all()
                assert (share.targets[others] == -1).all()


def test_rows_in_order_are_filled_up_with_padding(written):
    found = list(batches.in_order(written, 4))
    assert len(written) % 4
    assert {batch.tokens.shape for batch in found} == {(4, CONTEXT)}
    tokens = np.concatenate([batch.tokens for batch in found])
    np.testing.assert_array_equal(tokens[: len(written)], [row["tokens"] for row in written])
    assert (found[-1].positions[len(written) % 4 :] == -1).all()


def test_batches_are_int32_and_float32(written):
    (batch,) = take(written, range(1))
    kinds = [x.dtype for x in (batch.tokens, batch.positions, batch.targets, batch.weights)]
    assert kinds == [np.int32] * 3 + [np.float32]
    assert all(x.flags.c_contiguous and x.flags.writeable for x in jax.tree.leaves(batch))


def test_one_row_is_an_epoch_and_no_step_is_no_batch(tmp_path):
    packing.write_rows(tmp_path / "rows", [example(np.random.default_rng(0), 9)], CONTEXT)
    written = packing.PackedRows(tmp_path / "rows")
    assert len(take(written, range(3))) == 3
    assert take(written, range(5, 5)) == []


def test_without_grain_a_sentence_says_how_to_install_it(tmp_path, examples, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ValueError, match=r"pip install 'mistral-jax-flax\[train\]'"):
        packing.write_rows(tmp_path / "rows", examples, CONTEXT)


def test_no_process_is_forked(examples, tmp_path, monkeypatch):
    """A program with threads, as JAX has, does not survive that."""

    def refuse(*_):
        raise AssertionError("a process was forked")

    monkeypatch.setattr(os, "fork", refuse)
    packing.write_rows(tmp_path / "rows", examples, CONTEXT)
    found = packing.PackedRows(tmp_path / "rows")
    assert len(list(batches.feed(found, batch_rows=2, seed=0, steps=range(3)))) == 3


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("rows.bin", b""),
        ("rows.bin", b"x" * 1000),
        ("rows.json", b"{}"),
        ("rows.json", b"[]"),
        ("rows.json", b'{"context": 4, "pairs": false, "rows": 1e9}'),
    ],
)
def test_damaged_rows_are_named(examples, tmp_path, name, contents):
    packing.write_rows(tmp_path / "rows", examples, CONTEXT)
    (tmp_path / "rows" / name).write_bytes(contents)
    with pytest.raises(ValueError, match=name):
        packing.PackedRows(tmp_path / "rows")
