"""Plans against the papers' published totals, and the properties that every plan has."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest

from mae_et.curriculum import (
    AreaCost,
    Curriculum,
    LearningRate,
    MAECost,
    MeasuredCost,
    Plan,
    Stage,
    TransformerShape,
)
from mae_et.curriculum.cost import Geometry
from mae_et.curriculum.presets import PRESETS

IMAGENET = 1_281_167
VIT_BASE_HOG = MAECost(TransformerShape(768, 12), TransformerShape(512, 8), patch_values=768, target_values=108)


def paper_plan(cost=None, **changes) -> Plan:
    arguments = {"epochs": 400, "images": IMAGENET, "batch": 4096, "mask_ratio": 0.75, "cost": cost}
    return Curriculum.preset("efficienttrain_pp").plan(**{**arguments, **changes})


def test_deit_schedule_has_the_published_number_of_steps():
    plan = Curriculum.preset("efficienttrain_pp_deit").plan(epochs=200, images=IMAGENET, batch=4096)
    assert plan.epoch_images == 312 * 4096
    # The released script rounds epochs instead of steps and gets 146,328.
    assert abs(plan.total_steps - 146_336) <= 2
    assert plan.equivalent_epochs == pytest.approx(200.0, abs=0.01)


def test_passes_over_imagenet_accounted_by_area():
    plan = paper_plan(AreaCost())
    assert [round(stage.passes, 1) for stage in plan.stages] == [435.6, 313.6, 160.0]
    assert plan.equivalent_epochs == pytest.approx(400.0, abs=0.01)


def vit_multiply_adds(tokens: int, width: int, depth: int) -> int:
    """Derived once more, from the layers: qkv, scores, weighted sum, projection and a 4x MLP on `tokens` tokens."""
    qkv, projection, mlp = 3 * width * width, width * width, 2 * 4 * width * width
    scores_and_sum = 2 * tokens * width
    return depth * tokens * (qkv + projection + mlp + scores_and_sum)


def test_passes_over_imagenet_accounted_by_the_models_multiply_adds():
    def image(visible: int, tokens: int) -> int:
        encoder = visible * 768 * 768 + vit_multiply_adds(visible + 1, 768, 12)
        decoder = (visible + 1) * 768 * 512 + vit_multiply_adds(tokens + 1, 512, 8)
        return encoder + decoder + (tokens - visible) * 512 * 108

    costs = [image(9, 36), image(25, 100), image(49, 196)]
    expected = [share * 400 * costs[-1] / cost for share, cost in zip((0.2, 0.4, 0.4), costs)]
    plan = paper_plan(VIT_BASE_HOG)
    assert [stage.cost_per_image for stage in plan.stages] == costs
    # One step is 1/312 of a pass, so rounding to whole steps moves a pass by at most half of that.
    assert [stage.passes for stage in plan.stages] == pytest.approx(expected, abs=0.5 / 312)
    assert [round(stage.passes, 1) for stage in plan.stages] == [426.8, 315.9, 160.0]


def test_epoch_axis_of_efficienttrain():
    plan = Curriculum.preset("efficienttrain").plan(epochs=300, images=IMAGENET, batch=4096)
    assert [stage.bandwidth for stage in plan.stages] == [(160, 160), (192, 192), (224, 224)]
    assert [round(stage.passes, 2) for stage in plan.stages] == [180.0, 60.0, 60.0]
    expected = 180 * (160 / 224) ** 2 + 60 * (192 / 224) ** 2 + 60
    assert plan.equivalent_epochs == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.2, 0.3])
def test_learning_rate_jumps_at_no_stage_join(preset, warmup):
    rate = LearningRate(peak=1e-3, warmup=warmup, minimum=1e-6)
    plan = Curriculum.preset(preset).plan(epochs=3, images=50_000, batch=256, mask_ratio=0.75, learning_rate=rate)
    rates = [plan.at(step).learning_rate for step in range(plan.total_steps)]
    changes = [abs(b - a) for a, b in pairwise(rates)]
    for join in plan.boundaries[1:]:
        neighbours = changes[join - 3 : join - 1] + changes[join : join + 2]
        # The slope of the cosine changes by less than one part in a hundred over a few steps of this plan; a join
        # that coincides with the end of warm-up changes no faster than warm-up does.
        assert changes[join - 1] <= 1.01 * max(neighbours)


def test_learning_rate_is_maes():
    plan = Curriculum.preset("baseline").plan(
        epochs=400, images=IMAGENET, batch=4096, learning_rate=LearningRate(2.4e-3, warmup=0.1)
    )
    for step in (0, 100, 12_479, 12_480, 60_000, 124_799):
        epoch = step / 312
        expected = 2.4e-3 * (epoch / 40 if epoch < 40 else 0.5 * (1 + math.cos(math.pi * (epoch - 40) / 360)))
        assert plan.at(step).learning_rate == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_steps_images_and_compute_add_up():
    plan = paper_plan(VIT_BASE_HOG, epochs=3, flops=VIT_BASE_HOG)
    last = plan.at(plan.total_steps - 1)
    assert plan.images_before(plan.total_steps) == plan.total_images == last.images_seen + 4096
    assert plan.compute_fraction(plan.total_steps) == pytest.approx(1.0)
    for stage, first in zip(plan.stages, plan.boundaries):
        now = plan.at(first)
        assert (now.stage, now.u) == (stage, stage.start)
        # Whole steps: u on the compute axis and the share of compute agree to a step's share.
        assert now.compute_fraction == pytest.approx(now.u, abs=1 / min(s.steps for s in plan.stages))
    total = sum(
        6 * VIT_BASE_HOG(Geometry(s.bandwidth, s.visible + s.masked, s.visible)) * s.images for s in plan.stages
    )
    assert plan.total_flops == pytest.approx(total)


def test_magnitude_ramps_with_u():
    plan = paper_plan(epochs=2)
    assert plan.at(0).magnitude == 0
    assert all(plan.at(s).magnitude == pytest.approx(9 * plan.at(s).u) for s in range(0, plan.total_steps, 37))


def test_plan_survives_json():
    plan = paper_plan(VIT_BASE_HOG, flops=VIT_BASE_HOG, learning_rate=LearningRate(2.4e-3))
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_measured_cost_shares_the_budget_by_seconds():
    curriculum = Curriculum((Stage(0.5, 96), Stage(1.0, 224)))
    plan = curriculum.plan(epochs=10, images=1000, batch=10, cost=MeasuredCost({96: 0.25, 224: 1.0}))
    assert [stage.steps for stage in plan.stages] == [2000, 500]
    with pytest.raises(ValueError, match=r"no measured cost for B=96 px; the calibration holds 224"):
        curriculum.plan(epochs=10, images=1000, batch=10, cost=MeasuredCost({224: 1.0}))


def test_fewer_images_than_a_batch_still_plan():
    plan = Curriculum.preset("baseline").plan(epochs=64, images=10, batch=64)
    assert (plan.epoch_images, plan.total_steps) == (10, 10)


def test_largest_bandwidth_need_not_come_last():
    palindrome = Curriculum((Stage(0.3, 96), Stage(0.7, 224), Stage(1.0, 96)))
    plan = palindrome.plan(epochs=10, images=1000, batch=10)
    assert plan.reference_cost == 224**2
    assert plan.equivalent_epochs == pytest.approx(10, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 100, "ranks": 3}, r"stage 1 \(B=96\): a batch of 100 does not divide into 3 ranks x 1"),
        ({"batch": 12, "ranks": 2, "accumulation": 4}, r"choose a multiple of 8"),
        ({"patch_size": 14}, r"stage 1 \(B=96\): B=96 px is not a multiple of the patch size 14 px"),
        ({"cell": 6}, r"stage 1 \(B=96\): the HOG cell of 6 px does not divide the patch of 16 px"),
        ({"mask_ratio": 0.98}, r"stage 1 \(B=96\): mask_ratio=0.98 leaves none of 36 patches visible"),
        ({"mask_ratio": 1.0}, r"mask_ratio=1.0 is outside"),
        ({"images": 100, "epochs": 0.01, "batch": 50}, r"stage 1 \(B=96\) gets no step"),
        ({"epochs": 0}, "must be positive"),
    ],
)
def test_impossible_plans_name_the_stage(change, message):
    with pytest.raises(ValueError, match=message):
        paper_plan(**change)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((Stage(0.5, 96), Stage(0.5, 224)), r"stage 2 \(B=224\) ends at 0.5, not after 0.5"),
        ((Stage(0.5, 96), Stage(0.9, 224)), r"stage 2 \(B=224\) ends at 0.9: the last one must end at 1"),
        ((Stage(0.5, 96), Stage(1.1, 224)), "must end at 1"),
        ((), "at least one stage"),
        ((Stage(math.nan, 96),), "ends must rise"),
    ],
)
def test_ends_must_rise_to_one(stages, message):
    with pytest.raises(ValueError, match=message):
        Curriculum(stages)


def test_steps_outside_the_plan_are_refused():
    plan = paper_plan(epochs=1)
    for step in (-1, plan.total_steps):
        with pytest.raises(IndexError, match="outside the plan"):
            plan.at(step)
