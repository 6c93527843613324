"""The replay buffer in configurations and plans: how often, how large, and `auto`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import pytest

from mae_et.config import ConfigError, load_config
from mae_et.curriculum import Curriculum, PlannedStage, Replay, auto_replay
from mae_et.curriculum.calibration import Calibration
from mae_et.curriculum.table import plan_table
from mae_et.planning import build_plan, needs_calibration, trial_config

IMAGES = 100_000


def plan_of(*changes: str, calibration: Calibration | None = None):
    return build_plan(load_config(None, ["epochs=20", "optim.batch=256", *changes]), IMAGES, calibration=calibration)


def calibrated(*seconds: tuple[float, float]) -> Calibration:
    """What is asked of a calibration here: (seconds of the data path, of a step) for each stage of the default run."""
    by_size = {stage.bandwidth: pair for stage, pair in zip(plan_of().stages, seconds)}

    class Measured:
        def timing(self, stage: PlannedStage) -> SimpleNamespace:
            data, step = by_size[stage.bandwidth]
            return SimpleNamespace(data_seconds=data, step_seconds=step)

        def seconds(self, stages: Sequence[PlannedStage]) -> float:
            return float(sum(stage.steps * self.timing(stage).step_seconds for stage in stages))

    return cast(Calibration, Measured())


@pytest.mark.parametrize("most", [1, 3, 10])
@pytest.mark.parametrize("data", [0.05, 0.1, 0.101, 0.2, 0.25, 0.3, 1.0, 5.0])
def test_auto_is_the_fewest_replays_with_which_the_data_path_keeps_up(data, most):
    step = 0.1
    # n + 1 steps, in whole numbers: the ratio rounded, since 0.3 / 0.1 is not 3 in floating point.
    wanted = max(0, math.ceil(round(data / step, 9)) - 1)
    assert auto_replay(data, step, most) == min(wanted, most)


def test_auto_is_settled_by_stage_from_measured_times():
    seconds = [(0.5, 0.1), (0.15, 0.1), (0.09, 0.1)]
    plan = plan_of("replay.ratio=auto", calibration=calibrated(*seconds))
    assert [stage.replay for stage in plan.stages] == [3, 1, 0]
    more = plan_of("replay.ratio=auto", "replay.most=9", calibration=calibrated(*seconds))
    assert [stage.replay for stage in more.stages] == [4, 1, 0]
    fixed = [plan_of(f"replay.ratio={n}") for n in (3, 1, 0)]
    assert list(plan.stages) == [other.stages[index] for index, other in enumerate(fixed)]


def test_auto_needs_a_calibration_and_its_trial_does_not():
    config = load_config(None, ["replay.ratio=auto"])
    assert needs_calibration(config)
    assert not needs_calibration(load_config(None, ["replay.ratio=3"]))
    with pytest.raises(ConfigError, match=r"replay\.ratio=auto needs to know how long steps take.*calibrate"):
        build_plan(config, IMAGES)
    assert not needs_calibration(trial_config(config))
    assert not any(stage.replay for stage in build_plan(trial_config(config), IMAGES).stages)


def test_stages_may_say_it_themselves():
    first, second = "{end: 0.3, bandwidth: 96, replay: 4}", "{end: 0.6, bandwidth: 160, replay: 0}"
    stages = f"curriculum.stages=[{first}, {second}, {{bandwidth: 224}}]"
    assert [stage.replay for stage in plan_of(stages, "replay.ratio=2").stages] == [4, 0, 2]
    assert [stage.replay for stage in plan_of(stages).stages] == [4, 0, 0]
    settled = plan_of(stages, "replay.ratio=auto", calibration=calibrated(*[(0.2, 0.1)] * 3))
    assert [stage.replay for stage in settled.stages] == [4, 0, 1]


@pytest.mark.parametrize("ratio", ["-1", "1.5", "true", "often", "[1]"])
def test_other_ratios_are_refused(ratio):
    with pytest.raises(ConfigError, match=r"replay\.ratio=.* must be how many steps .* or auto"):
        plan_of(f"replay.ratio={ratio}")


def test_the_buffer_is_bounded_in_bytes_of_what_workers_hand_over():
    plan = plan_of("replay.ratio=1", "replay.gigabytes=0.5")
    sizes = [96, 160, 224]
    assert [stage.replay_batches for stage in plan.stages] == [int(5e8 // (256 * 3 * size**2)) for size in sizes]
    # The Fourier methods leave it to the device to bring images down to B.
    fourier = plan_of("replay.ratio=1", "replay.gigabytes=0.5", "data.downsample=fourier")
    assert [stage.replay_batches for stage in fourier.stages] == 3 * [plan.stages[2].replay_batches]
    grey = plan_of("replay.ratio=1", "replay.gigabytes=0.5", "data.channels=1", "data.mean=[0.5]", "data.std=[0.2]")
    assert grey.stages[0].replay_batches == int(5e8 // (256 * 96**2))
    with pytest.raises(ConfigError, match=r"stage 3 \(B=224\): .* no batch of 256 .*replay\.gigabytes.*replay\.ratio"):
        plan_of("replay.ratio=1", "replay.gigabytes=0.03")


def test_replay_changes_nothing_else_of_a_plan():
    plain, plan = plan_of(), plan_of("replay.ratio=2")
    for step in (0, 1, 2, 3, plain.boundaries[1] + 1, plain.total_steps - 1):
        before, after = plain.at(step), plan.at(step)
        assert (before.u, before.learning_rate, before.images_seen) == (after.u, after.learning_rate, after.images_seen)
    assert plan.total_images == plain.total_images == plain.total_fresh
    assert plan.total_fresh == pytest.approx(plan.total_images / 3, rel=1e-3)  # stages end within a cycle


def test_the_table_shows_the_load_of_the_data_path():
    plan = Curriculum.preset("efficienttrain_pp").plan(epochs=30, images=12_800, batch=128, replay=Replay(2, 1e10))
    table = plan_table(plan)
    head, first = table.splitlines()[0].replace("peak lr", "peak_lr").split(), table.splitlines()[2].split()
    cells = dict(zip(head, first))
    stage = plan.stages[0]
    assert stage.replay_batches > stage.fresh_steps
    assert cells["replay"] == "2"
    assert cells["buffer"] == f"{stage.fresh_steps:,}"  # there are no more to hold
    assert cells["fresh"] == f"{stage.fresh_steps / 100:.1f}"
    assert float(cells["fresh"]) == pytest.approx(float(cells["passes"]) / 3, abs=0.1)
    assert f"data path: {plan.total_fresh / 12_800:.1f} passes, 1/3.0 of what is trained on" in table
    plain = plan_table(Curriculum.preset("efficienttrain_pp").plan(epochs=30, images=12_800, batch=128))
    assert "replay" not in plain
    assert "data path" not in plain
