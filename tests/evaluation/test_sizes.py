"""Equivalent sizes: exact on curves that are known, honest beyond them, near the paper's."""

import math

import pytest

from mistral_jax.evaluation import sizes
from mistral_jax.evaluation.sizes import Point, Scores, equivalent, name_size


def family(*pairs, stderr=None):
    return [Point(f"{size}B", size, score, stderr) for size, score in pairs]


def on_line(size):
    return 10 + 8 * math.log(size)


@pytest.mark.parametrize("size", [7, 8.5, 13, 20, 34, 69.9, 70])
def test_both_estimates_are_exact_on_a_line(size):
    points = family(*((x, on_line(x)) for x in (70, 7, 13)))
    found = equivalent(points, Point("m", 7, on_line(size)))
    assert found.size == pytest.approx(size)
    assert found.line == pytest.approx(size)
    assert found.low == pytest.approx(found.high)
    assert found.monotonic


def test_the_curve_goes_through_its_points_and_is_linear_in_the_logarithm_between():
    points = family((7, 44), (13, 56), (70, 70))
    for point in points:
        assert equivalent(points, point).size == point.size
    found = equivalent(points, Point("m", 7, 63))
    assert found.size == pytest.approx(math.sqrt(13 * 70))
    assert found.low <= found.line <= found.high
    assert found.low <= found.size <= found.high
    assert found.line != pytest.approx(found.size, rel=0.01)


def test_the_standard_error_widens_the_range():
    points = family(*((x, on_line(x)) for x in (7, 13, 70)), stderr=0.3)
    found = equivalent(points, Point("m", 7, on_line(20), 0.4))
    assert found.size == pytest.approx(20)
    assert found.high == pytest.approx(20 * math.exp(0.5 / 8))
    assert found.low == pytest.approx(20 * math.exp(-0.5 / 8))


def test_nothing_is_extrapolated():
    points = family((7, 44), (13, 56), (70, 70))
    above, below = (equivalent(points, Point("m", 7, score)) for score in (70.1, 43.9))
    assert (above.size, above.high) == (math.inf, math.inf)
    assert (below.size, below.low) == (0, 0)
    assert name_size(above.size, points) == "above 70B"
    assert name_size(below.size, points) == "below 7B"
    assert name_size(22.08, points) == "22.1B"
    assert name_size(None, points) == "-"
    near = equivalent(points, Point("m", 7, 69.9, 0.5))
    assert near.high == math.inf
    assert near.size < 70


def test_a_family_whose_scores_fall_has_a_range():
    points = family((7, 40), (13, 60), (34, 50), (70, 70))
    found = equivalent(points, Point("m", 7, 55))
    assert not found.monotonic
    assert found.size == pytest.approx(7 * (13 / 7) ** 0.75)
    assert found.low <= found.size
    assert found.high >= 34 * (70 / 34) ** 0.25 * 0.999
    flat = family((7, 50), (13, 50), (70, 50))
    found = equivalent(flat, Point("m", 7, 50))
    assert (found.size, found.line, found.low, found.high) == (7, None, 7, 70)
    assert not found.monotonic
    falling = equivalent(family((7, 60), (70, 50)), Point("m", 7, 55))
    assert (falling.line, falling.monotonic) == (None, False)


@pytest.mark.parametrize(
    ("points", "model", "message"),
    [
        (family((7, 40)), Point("m", 7, 40), "the family has 1 models; expected at least two"),
        (family((7, 40), (7, 50)), Point("m", 7, 40), "7B and 7B both have 7 billion parameters"),
        (family((7, 40), (0, 50)), Point("m", 7, 40), "the size of 0B is 0; expected a number abo"),
        (family((7, 40), (9, math.nan)), Point("m", 7, 4), "the score of 9B is nan; expected a n"),
        (family((7, 40), (9, 50)), Point("m", 7, math.inf), "the score of m is inf; expected a n"),
    ],
)
def test_what_makes_no_curve_is_refused(points, model, message):
    with pytest.raises(ValueError, match=message):
        equivalent(points, model)


def test_the_published_figures_give_what_the_paper_says():
    """MMLU, reasoning and knowledge to 4 %; of comprehension one of two columns is published."""
    found = {each.name: each for each in sizes.published()}
    assert {name: each.paper for name, each in found.items()} == {
        "MMLU": 23,
        "reasoning": 38,
        "knowledge": 13,
        "comprehension": 21,
    }
    made = {name: equivalent(each.family, each.model) for name, each in found.items()}
    for name in ("MMLU", "reasoning", "knowledge"):
        assert made[name].size == pytest.approx(found[name].paper, rel=0.045)
        assert made[name].low <= found[name].paper <= made[name].high
    assert made["comprehension"].size == pytest.approx(32.9, abs=0.05)
    assert found["comprehension"].missing == ["QuAC"]
    assert found["reasoning"].missing == ["SIQA", "OBQA", "CSQA"]
    assert all(each.note for each in found.values())
    assert all(each.model.size == 7 for each in found.values())


def test_categories_are_means_of_the_columns_that_all_have():
    columns = {"a": (40.0, 0.3), "b": (60.0, 0.4), "c": (1.0, None)}
    small = Scores("small", 7, columns)
    large = Scores("large", 70, {"a": (50.0, 0.3), "b": (70.0, 0.4), "c": (2.0, None)})
    model = Scores("m", 7, {"a": (45.0, 0.3), "b": (65.0, 0.4), "c": (1.5, None), "d": (1.0, None)})
    one, two, three = sizes.compare(
        [large, small], model, {"x": ["a", "b", "d"], "y": ["c"], "z": ["d", "e"]}
    )
    assert (one.columns, one.missing) == (["a", "b"], ["d"])
    assert one.family == [Point("small", 7, 50, 0.25), Point("large", 70, 60, 0.25)]
    assert one.model == Point("m", 7, 55, 0.25)
    assert (two.model.score, two.model.stderr) == (1.5, None)
    assert (three.model, three.family, three.missing) == (None, [], ["d", "e"])


def test_a_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    points = family((7, 44), (13, 56), (70, 70))
    beyond = [
        sizes.Category(name, points, Point("m", 7, score), [], [])
        for name, score in (("above", 90.0), ("below", 10.0), ("within", 60.0))
    ]
    sizes.draw([*sizes.published(), *beyond]).savefig(tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="expected a category with scores"):
        sizes.draw([sizes.Category("z", [], None, [], ["a"])])
