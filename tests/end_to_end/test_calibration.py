"""Runs whose budget is time: measured once, planned from it for good. How fast anything is, is not asserted."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from mae_et import calibration as measuring
from mae_et import finetuning, rehearsal
from mae_et.__main__ import main
from mae_et.calibration import calibrate_alone
from mae_et.config import ConfigError, load_config
from mae_et.curriculum import Plan
from mae_et.curriculum.calibration import Calibration
from mae_et.pretraining import pretrain, rehearse
from tests.end_to_end.labelled import TINY_VIT, finetune_here, write_classes
from tests.end_to_end.tiny import TINY, arguments, history, run_here, weights
from tests.engine.ranks import run_ranks

BRIEF = ["calibration.seconds=0.2", "calibration.rounds=2"]


def plan_of(run) -> Plan:
    return Plan.from_dict(json.loads((run / "plan.json").read_text()))


@pytest.fixture
def count_calibrations(monkeypatch) -> list[str]:
    """Grows by one word with each calibration."""
    done: list[str] = []
    before = measuring.measure

    def counted(*given):
        done.append("measured")
        return before(*given)

    monkeypatch.setattr(measuring, "measure", counted)
    return done


def test_a_run_for_a_time_measures_once_and_goes_on_to_the_bit(photos, tmp_path, count_calibrations):
    run, said = tmp_path / "run", []
    changes = [*BRIEF, "budget=0.03 minutes"]
    config = load_config(None, arguments(photos, run, *changes))
    assert pretrain(config, say=said.append, until=0.5) == 0
    kept, plan = (run / "calibration.json").read_text(), plan_of(run)
    calibration = Calibration.from_json(kept)
    half_steps = 0.5 * sum(calibration.seconds_per_step(stage) for stage in plan.stages)
    assert abs(calibration.seconds(plan.stages) - 1.8) <= half_steps * 1.001
    assert {timing.bandwidth for timing in calibration.timings} == {stage.bandwidth for stage in plan.stages}
    assert any("gpu_hours of 1 process" in line for line in said)
    assert load_config(run / "config.yaml").budget == "0.03 minutes"

    # What is measured after the first start would be other seconds, and another plan.
    assert pretrain(load_config(None, arguments(photos, run, *changes)), say=lambda _: None) == 0
    assert count_calibrations == ["measured"]
    assert (plan_of(run), (run / "calibration.json").read_text()) == (plan, kept)
    assert history(run)[-1]["step"] == plan.total_steps

    # The same training as by the number of epochs: the steps that were measured left nothing behind.
    plain = run_here(photos, tmp_path / "plain", f"epochs={plan.epochs!r}")
    assert (weights(plain), history(plain)) == (weights(run), history(run))
    assert not (plain / "calibration.json").exists()

    # A saved calibration makes the same plan elsewhere, and plans the rest of a run that lost its own.
    again = run_here(photos, tmp_path / "again", *changes, f"calibration={run / 'calibration.json'}")
    assert (weights(again), count_calibrations) == (weights(run), ["measured"])
    copy = tmp_path / "copy.json"
    (run / "calibration.json").rename(copy)
    with pytest.raises(ConfigError, match=r"calibration\.json is missing: the plan of this run was made from it"):
        run_here(photos, run, *changes)
    run_here(photos, run, *changes, f"calibration={copy}")
    assert (run / "calibration.json").read_text() == kept


def test_random_numbers_are_as_before_and_every_geometry_is_timed(photos, tmp_path):
    stages = "curriculum.stages=[{end: 0.3, bandwidth: 8}, {end: 0.6, bandwidth: 8, low_pass: 2}, "
    stages += "{end: 0.8, bandwidth: 16, replay: 2}, {end: 1, bandwidth: 16, visible: 30, batch_scale: 2}]"
    changes = [*BRIEF, stages, "curriculum.lr_cap=1", "curriculum.more_tokens=true", "data.workers=1"]
    config = load_config(None, arguments(photos, tmp_path / "run", *changes, "optim.accumulation=2"))
    before = torch.get_rng_state()
    threads = torch.get_num_threads()
    calibration = calibrate_alone(config, partial(rehearse, config, None), print)
    torch.set_num_threads(threads)
    assert torch.equal(before, torch.get_rng_state())
    assert [timing.key for timing in calibration.timings] == ["8/4/8", "8/4/8/low-pass", "16/16/8", "16/30/16"]
    for timing in calibration.timings:
        assert min(timing.seconds, timing.step_seconds, timing.data_seconds) > 0
        assert (timing.blocks, timing.image) == (2, (3, *timing.bandwidth))
        assert (timing.memory or 0) > 1e7
    assert (calibration.processes, calibration.threads, calibration.workers) == (1, 1, 1)


@pytest.mark.parametrize("count", [1, 3])
def test_a_block_ends_when_it_takes_too_long(photos, tmp_path, monkeypatch, count):
    config = load_config(None, arguments(photos, tmp_path / "run", *BRIEF))
    ranks = measuring.join_ranks("cpu")
    blocks = measuring.Blocks(rehearse(config, None, ranks), ranks, 0, config.seed, config.calibration)
    clock = iter(range(0, 10_000, 1000))
    monkeypatch.setattr(rehearsal.time, "perf_counter", lambda: next(clock))
    calls: list[int] = []
    blocks.timed(lambda: calls.append(1), count)
    assert len(calls) == 1


def test_a_cost_that_is_measured_on_labels(tmp_path, monkeypatch, count_calibrations):
    """Drop path scales with the epochs that the budget comes to."""
    images = write_classes(tmp_path / "images")
    changes = [*TINY_VIT, *BRIEF, "budget=1 second", "curriculum.cost=measured", "curriculum=efficienttrain_pp"]
    scaled: list[float] = []
    before = finetuning.scaled_drop_path
    monkeypatch.setattr(
        finetuning, "scaled_drop_path", lambda rate, epochs, meant: scaled.append(epochs) or before(rate, epochs, meant)
    )
    run = finetune_here(images, tmp_path / "run", *changes, "model.drop_path_epochs=100000")
    assert plan_of(run).cost_unit == "seconds"
    assert scaled == [plan_of(run).epochs]
    finetune_here(images, run, *changes, "model.drop_path_epochs=100000", only_evaluate=True)
    assert count_calibrations == ["measured"]


def command_line(words: list[str]) -> None:
    raise SystemExit(main(words))


def test_a_plan_by_a_calibration_costs_money(photos, tmp_path, capsys):
    """Two processes measure together; one cannot plan by their times."""
    config, out = tmp_path / "empty.yaml", tmp_path / "two.json"
    config.write_text("{}\n")
    plain = ["curriculum=baseline"]  # one size: two processes that share cores with others are slow to agree
    line = ["calibrate", "--config", str(config), "--out", str(out), *TINY, f"data.root={photos}", *BRIEF, *plain]
    run_ranks(2, command_line, line)
    assert Calibration.from_json(out.read_text()).processes == 2
    plan = ["plan", "--config", str(config), *TINY, f"data.root={photos}", "budget=3 minutes", *plain]
    assert main([*plan, "--calibration", str(out), "--price", "2"]) == 0
    printed = capsys.readouterr().out
    assert "0.1 gpu_hours of 2 processes; 0.20 EUR at 2 EUR an hour and process" in printed
    assert "budget: 3 minutes comes to epochs=" in printed
    assert main(plan) == 2
    assert "--calibrate" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="was measured with 2 processes, and this run has 1"):
        run_here(photos, tmp_path / "run", "budget=3 minutes", f"calibration={out}", *plain)
