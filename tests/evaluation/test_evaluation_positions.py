"""The loss by position: what the buckets hold, and that it is flat past the window."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

import mistral_jax as mj
from mistral_jax.cli.evaluate import print_results
from mistral_jax.evaluation import choices, perplexity, positions
from mistral_jax.evaluation.perplexity import loss, row_losses, token_losses
from mistral_jax.evaluation.positions import by_position, plot, turns


@pytest.fixture
def losses():
    rng = np.random.default_rng(0)
    return [rng.gamma(2, size=length).astype(np.float32) for length in (1, 19, 40, 23)]


@pytest.mark.parametrize("count", [None, 1, 3, 7, 40, 100])
def test_every_token_is_in_the_one_bucket_of_its_position(losses, count):
    buckets = by_position(losses, count)
    assert buckets[0].first_position == 1
    assert buckets[-1].last_position == 40
    for before, after in itertools.pairwise(buckets):
        assert after.first_position == before.last_position + 1
    for first, last, tokens, mean, error in buckets:
        found = [float(x) for row in losses for p, x in enumerate(row, 1) if first <= p <= last]
        assert tokens == len(found)
        assert mean == pytest.approx(np.mean(found))
        if tokens > 1:
            assert error == pytest.approx(np.std(found, ddof=1) / math.sqrt(tokens))
        else:
            assert error is None
    widths = [bucket.last_position - bucket.first_position + 1 for bucket in buckets]
    if count is None:
        assert widths == [1, 2, 4, 8, 16, 9]
    else:
        assert len(set(widths[:-1])) <= 1
        assert len(buckets) <= count


def test_no_buckets_are_refused(losses):
    with pytest.raises(ValueError, match="0 buckets of positions; expected at least 1"):
        by_position(losses, 0)


def test_turns_put_every_token_of_a_circle_into_every_bucket_once():
    ids = list(range(100, 127))
    rows = turns(ids, 12, 3)
    assert rows[1] == [*range(104, 112), *range(100, 104)]
    for circle in (rows[:3], rows[3:]):
        for bucket in range(3):
            found = [token for row in circle for token in row[4 * bucket : 4 * bucket + 4]]
            assert sorted(found) == sorted(circle[0])
    assert sorted(rows[0] + rows[3]) == ids[:24]
    assert turns(ids, 28, 4) == []


@pytest.mark.slow
def test_the_loss_is_flat_past_the_window():
    """Each token of a text is read at eight distances from the beginning, so buckets differ in
    these alone: rows begin at every eighth of a text that goes on from its end to its beginning.

    A layer sees 128 tokens, and four layers by way of each other 4 * 127 + 1: past these, equal
    text has equal losses to float32's rounding. Between, it reaches a token through other tokens
    only, which here was worth a thousandth of a nat; without a window, the loss would be 1.3 more.
    """
    model, params, tokenizer = mj.load(dtype="float32")
    window, span = 128, 4 * 127 + 1
    assert model.config.windows == (window,) * 4
    with open(dataclasses.__file__, encoding="utf-8") as file:
        ids = tokenizer.encode(file.read())[: 8 * window]
    rows = [[tokenizer.bos_id, *row] for row in turns(ids, len(ids), 8)]
    buckets = by_position(row_losses(model, params, rows), 8)
    within, *past = [bucket.loss for bucket in buckets]
    assert [bucket.last_position for bucket in buckets] == [window * i for i in range(1, 9)]
    assert within > past[0] + 0.1
    assert past == pytest.approx([past[-1]] * 7, abs=1e-2)
    unseen = [bucket.loss for bucket in buckets if bucket.first_position > span]
    assert len(unseen) == 4
    assert unseen == pytest.approx([past[-1]] * 4, abs=1e-5)


def test_losses_of_texts_add_up_to_their_scores():
    model, params, tokenizer = mj.load(dtype="float32")
    texts = ["import os\n", "def f(x):\n    return x", "Straße 日本"]
    found = token_losses(model, params, tokenizer, texts, batch=2)
    scores = [mj.score(model, params, tokenizer, text) for text in texts]
    for text, own, score in zip(texts, found, scores, strict=True):
        alone = loss([text], [own])
        assert (alone.tokens, alone.bytes) == (score.tokens, score.bytes)
        # Each token's is off by 1e-5 at most.
        assert alone.nats == pytest.approx(-score.logprob, abs=1e-5 * score.tokens)
        assert alone.bits_per_byte == pytest.approx(score.bits_per_byte, rel=1e-5)
        assert math.log(alone.perplexity) == pytest.approx(alone.nats / alone.tokens)
    whole = loss(texts, found)
    first, *others = (loss([text], [own]) for text, own in zip(texts, found, strict=True))
    assert sum(others, first) == dataclasses.replace(whole, nats=pytest.approx(whole.nats))
    assert whole.documents == 3


def test_a_plot_has_the_buckets_and_marks_the_windows(losses, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    save = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, target: (drawn.append(self), save(self, target))
    )
    config = dataclasses.replace(mj.ModelConfig.from_name("mistral-7b-v0.1"), num_layers=3)
    config = dataclasses.replace(config, sliding_window=(8, None, 32))
    buckets = by_position(losses)
    plot(buckets, config, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    plot(by_position(losses, 4), config, tmp_path / "loss.png")
    assert [figure.axes[0].get_xscale() for figure in drawn] == ["log", "linear"]
    (axes,) = drawn[0].axes
    curve, *rest = axes.lines
    assert [y for _, y in curve.get_xydata()] == [bucket.loss for bucket in buckets]
    assert {8, 32} <= {line.get_xdata()[0] for line in rest if len(line.get_xdata()) == 2}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "window of 8",
        "window of 32",
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_refused(value):
    rows = [np.float32([1.0]), np.float32([2.0, value])]
    question = choices.Question("x", ("a", "b"), 0)
    for judge in (
        lambda: positions.by_position(rows),
        lambda: perplexity.loss(["a", "b"], rows),
        lambda: choices.accuracy([question] * 2, rows),
    ):
        with pytest.raises(ValueError, match="text 2 has a token whose probability is not finite"):
            judge()


def test_a_report_is_valid_json_whatever_was_measured(capsys):
    loss = perplexity.Loss(documents=1, tokens=1, bytes=1, nats=1e6)
    print_results([{"perplexity": loss.perplexity, "stderr": math.nan, "loss": 1.5}], as_json=True)
    assert capsys.readouterr().out == '{"perplexity": null, "stderr": null, "loss": 1.5}\n'
