"""The family of schedules: published ones against their numbers, and the properties of any that a user writes."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_et.curriculum import Curriculum, LearningRate, Plan, Replay, Stage
from mae_et.curriculum.presets import PRESETS

IMAGENET = 1_281_167
STEPS_PER_EPOCH = 312  # of 4096 images


def plan_of(stages, **changes) -> Plan:
    axis = changes.pop("axis", "compute")
    terms = {"epochs": 10, "images": 5_000, "batch": 50, "patch_size": 16, "final_size": (224, 224), **changes}
    return Curriculum(tuple(stages), axis=axis).plan(**terms)


def test_image_sizes_of_the_one_gpu_paper():
    # 32 px and 32 px more every 5 epochs: 224 px from epoch 30 of 300 on (arXiv 2211.05187, section 2.2).
    plan = Curriculum.preset("image_size").plan(epochs=300, images=IMAGENET, batch=4096)
    assert [stage.bandwidth[0] for stage in plan.stages] == [32, 64, 96, 128, 160, 192, 224]
    assert [stage.steps for stage in plan.stages] == [5 * STEPS_PER_EPOCH] * 6 + [270 * STEPS_PER_EPOCH]
    assert plan == plan_of_growth(32, 32, 5, 300)


def plan_of_growth(first, step, every, epochs) -> Plan:
    grown = Curriculum.growth(first, step, every, epochs)
    named = Curriculum(grown.stages, "image_size", "epoch")
    return named.plan(epochs=epochs, images=IMAGENET, batch=4096)


def test_growth_keeps_the_aspect_of_the_final_size_and_must_reach_it():
    curriculum = Curriculum.growth(32, 32, 2, 20, final_size=(128, 256))
    assert [stage.bandwidth for stage in curriculum.stages] == [(32, 64), (64, 128), (96, 192), (128, 256)]
    assert [stage.end for stage in curriculum.stages] == pytest.approx([0.1, 0.2, 0.3, 1.0])
    with pytest.raises(ValueError, match="reaches 224 px at epoch 30, and the run ends at epoch 30"):
        Curriculum.growth(32, 32, 5, 30)


def test_linear_growth_spends_equal_shares_on_every_multiple_of_the_patch():
    plan = Curriculum.preset("linear").plan(epochs=300, images=IMAGENET, batch=4096)
    assert [stage.bandwidth[0] for stage in plan.stages] == list(range(96, 225, 16))
    spent = [stage.steps * stage.cost_per_image for stage in plan.stages]
    assert spent == pytest.approx(
        [sum(spent) / 9] * 9, rel=1e-3
    )  # a stage has thousands of steps, rounded to whole ones
    assert plan.equivalent_epochs == pytest.approx(300, abs=0.02)


def test_palindrome_goes_down_and_up_again():
    plan = Curriculum.preset("palindrome").plan(epochs=800, images=IMAGENET, batch=4096, mask_ratio=0.75)
    assert [(stage.bandwidth[0], round(stage.passes)) for stage in plan.stages] == [(224, 200), (192, 200), (224, 400)]


def test_steps_of_the_deit_script_by_stage():
    # int(E * r_B) epochs of the script's lists, a fifth, two fifths, a fifth and a fifth of each (methods: 146,328).
    plan = Curriculum.preset("efficienttrain_pp_deit").plan(epochs=200, images=IMAGENET, batch=4096)
    script = [int(200 * (224 / size) ** 2) * share * STEPS_PER_EPOCH for size, share in SCRIPT]
    assert [stage.steps for stage in plan.stages] == pytest.approx(script, abs=STEPS_PER_EPOCH)


SCRIPT = ((96, 0.2), (160, 0.4), (192, 0.2), (224, 0.2))


@pytest.mark.parametrize(("cap", "factor"), [(1.0, 2.0), (6e-4, 1.5), (4e-4, 1.0)])
def test_early_large_batches_raise_the_peak_as_equation_2_says(cap, factor):
    curriculum = Curriculum.preset("efficienttrain_pp").early_large_batch((224, 224))
    rate = LearningRate(peak=4e-4, warmup=0.0)
    plan = curriculum.plan(
        epochs=400, images=IMAGENET, batch=4096, mask_ratio=0.75, learning_rate=rate, learning_rate_cap=cap
    )
    plain = Curriculum.preset("efficienttrain_pp").plan(
        epochs=400, images=IMAGENET, batch=4096, mask_ratio=0.75, learning_rate=rate
    )
    # 96 px has 36 of 196 patches, 160 px 100: five times as many images fit, but not twice as many.
    assert [stage.batch for stage in plan.stages] == [4 * 4096, 4096, 4096]
    assert plan.stages[0].steps == pytest.approx(plain.stages[0].steps / 4, abs=1)
    assert plan.at(0).learning_rate == pytest.approx(factor * 4e-4, rel=1e-12)
    for stage, start in zip(plan.stages, plan.boundaries):
        middle = start + stage.steps // 2
        expected = (factor if stage.index == 0 else 1.0) * rate(plan.u(middle))
        assert plan.at(middle).learning_rate == pytest.approx(expected, rel=1e-12)
    assert plan.equivalent_epochs == pytest.approx(plain.equivalent_epochs, rel=1e-4)


def test_larger_batches_need_a_cap_and_keep_within_the_tokens_of_the_final_size():
    stages = (Stage(0.5, 96, batch_scale=8), Stage(1, 224))
    with pytest.raises(ValueError, match=r"stage 1 \(B=96\): batch_scale=8 .* say with curriculum.lr_cap"):
        plan_of(stages, more_tokens=True)
    with pytest.raises(ValueError, match=r"400 images have 14,400 tokens, more than the 9,800 of 50 images at B=224"):
        plan_of(stages, learning_rate_cap=10.0)
    assert plan_of(stages, learning_rate_cap=10.0, more_tokens=True).stages[0].batch == 400
    with pytest.raises(ValueError, match=r"curriculum\.lr_cap=0\.5 is below the peak learning rate 1"):
        plan_of(stages, learning_rate_cap=0.5, more_tokens=True)


def test_a_lower_mask_ratio_counts_against_larger_batches():
    # 96 px shows 36 patches unmasked where 224 px shows 49 of 196: twice the batch is too much to see.
    stages = (Stage(0.5, 96, 0.0, batch_scale=2), Stage(1, 224))
    with pytest.raises(ValueError, match="3,600 visible patches, more than the 2,450"):
        plan_of(stages, mask_ratio=0.75, learning_rate_cap=10.0)


def test_visible_patches_in_place_of_a_ratio():
    plan = plan_of([Stage(0.5, 96, visible=20), Stage(1, 224)], mask_ratio=0.75)
    assert [(stage.visible, stage.masked) for stage in plan.stages] == [(20, 16), (49, 147)]
    with pytest.raises(ValueError, match=r"stage 1 \(B=96\): visible=37 is not among its 1 to 36 patches"):
        plan_of([Stage(0.5, 96, visible=37), Stage(1, 224)])
    with pytest.raises(ValueError, match=r"mask_ratio=0\.5 and visible=3"):
        Stage(1, 96, 0.5, visible=3)


def test_two_step_augmentation_and_a_ramp_within_a_stage():
    stages = [Stage(0.5, 224, magnitude=3), Stage(0.75, 224, magnitude=(0, 8)), Stage(1, 224)]
    plan = plan_of(stages)
    first, second, third = plan.boundaries
    assert {plan.at(step).magnitude for step in range(first, second)} == {3}
    assert plan.at(second).magnitude == 0
    assert plan.at((second + third) // 2).magnitude == pytest.approx(4, abs=0.2)
    assert plan.at(third).magnitude == pytest.approx(9 * 0.75, abs=0.01)  # the curriculum's own ramp again


def test_axes_differ_by_what_a_step_takes():
    # 112 px cost a quarter; a doubled batch passes over the data twice as fast.
    stages = [Stage(0.5, 112, batch_scale=2), Stage(1, 224)]
    steps = {
        axis: [stage.steps for stage in plan_of(stages, axis=axis, learning_rate_cap=2.0).stages]
        for axis in ("compute", "epoch", "step")
    }
    assert steps == {"compute": [1000, 500], "epoch": [250, 500], "step": [500, 500]}


def test_the_reference_is_the_final_size_even_if_no_stage_has_it():
    constant = plan_of([Stage(1, 112)])
    assert constant.reference_size == (224, 224)
    assert constant.stages[0].passes == pytest.approx(40)  # ten epochs' worth of 224 px
    assert constant.equivalent_epochs == pytest.approx(10)


def test_replayed_steps_divide_what_the_data_path_delivers():
    plan = plan_of([Stage(0.5, 112, replay=3), Stage(1, 224)], replay=Replay(ratio=0, bytes=1e7))
    first = plan.stages[0]
    assert (first.replay, first.steps, first.fresh_steps) == (3, 2000, 500)
    assert first.replay_batches == int(1e7 // (50 * 3 * 112 * 112))
    assert [plan.at(step).fresh for step in range(9)] == [True, False, False, False] * 2 + [True]
    assert plan.fresh_before(9) == 3 * 50
    assert plan.total_fresh == 500 * 50 + plan.stages[1].images
    with pytest.raises(ValueError, match=r"replay buffer of 1000 bytes holds no batch of 50 images"):
        plan_of([Stage(1, 112, replay=1)], replay=Replay(bytes=1000))


@st.composite
def curricula(draw):
    """Stages, axis and terms that a user might write."""
    patch = draw(st.sampled_from([2, 8, 14, 16]))
    count = draw(st.integers(1, 5))
    shares = draw(st.lists(st.integers(1, 10), min_size=count, max_size=count))
    ends = [sum(shares[: index + 1]) / sum(shares) for index in range(count)]
    sides = draw(st.lists(st.tuples(st.integers(1, 14), st.integers(1, 14)), min_size=count, max_size=count))
    scales = draw(st.lists(st.sampled_from([1, 1, 2, 4]), min_size=count, max_size=count))
    replays = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    stages = [
        Stage(end, (patch * height, patch * width), batch_scale=scale, replay=replay)
        for end, (height, width), scale, replay in zip(ends, sides, scales, replays)
    ]
    return stages, {
        "patch_size": patch,
        "axis": draw(st.sampled_from(["compute", "epoch", "step"])),
        "epochs": draw(st.floats(20, 400)),
        "images": draw(st.integers(2_000, 100_000)),
        "batch": draw(st.sampled_from([16, 50, 256])),
        "final_size": (14 * patch, 14 * patch),
        "learning_rate": LearningRate(1e-3, draw(st.floats(0, 0.5)), 1e-6),
        "learning_rate_cap": draw(st.floats(1e-3, 4e-3)),
        "more_tokens": True,
    }


@settings(max_examples=150, deadline=None)
@given(curricula())
def test_properties_of_any_plan(case):
    stages, terms = case
    plan = plan_of(stages, **terms)
    relative = [stage.cost_per_image / plan.reference_cost for stage in plan.stages]
    starts = [0.0, *(stage.end for stage in stages[:-1])]
    for stage, planned, cost, start in zip(stages, plan.stages, relative, starts):
        # The budget: every stage spends its share of the axis, to half a step.
        wanted = (stage.end - start) * terms["epochs"] * plan.epoch_images
        per_step = {"compute": planned.batch * cost, "epoch": planned.batch, "step": terms["batch"]}[terms["axis"]]
        assert abs(planned.steps * per_step - wanted) <= 0.5 * per_step * (1 + 1e-9)
        # Eq. 2, exactly.
        factor = min(math.sqrt(stage.batch_scale), terms["learning_rate_cap"] / 1e-3)
        assert planned.learning_rate_factor == pytest.approx(factor, rel=1e-12)
        assert planned.fresh_steps == math.ceil(planned.steps / (stage.replay + 1))
    # u rises from 0 and stays below 1; a step's numbers follow from it.
    probes = sorted({0, plan.total_steps - 1, *(s for b in plan.boundaries for s in (b - 1, b, b + 1))})
    probes = [step for step in probes if 0 <= step < plan.total_steps]
    seen = [plan.at(step) for step in probes]
    assert seen[0].u == 0
    assert all(a.u < b.u < 1 for a, b in pairwise(seen))
    assert all(a.compute_fraction < b.compute_fraction < 1 for a, b in pairwise(seen))
    # The learning rate is continuous where the batch stays: it moves by no more than the axis does.
    rate = terms["learning_rate"]
    steepest = 1e-3 * max(math.pi / 2 / (1 - rate.warmup), 1 / rate.warmup if rate.warmup else 0)
    for before, after in pairwise(seen):
        if before.stage.learning_rate_factor == after.stage.learning_rate_factor:
            factor = before.stage.learning_rate_factor
            moved = abs(after.learning_rate - before.learning_rate)
            assert moved <= factor * steepest * (after.u - before.u) * (1 + 1e-9)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(PRESETS)),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([2, 4, 8, 14, 16, 32]),
)
def test_presets_take_any_final_size(name, rows, columns, patch):
    final = (rows * patch, columns * patch)
    curriculum = Curriculum.preset(name, final, patch)
    sides = [stage.bandwidth for stage in curriculum.stages]
    assert sides[-1] == final
    assert all(side % patch == 0 and side > 0 for size in sides for side in size)
    assert all(height <= final[0] and width <= final[1] for height, width in sides)
    if name != "palindrome":
        assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(sides))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["efficienttrain_pp", "efficienttrain_pp_deit", "linear"]), st.integers(6, 40))
def test_early_large_batches_never_ask_for_more_tokens(name, side):
    final = (16 * side, 16 * side)
    curriculum = Curriculum.preset(name, final).early_large_batch(final)
    plan = curriculum.plan(
        epochs=300, images=50_000, batch=64, mask_ratio=0.75, learning_rate_cap=9.0, final_size=final
    )
    tokens = [stage.batch * (stage.visible + stage.masked) for stage in plan.stages]
    assert max(tokens) <= 64 * side * side


def test_plans_from_before_there_was_a_reference_size_open():
    plan = plan_of([Stage(0.5, 96), Stage(1, 224)])
    values = plan.to_dict()
    del values["reference_size"]
    for stage in values["stages"]:
        for name in ("learning_rate_factor", "magnitude", "low_pass", "replay", "replay_batches"):
            del stage[name]
    assert Plan.from_dict(values) == plan


def test_the_step_at_which_a_fraction_is_reached():
    plan = plan_of([Stage(0.2, 96), Stage(1, 224)])
    assert plan.first_step_at(0) == 0
    assert plan.first_step_at(0.2) == plan.boundaries[1]
    assert plan.first_step_at(1) == plan.total_steps
    step = plan.first_step_at(0.5)
    assert plan.u(step - 1) < 0.5 <= plan.u(step)
