"""Algorithms 1 and 2 against brute force on tables of scores made by hand or at random."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_et.config import ConfigError, load_config
from mae_et.curriculum.search import (
    Candidate,
    candidates_of,
    cell_name,
    cell_stages,
    greedy,
    merged,
    sequential,
)
from mae_et.curriculum.stage import Stage, stage_in_proportion
from mae_et.planning import build_plan

SIZES = (96, 128, 160, 192, 224)


def sides(cell):
    return tuple(candidate.bandwidth[0] for candidate in cell)


def squares(*bandwidths):
    return candidates_of([(side, side) for side in bandwidths])


class Table:
    """Utilities by sides of a cell; remembers what was asked."""

    def __init__(self, utility):
        self.utility, self.asked = utility, []

    def __call__(self, cell):
        self.asked.append(sides(cell))
        return self.utility(sides(cell))


FINAL = Candidate((224, 224))


def test_sequential_by_hand():
    table = {
        (96,): 0.3, (160,): 0.4, (224,): 0.2,
        (160, 96): 0.5, (160, 160): 0.6, (160, 224): 0.7,
        (160, 224, 96): 0.1, (160, 224, 160): 0.9, (160, 224, 224): 0.8,
    }  # fmt: skip
    ask = Table(table.__getitem__)
    found = sequential(4, squares(96, 160, 224), FINAL, ask)
    assert sides(found.cell) == (160, 224, 160, 224)
    # Each candidate of each stage once, after what was chosen: nothing else is in the table.
    assert ask.asked == list(table)
    assert [(t.stage, sides([t.candidate])[0]) for t in found.trials if t.kept] == [(0, 160), (1, 224), (2, 160)]
    assert [t.utility for t in found.trials] == list(table.values())


def test_ties_go_to_the_cheaper_image():
    found = sequential(3, squares(224, 160, 96), FINAL, lambda _cell: 0.5)
    assert sides(found.cell) == (96, 96, 224)
    masked = candidates_of([(224, 224)], [0.6, 0.9, 0.75], [2, 1])
    found = sequential(2, masked, FINAL, lambda _cell: 0.5)
    assert found.cell[0] == Candidate((224, 224), 0.9, 1)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 4), st.lists(st.integers(0, 9), min_size=27, max_size=27), st.integers(1, 3))
def test_sequential_takes_the_first_best_of_every_stage(stages, values, count):
    candidates = squares(*SIZES[:count])

    def utility(cell):
        return values[sum(SIZES.index(side) * 3**place for place, side in enumerate(cell)) % 27]

    found = sequential(stages, candidates, FINAL, Table(utility))
    for stage in range(stages - 1):
        prefix = sides(found.cell[:stage])
        scores = {side: utility((*prefix, side)) for side in SIZES[:count]}
        assert sides(found.cell)[stage] == min(side for side in scores if scores[side] == max(scores.values()))
    assert found.cell[-1] == FINAL
    assert len(found.trials) == (stages - 1) * count


def smallest_that_keep(stages, utility, allowed):
    """Algorithm 1 as it is written: of all candidates the smallest with which nothing is lost, stage by stage."""
    found = [224] * stages
    for stage in reversed(range(stages - 1)):
        keep = [b for b in SIZES if utility((*[b] * (stage + 1), *found[stage + 1 :])) >= allowed]
        found[: stage + 1] = [min(keep)] * (stage + 1)
    return tuple(found)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(2, 6),
    st.lists(st.floats(0, 3), min_size=6, max_size=6),
    st.floats(0, 8),
)
def test_greedy_is_algorithm_1_where_smaller_images_never_help(stages, weights, margin):
    """Utilities that fall as any stage shrinks: then going down from the last stage's size misses nothing."""

    def utility(cell):
        return -sum(weight * SIZES[::-1].index(side) for weight, side in zip(weights, cell))

    ask = Table(utility)
    found = greedy(stages, squares(*SIZES), FINAL, ask, margin)
    assert sides(found.cell) == smallest_that_keep(stages, utility, utility((224,) * stages) - margin)
    assert list(sides(found.cell)) == sorted(sides(found.cell))
    # The paper: about N + M - 1 trainings. No training is made twice.
    assert len(ask.asked) == len(set(ask.asked)) == len(found.trials) <= stages + len(SIZES) - 1


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.tuples(*[st.sampled_from(SIZES)] * 3), st.integers(0, 5), max_size=60))
def test_greedy_loses_nothing_whatever_the_utilities(table):
    def utility(cell):
        return table.get(cell, 3)

    ask = Table(utility)
    found = greedy(3, squares(*SIZES), FINAL, ask)
    assert utility(sides(found.cell)) >= utility((224, 224, 224))
    assert len(ask.asked) == len(set(ask.asked)) <= 3 + len(SIZES) - 1


def test_greedy_by_hand():
    good = {(224, 224, 224), (192, 192, 224), (160, 160, 224), (128, 160, 224)}
    ask = Table(lambda cell: float(cell in good))
    found = greedy(3, squares(96, 128, 160, 192), FINAL, ask)
    assert ask.asked == [
        (224, 224, 224), (192, 192, 224), (160, 160, 224), (128, 128, 224), (128, 160, 224), (96, 160, 224)
    ]  # fmt: skip
    assert sides(found.cell) == (128, 160, 224)
    assert [t.kept for t in found.trials] == [True, True, True, False, True, False]
    # With a margin that allows everything all but the last stage are at the smallest size.
    assert sides(greedy(3, squares(96, 224), FINAL, ask, margin=1).cell) == (96, 96, 224)


def test_candidates_from_the_cheapest_on():
    found = candidates_of([(224, 224), (96, 192), (96, 96)], [0.6, 0.75], [2, 1])
    names = [f"{size}m{mask}{scale}" for size, mask, scale in product(["96", "96x192", "224"], [0.75, 0.6], ["", "k2"])]
    assert [candidate.name for candidate in found] == names
    assert cell_name((found[0], found[-1])) == "96m0.75-224m0.6k2"
    assert [candidate.name for candidate in squares(160, 96, 160)] == ["96", "160"]


@pytest.mark.parametrize("length", [0, 1, 4])
def test_stages_of_a_cell(length):
    small = Candidate((96, 96), 0.6, 2)
    stages = cell_stages((small,) * length, 5, FINAL)
    assert [stage.end for stage in stages] == [0.2, 0.4, 3 / 5, 0.8, 1.0]
    assert [stage.bandwidth[0] for stage in stages] == [96] * length + [224] * (5 - length)
    assert [(s.mask_ratio, s.batch_scale) for s in stages] == [(0.6, 2)] * length + [(None, 1)] * (5 - length)
    joined = merged(stages)
    assert [stage.end for stage in joined] == ([length / 5] if length else []) + [1.0]
    assert joined[-1] == stages[-1]
    assert len(merged(cell_stages((Candidate((224, 224), 0.6),), 2, FINAL))) == 2


def test_a_found_curriculum_in_one_word(tmp_path):
    path = tmp_path / "found.yaml"
    path.write_text("size: 28\naxis: epoch\nstages:\n- {end: 0.4, bandwidth: 12}\n- {end: 1.0, bandwidth: 28}\n")
    config = load_config(None, [f"curriculum={path}", "curriculum.lr_cap=1", "target.kind=pixel"])
    stages = config.curriculum.stages
    assert stages is not None
    assert [(stage.end, stage.bandwidth) for stage in stages] == [(0.4, 12), (1.0, 28)]
    assert (config.curriculum.axis, config.curriculum.size, config.curriculum.lr_cap) == ("epoch", 28, 1)
    # Of 28 px, 12 are as 96 of 224.
    assert [stage.bandwidth for stage in build_plan(config, 10_000).stages] == [(96, 96), (224, 224)]
    with pytest.raises(ConfigError, match=r"there is no curriculum file .*gone\.yaml"):
        load_config(None, [f"curriculum={tmp_path / 'gone.yaml'}"])
    path.write_text("epochs: 3\nstages: []\n")
    with pytest.raises(ConfigError, match=r"has stages, and may have axis and size; this one has epochs, stages"):
        load_config(None, [f"curriculum={path}"])


@pytest.mark.parametrize(
    ("bandwidth", "found_for", "size", "stride", "expected"),
    [
        ((12, 12), (28, 28), (224, 224), 16, (96, 96)),
        ((20, 20), (28, 28), (224, 224), 16, (160, 160)),
        ((96, 96), (224, 224), (28, 28), 2, (12, 12)),
        ((96, 96), (224, 224), (32, 32), 2, (14, 14)),  # 13.7 px
        ((96, 96), (224, 224), (224, 448), 32, (96, 192)),
        ((24, 24), (28, 28), (224, 224), 128, (256, 256)),  # 192 px is halfway; the larger one
        ((2, 2), (28, 28), (32, 32), 16, (16, 16)),  # never nothing
    ],
)
def test_stages_in_proportion(bandwidth, found_for, size, stride, expected):
    stage = Stage(0.5, bandwidth, 0.6, batch_scale=2)
    assert stage_in_proportion(stage, found_for, size, stride) == Stage(0.5, expected, 0.6, batch_scale=2)
