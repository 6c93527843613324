"""Calibrations: the file, the look-up, what replay saves, and the table of times."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from mae_et.config import load_config
from mae_et.curriculum import Curriculum, MAECost, Plan, Stage, TransformerShape
from mae_et.curriculum.calibration import Calibration
from mae_et.curriculum.cost import Geometry
from mae_et.curriculum.making import Replay
from mae_et.curriculum.time_table import duration, time_table
from mae_et.planning import build_plan
from tests.curriculum.timings import calibration_of

MODEL = MAECost(TransformerShape(64, 4), TransformerShape(32, 2), patch_values=768, target_values=108)


def some_plan(**terms) -> Plan:
    common = {"epochs": 30, "images": 60_000, "batch": 64, "mask_ratio": 0.75, "flops": MODEL}
    return Curriculum.preset("efficienttrain_pp").plan(**{**common, **terms})


def test_json_keeps_every_bit():
    calibration = calibration_of(some_plan(), scale=math.pi * 1e-7)
    assert Calibration.from_json(calibration.to_json()) == calibration
    unknown = calibration_of(some_plan(), memory=None, flops_per_image=None)
    assert Calibration.from_json(unknown.to_json()) == unknown


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"timings": [{}]}', '{"timings": []}'])
def test_other_files_are_refused(text):
    with pytest.raises(ValueError, match="not a calibration, as `python -m mae_et calibrate` writes it"):
        Calibration.from_json(text)


def test_geometries_are_told_apart():
    stages = [Stage(0.25, 96), Stage(0.5, 96, low_pass=10), Stage(0.75, 96, visible=20), Stage(1.0, (96, 192))]
    plan = Curriculum(tuple(stages)).plan(epochs=30, images=60_000, batch=64, mask_ratio=0.75)
    calibration = calibration_of(plan)
    keys = [calibration.timing(stage).key for stage in plan.stages]
    assert keys == ["96/9/64", "96/9/64/low-pass", "96/20/64", "96x192/18/64"]
    other = some_plan(batch=128).stages[1]
    with pytest.raises(ValueError, match=r"holds no steps of 160/25/128 .*only 96/9/64, 96/9/64/low-pass"):
        calibration.timing(other)


def test_another_model_is_refused():
    plan = some_plan()
    larger = replace(plan.stages[0], flops_per_image=2 * (plan.stages[0].flops_per_image or 0))
    with pytest.raises(ValueError, match=r"stage 1 \(B=96\): the calibration is of another model \(a model\)"):
        calibration_of(plan).timing(larger)


def pipeline(step: float, data: float, replay: int, workers: int, steps: int = 6000) -> float:
    """Seconds per step of a run played through: a worker makes batches one after another, four ahead at most."""
    clock, made, taken = 0.0, [0.0], []
    for number in range(steps):
        if number % (replay + 1) == 0:
            if workers:
                # The next batch is begun when the one before is done and its place in the queue is free.
                free = taken[-4] if len(taken) >= 4 else 0.0
                made.append(max(made[-1], free) + data)
                clock = max(clock, made[-1])
                taken.append(clock)
            else:
                clock += data
        clock += step
    return clock / steps


@pytest.mark.parametrize("replay", [0, 1, 2, 5])
@pytest.mark.parametrize(("step", "data"), [(1.0, 0.1), (1.0, 1.0), (1.0, 1.7), (1.0, 4.0), (1.0, 30.0)])
@pytest.mark.parametrize("workers", [0, 1])
def test_replay_saves_what_a_pipeline_played_through_saves(step, data, replay, workers):
    times = {"step_seconds": step, "data_seconds": data, "seconds": pipeline(step, data, 0, workers)}
    plan = some_plan(replay=Replay(replay))
    calibration = calibration_of(plan, workers=workers, **times)
    # The first batches are waited for: fewer than ten of 6000 steps' data.
    expected = pipeline(step, data, replay, workers)
    assert calibration.seconds_per_step(plan.stages[0]) == pytest.approx(expected, abs=0.002 * (step + data))


def test_totals_and_their_uncertainty():
    plan = some_plan()
    calibration = calibration_of(plan, scale=1e-6)
    pixels = [64 * side * side for side in (96, 160, 224)]
    expected = sum(stage.steps * 1e-6 * count for stage, count in zip(plan.stages, pixels))
    assert calibration.seconds(plan.stages) == pytest.approx(expected, rel=1e-12)
    assert calibration.uncertainty(plan.stages) == pytest.approx(0.02, rel=1e-9)  # two standard errors of 1 % each


def test_measured_cost_is_seconds_per_image_by_geometry():
    plan = some_plan()
    cost = calibration_of(plan, scale=2e-6).cost()
    for stage in plan.stages:
        tokens = stage.visible + stage.masked
        expected = 2e-6 * stage.bandwidth[0] ** 2
        assert cost(Geometry(stage.bandwidth, tokens, stage.visible)) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="no steps at B=128 with 16 visible patches, only B=96 with 9"):
        cost(Geometry((128, 128), 64, 16))


def test_a_plan_accounted_in_measured_seconds():
    plain = load_config(None, ["run=x", "epochs=50"])
    calibration = calibration_of(build_plan(plain, 200_000), scale=1e-8)
    plan = build_plan(load_config(None, ["run=x", "epochs=50", "curriculum.cost=measured"]), 200_000, 1, calibration)
    by_area = build_plan(load_config(None, ["run=x", "epochs=50", "curriculum.cost=area"]), 200_000)
    assert plan.cost_unit == "seconds"
    assert [stage.steps for stage in plan.stages] == [stage.steps for stage in by_area.stages]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.5, "0.5 s"), (89, "89 s"), (90, "1.5 min"), (5399, "90 min"), (5400, "1.5 h"), (172800, "2 days")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_table_of_times():
    plan = some_plan(replay=Replay(1))
    calibration = calibration_of(plan, scale=1e-6, processes=4, data_seconds=3.0, step_seconds=0.1)
    text = time_table(plan, calibration, price=2.5, currency="CHF")
    rows = [line.split() for line in text.splitlines()[2:5]]
    seconds = calibration.seconds(plan.stages)
    for row, stage in zip(rows, plan.stages):
        per_step = calibration.seconds_per_step(stage)
        side = stage.bandwidth[0]
        assert row[:3] == [str(stage.index + 1), str(side), f"{stage.steps:,}"]
        assert float(row[3]) == pytest.approx(1000 * per_step, rel=1e-3)
        assert "GB 3000 / 2" in " ".join(row)
        rates = [float(value) for value in row[-4:-2]]
        # uint8, three channels, 64 images; at the final size (224 / B)^2 as many bytes (Table 20).
        assert rates[0] == pytest.approx(64 * 3 * side**2 / per_step / 1e6, rel=1e-2)
        assert rates[1] == pytest.approx(64 * 3 * 224**2 / per_step / 1e6, rel=1e-2)
        assert row[-2:] == ["for", "data"]
    assert f"{seconds * 4 / 3600:.3g} gpu_hours of 4 processes" in text
    assert f"{seconds * 4 / 3600 * 2.5:.2f} CHF at 2.5 CHF an hour and process" in text
    assert "EUR" not in time_table(plan, calibration)
    assert "for steps" in time_table(plan, calibration_of(plan, data_seconds=0.0))
