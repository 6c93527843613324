"""What a comparison says in words: no more than its numbers do."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from mae_et.comparison.runs import Point
from mae_et.comparison.speedup import Speedup
from mae_et.comparison.words import findings, times
from tests.comparison.compared import SCORE, compare, run

SLOW, FAST = (0.5, 0.6, 0.7, 0.8), (0.6, 0.8, 0.85, 0.86)


def seeds(group, *curves):
    return [run(f"{group}{seed}", curve, group, seed) for seed, curve in enumerate(curves)]


def said(*runs, target=0.8, **changes):
    return [sentence for _, sentence in findings(compare(*runs, target=target, **changes))]


def test_one_seed_has_no_interval():
    assert said(run("mae", SLOW), run("hog", FAST)) == [
        "hog reached 80.00 % with 0.50 of mae's compute: 2.0× less (one seed each: no interval)."
    ]


def test_interval_and_seeds_are_told():
    # At 80 %: costs 4 and 4.05 against 2 and 2.05, so 1.99 times less, and an interval of one decimal.
    slow, fast = ((0.5, 0.6, 0.7, 0.799, 0.819), SLOW), ((0.6, 0.799, 0.819), FAST)
    (sentence,) = said(*seeds("mae", *slow), *seeds("hog", *fast))
    assert sentence.startswith("hog reached 80.00 % with 0.50 of mae's compute: 1.99× less (95 % interval 1.")
    assert sentence.endswith("2 seeds each).")
    assert "includes 1" not in sentence


def test_interval_that_includes_1_tells_nothing_apart():
    (sentence,) = said(*seeds("mae", SLOW, FAST), *seeds("hog", FAST, (0.5, 0.7, 0.8)))
    assert "it includes 1, so these seeds do not tell the two apart" in sentence


def test_slower_group_is_told_by_what_it_needed():
    (sentence,) = said(run("mae", FAST), run("hog", SLOW))
    assert sentence == "hog needed 2.0× mae's compute to reach 80.00 % (one seed each: no interval)."


def test_intervals_of_slower_groups_are_inverted():
    slow, fast = ((0.5, 0.6, 0.7, 0.799, 0.819), SLOW), ((0.6, 0.799, 0.819), FAST)
    (faster,) = said(*seeds("a", *slow), *seeds("b", *fast))
    (slower,) = said(*seeds("b", *fast), *seeds("a", *slow))
    assert faster.partition("(")[2] == slower.partition("(")[2]


def test_unequal_numbers_of_seeds_are_told():
    (sentence,) = said(*seeds("mae", SLOW), *seeds("hog", FAST, FAST))
    assert "(no interval: 1 seed of mae, 2 seeds of hog)" in sentence


def test_seeds_that_do_not_differ_have_no_interval():
    (sentence,) = said(*seeds("mae", SLOW, SLOW), *seeds("hog", FAST, FAST))
    assert "(no interval: the seeds do not differ)" in sentence


def test_intervals_without_an_end_are_told():
    speedup = Speedup(0.5, 0.0, math.inf, (2, 2), (2, 2))
    comparison = compare(*seeds("mae", FAST, FAST), *seeds("hog", SLOW, SLOW), target=0.8)
    (first, second) = comparison.reached
    ((_, sentence),) = findings(replace(comparison, reached=(first, replace(second, speedup=speedup))))
    assert "hog needed 2.0× mae's compute to reach 80.00 % (95 % interval <0.01 to >100, 2 seeds each" in sentence


def test_seeds_that_never_reach_are_told():
    (sentence,) = said(*seeds("mae", SLOW, SLOW), *seeds("hog", FAST, (0.5, 0.6)))
    assert sentence == (
        "1 of 2 seeds of hog reached 80.00 %; mae reached it at 4 TFLOPs. "
        "Seeds that reach it are a selection, so there is no speed-up to tell."
    )


def test_never_reached():
    assert said(run("mae", SLOW), run("hog", (0.5, 0.75, 0.7))) == [
        "hog did not reach 80.00 %: it came to 75.00 % within 10 TFLOPs; mae reached it at 4 TFLOPs."
    ]
    assert said(run("mae", (0.5,)), run("hog", FAST)) == [
        "hog reached 80.00 % at 2 TFLOPs; mae did not reach it: it came to 50.00 % within 10 TFLOPs."
    ]
    assert said(run("mae", (0.5,)), run("hog", (0.6,))) == [
        "Neither reached 80.00 %: hog came to 60.00 % within 10 TFLOPs, mae came to 50.00 % within 10 TFLOPs."
    ]


def test_what_is_free_has_no_ratio():
    (sentence,) = said(run("mae", SLOW), run("knn", (), scores={SCORE: [Point(0.0, 0.9)]}))
    assert sentence == "knn or mae had 80.00 % before it cost anything, so there is no speed-up to tell."


def test_bounds_are_told_as_such():
    high = run("hog", (0.9, 0.95))
    (sentence,) = said(run("mae", SLOW), high)
    assert sentence == (
        "hog reached 80.00 % with at most 0.25 of mae's compute: at least 4.0× less "
        "(no interval: hog was above it when first scored)."
    )
    (sentence,) = said(high, run("mae", SLOW))
    assert sentence == (
        "mae needed at least 4.0× hog's compute to reach 80.00 % (no interval: hog was above it when first scored)."
    )
    (sentence,) = said(run("mae", SLOW), high, target=0.1)
    assert sentence == "hog and mae were above 10.00 % when first scored, so there is no speed-up to tell."


def test_one_group_is_not_compared():
    (sentence,) = said(*seeds("mae", SLOW, FAST))
    assert sentence.startswith("One group, mae: no costs to compare.")
    assert "86.00 %" in sentence


def test_largest_speedup_comes_first_and_what_never_reached_last():
    groups = [run("mae", SLOW), run("never", (0.1,)), run("hog", (0.5, 0.7, 0.8)), run("hog_et", FAST)]
    assert [group for group, _ in findings(compare(*groups, target=0.8))] == ["hog_et", "hog", "never"]


@pytest.mark.parametrize(
    ("axis", "unit", "expected"),
    [
        ("hours", "hours", "0.50 of mae's time: 2.0× faster"),
        ("images", "images", "0.50 of mae's images: 2.0× fewer"),
        ("fraction", "", "0.50 of mae's share of the budget: 2.0× sooner"),
    ],
)
def test_every_axis_has_its_words(axis, unit, expected):
    (sentence,) = said(run("mae", SLOW), run("hog", FAST), axis=axis, unit=unit)
    assert expected in sentence


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.004, "<0.01"), (0.456, "0.46"), (1.25, "1.25"), (2.44, "2.4"), (1e4, ">100")]
)
def test_ratios_have_the_digits_that_mean_something(ratio, expected):
    assert times(ratio) == expected
