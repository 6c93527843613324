"""Budgets in people's units come to epochs whose plan spends them."""

from __future__ import annotations

import pytest

from mae_et.config import ConfigError, PretrainConfig, dump_config, load_config
from mae_et.curriculum import AreaCost, Curriculum, MAECost, Plan, TransformerShape
from mae_et.curriculum.budget import SECONDS, UNITS, epochs_for, parse_budget, spent
from mae_et.curriculum.calibration import stage_key
from mae_et.curriculum.presets import PRESETS
from mae_et.planning import build_plan, needs_calibration
from tests.curriculum.timings import calibration_of

MODEL = MAECost(TransformerShape(64, 4), TransformerShape(32, 2), patch_values=768, target_values=108)


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("400 epochs", 400, "epochs"),
        ("1 epoch", 1, "epochs"),
        ("2e18 flops", 2e18, "flops"),
        ("2E18 FLOPs", 2e18, "flops"),
        ("24 gpu_hours", 24, "gpu_hours"),
        ("1 gpu_hour", 1, "gpu_hours"),
        ("  30   minutes ", 30, "minutes"),
        ("1.5 hours", 1.5, "hours"),
        ("2 days", 2, "days"),
        ("90 seconds", 90, "seconds"),
    ],
)
def test_budgets_are_read(text, amount, unit):
    budget = parse_budget(text)
    assert (budget.amount, budget.unit) == (amount, unit)
    assert budget.is_time == (unit not in ("epochs", "flops"))


@pytest.mark.parametrize(
    "text", ["", "400", "epochs", "30 fortnights", "-3 days", "0 hours", "nan epochs", "inf flops", "2 e18 flops", "3 "]
)
def test_what_is_no_budget_is_refused_with_the_units(text):
    with pytest.raises(ValueError, match=", ".join(UNITS)):
        parse_budget(text)


def plan_maker(preset: str, batch: int, images: int, growth: tuple[int, int, float] | None = None, **terms):
    def plan_of(epochs: float, times: float = 1.0) -> Plan:
        curriculum = Curriculum.growth(*growth, epochs) if growth else Curriculum.preset(preset)
        common = {"images": images, "batch": batch, "mask_ratio": 0.75, "cost": MODEL, "flops": MODEL}
        return curriculum.plan(epochs=times * epochs, **{**common, **terms})

    return plan_of


def reckoned(plan: Plan, unit: str, calibration) -> tuple[float, float]:
    """What a plan spends, and what half a step of every stage does, reckoned once more."""
    if unit == "flops":
        steps = [6 * stage.batch * stage.cost_per_image for stage in plan.stages]
    else:
        by_key = {timing.key: timing.seconds for timing in calibration.timings}
        divisor = 3600 / calibration.processes if unit == "gpu_hours" else SECONDS[unit]
        steps = [by_key[stage_key(stage)] / divisor for stage in plan.stages]
    total = sum(stage.steps * step for stage, step in zip(plan.stages, steps))
    return total, 0.5 * sum(steps)


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize(("batch", "images"), [(64, 60_000), (4096, 1_281_167), (100, 150)])
@pytest.mark.parametrize("unit", ["flops", "gpu_hours", *SECONDS])
@pytest.mark.parametrize("epochs", [37.3, 411.7])
def test_the_plan_spends_the_budget_to_half_a_step_a_stage(preset, batch, images, unit, epochs):
    plan_of = plan_maker(preset, batch, images)
    calibration = calibration_of(plan_of(1000.0), processes=8)
    # Any amount will do: that of some epochs, and a bit.
    amount = reckoned(plan_of(epochs), unit, calibration)[0] * 1.0037
    budget = parse_budget(f"{amount!r} {unit}")
    plan = plan_of(epochs_for(budget, plan_of, calibration))
    total, half_steps = reckoned(plan, unit, calibration)
    assert spent(plan, budget, calibration) == pytest.approx(total, rel=1e-12)
    # Nine digits of the epochs are worth 1e-9 of the amount.
    assert abs(total - amount) <= half_steps * (1 + 1e-3) + 2e-9 * amount


@pytest.mark.parametrize("unit", ["flops", "hours"])
@pytest.mark.parametrize("epochs", [31.0, 40.5, 300.0])
def test_sizes_that_grow_by_the_epoch_share_in_any_budget(unit, epochs):
    """32 px, 32 px more every 5 epochs: the growth takes 30 epochs whatever the budget."""
    plan_of = plan_maker("", 512, 50_000, growth=(32, 32, 5.0))
    calibration = calibration_of(plan_of(100.0))
    amount = reckoned(plan_of(epochs), unit, calibration)[0]
    resolved = epochs_for(parse_budget(f"{amount!r} {unit}"), plan_of, calibration)
    plan = plan_of(resolved)
    assert [stage.steps for stage in plan.stages[:-1]] == [485] * 6  # 5 epochs of 97 steps
    total, half_steps = reckoned(plan, unit, calibration)
    assert abs(total - amount) <= half_steps * (1 + 1e-3)
    assert resolved == pytest.approx(epochs, abs=0.02)


def test_a_budget_that_growth_alone_exceeds_is_refused():
    plan_of = plan_maker("", 512, 50_000, growth=(32, 32, 5.0))
    growth = plan_of(31.0)
    amount = sum(6 * stage.images * stage.cost_per_image for stage in growth.stages[:-1])
    with pytest.raises(ValueError, match=r"reaches 224 px at epoch 30, and the run ends at epoch 2\d"):
        plan_of(epochs_for(parse_budget(f"{0.9 * amount!r} flops"), plan_of))


def test_larger_batches_have_times_of_their_own():
    stages = {"mask_ratio": 0.0, "learning_rate_cap": 2.0}

    def plan_of(epochs: float, times: float = 1.0) -> Plan:
        curriculum = Curriculum.preset("efficienttrain_pp").early_large_batch((224, 224))
        return curriculum.plan(epochs=times * epochs, images=50_000, batch=64, cost=AreaCost(), flops=MODEL, **stages)

    calibration = calibration_of(plan_of(10.0))
    assert {timing.batch for timing in calibration.timings} == {256, 64}
    budget = parse_budget("7 hours")
    plan = plan_of(epochs_for(budget, plan_of, calibration))
    total, half_steps = reckoned(plan, "hours", calibration)
    assert abs(total - 7) <= half_steps * (1 + 1e-3)


def test_time_without_a_calibration_is_refused():
    plan_of = plan_maker("baseline", 64, 60_000)
    with pytest.raises(ValueError, match="2 days can be converted"):
        epochs_for(parse_budget("2 days"), plan_of)


def config_with(*changes: str) -> PretrainConfig:
    return load_config(None, ["run=x", *changes])


def test_budgets_of_a_configuration(tmp_path):
    by_epochs = build_plan(config_with("epochs=17"), 100_000)
    assert build_plan(config_with("epochs=3", "budget=17 epochs"), 100_000) == by_epochs
    by_flops = build_plan(config_with("budget=1e18 flops"), 100_000)
    assert by_flops.total_flops == pytest.approx(1e18, rel=0.01)
    assert build_plan(config_with(f"epochs={by_flops.epochs!r}"), 100_000) == by_flops
    assert Plan.from_dict(by_flops.to_dict()).epochs == by_flops.epochs

    config = config_with("budget=30 minutes", "epochs=7")
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config
    calibration = calibration_of(by_epochs, scale=1e-9)
    plan = build_plan(config, 100_000, calibration=calibration)
    assert calibration.seconds(plan.stages) == pytest.approx(1800, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ([], False),
        (["budget=3 epochs"], False),
        (["budget=3e15 flops"], False),
        (["budget=3 gpu_hours"], True),
        (["budget=3 minutes"], True),
        (["curriculum.cost=measured"], True),
        (["curriculum.cost=measured", 'curriculum.seconds={"96": 1, "160": 2, "224": 3}'], False),
    ],
)
def test_what_needs_a_calibration_says_so(changes, needed):
    config = config_with(*changes)
    assert needs_calibration(config) == needed
    if needed:
        with pytest.raises(ConfigError, match="needs to know how long steps take: give calibration=FILE"):
            build_plan(config, 1_000_000)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("3 weeks", "budget: '3 weeks' is not a budget: .* epochs, flops, gpu_hours"),
        ("1e9 flops", "budget=1e9 flops: 1e\\+09 flops is too little for a step of every stage"),
    ],
)
def test_bad_budgets_name_the_key(budget, message):
    with pytest.raises(ConfigError, match=message):
        build_plan(config_with(f"budget={budget}"), 1_000_000)
