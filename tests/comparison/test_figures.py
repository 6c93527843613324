"""Figures of comparisons: what is drawn, and that a page can hold them."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from mae_et.comparison.figures import (
    COLOURS,
    NARROW,
    WIDE,
    loss_figure,
    mean_curve,
    rate_figure,
    score_figure,
    spans_decades,
    style_of,
)
from mae_et.comparison.runs import Point, StageSpan
from tests.comparison.compared import SCORE, STAGES, compare, run


@pytest.fixture(scope="module")
def comparison():
    return compare(
        run("mae0", (0.5, 0.6, 0.7), "mae", 0),
        run("mae1", (0.52, 0.61, 0.72), "mae", 1),
        run("hog", (0.6, 0.7, 0.8), stages=STAGES),
        target=0.7,
    )


def words(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_mean_is_over_what_all_seeds_have():
    long, short = [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)], [(0.5, 3.0), (2.5, 5.0)]
    assert mean_curve([long]) == long
    # Straight between its points the second has 3.5 at 1 and 4.5 at 2.
    assert mean_curve([long, short]) == [(1, pytest.approx(2.25)), (2, pytest.approx(3.25))]
    assert mean_curve([[(0, 1.0)], [(1, 1.0), (2, 1.0)]]) == []


def test_mean_of_equally_many_points_ends_where_they_end():
    """Hours of the same step differ from seed to seed."""
    assert mean_curve([[(1.0, 0.5), (2.0, 0.8)], [(1.2, 0.7), (2.4, 1.0)]]) == [
        (pytest.approx(1.1), pytest.approx(0.6)),
        (pytest.approx(2.2), pytest.approx(0.9)),
    ]


def test_styles_differ_beyond_the_palette():
    assert len({style_of(number) for number in range(36)}) == 36


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_score_figure(comparison, width):
    svg = score_figure(comparison, width).svg
    ElementTree.fromstring(svg)  # a browser forgives what a parser does not
    assert f'viewBox="0 0 {width} ' in svg
    assert {"12", "20", "28", "training compute, TFLOPs", "accuracy of a logistic probe, %"} <= set(words(svg))
    assert f"var(--c0,{COLOURS[0]})" in svg
    assert f"var(--c1,{COLOURS[1]})" in svg
    assert not re.search(r"http|<script|<image|<style|xlink|DejaVu|<metadata|(?<!,)#(0072b2|d55e00)", svg)


def test_figures_of_one_page_share_no_ids(comparison):
    figures = [score_figure(comparison), score_figure(comparison, NARROW), score_figure(comparison, log=True)]
    figures += [drawn for group in ("mae", "hog") if (drawn := loss_figure(comparison, group))]
    ids = [name for drawn in figures for name in re.findall(r'\bid="([^"]+)"', drawn.svg)]
    assert len(figures) == 5
    assert len(ids) == len(set(ids)) > 10
    for drawn in figures:
        assert set(re.findall(r'(?:href="|url\()#([-\w]+)', drawn.svg)) <= set(re.findall(r'\bid="([^"]+)"', drawn.svg))


def test_seeds_are_drawn_beside_their_mean(comparison):
    """Two seeds and a mean of one group, one line of the other, and the dashed one: lines by their widths."""
    svg = score_figure(comparison).svg
    lines = [float(width) for width in re.findall(r"stroke-width: ([\d.]+); stroke-linecap: square", svg)]
    assert lines.count(2.6) == 2
    seeds = re.findall(r"stroke-opacity: 0.55; stroke-linecap: square", svg)
    assert len(seeds) == 2


def test_log_axis_leaves_out_what_is_free():
    points = [Point(0.0, 0.3), Point(0.5, 0.5), Point(10.0, 0.8)]
    comparison = compare(run("mae", (), scores={SCORE: points}), run("hog", (0.5, 0.8)), target=0.8)
    assert spans_decades(comparison)
    assert "left out: 1." in score_figure(comparison, log=True).note
    assert not score_figure(comparison).note


def test_loss_is_never_averaged_over_a_boundary():
    """Losses of 5 before the boundary and of 1 after it, within one bin of costs: no point may lie between."""
    stages = (StageSpan("12", 0, 2.02), StageSpan("28", 2.02, 10))
    losses = [(step / 1000, 5.0 if step <= 2020 else 1.0) for step in range(1, 10001)]
    hog = run("hog", (0.5,), stages=stages, curves={"train/loss": losses})
    drawn = loss_figure(compare(hog, target=0.5), "hog")
    assert drawn is not None
    assert {"B 12", "B 28"} <= set(words(drawn.svg))
    paths = re.findall(r'<path d="([^"]*)" clip-path[^>]*stroke-width: 2.2', drawn.svg)
    heights = [{point.split()[2] for point in path.strip().splitlines()} for path in paths]
    assert [len(height) for height in heights] == [1, 1]
    assert heights[0] != heights[1]


def test_seeds_of_unlike_clocks_have_a_mean_loss():
    """The second seed's hours are twice the first's, so few of their costs are near each other."""
    losses = [[(pace * step, 1.0) for step in range(1, 11)] for pace in (0.5, 1.0)]
    seeds = [run(f"a{seed}", (0.5,), "a", seed, curves={"train/loss": curve}) for seed, curve in enumerate(losses)]
    drawn = loss_figure(compare(*seeds, target=0.5), "a")
    assert drawn is not None
    (path,) = re.findall(r'<path d="([^"]*)" clip-path[^>]*stroke-width: 2.2', drawn.svg)
    assert len(path.strip().splitlines()) == 10


def test_first_losses_that_tower_are_told(comparison):
    drawn = loss_figure(comparison, "mae")
    assert drawn is not None
    assert drawn.note == "The first losses, up to 1, lie above."


def test_what_was_not_logged_is_not_drawn():
    comparison = compare(run("knn", (0.5,), curves={}), target=0.5)
    assert loss_figure(comparison, "knn") is None
    assert rate_figure(comparison) is None


def test_what_costs_nothing_is_drawn_at_zero():
    """Scores of a frozen encoder."""
    free = run("knn", (), curves={"train/loss": [(0.0, 1.0)]}, scores={SCORE: [Point(0.0, 0.8)]}, total=0.0)
    comparison = compare(free, run("other", (0.5, 0.6)), target=0.8)
    assert "accuracy of a logistic probe, %" in words(score_figure(comparison).svg)
    assert loss_figure(comparison, "knn") is None
    assert score_figure(compare(free, target=0.8)).svg


def test_schedule_is_drawn(comparison):
    svg = rate_figure(comparison)
    assert svg is not None
    assert "learning rate" in words(svg)
