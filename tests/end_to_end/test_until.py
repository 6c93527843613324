"""Runs that stop before the end of their plan: where they are told to, or at the clock."""

from __future__ import annotations

import json

import pytest

from mae_et.config import ConfigError, load_config
from mae_et.pretraining import pretrain
from tests.end_to_end.labelled import TINY_VIT, finetune_here, write_classes
from tests.end_to_end.tiny import arguments, history, run_here, weights

STAGES = "curriculum.stages=[{end: 0.5, bandwidth: 8}, {end: 1, bandwidth: 16}]"


def test_a_run_stopped_on_the_way_goes_on_to_the_same_bits(photos, tmp_path):
    whole = run_here(photos, tmp_path / "whole", STAGES)
    config = load_config(None, arguments(photos, tmp_path / "parts", STAGES))
    said: list[str] = []
    for until in (0.25, 0.5, 0.8, 1.0):
        assert pretrain(config, say=said.append, until=until) == 0
    assert history(tmp_path / "parts") == history(whole)
    assert weights(tmp_path / "parts") == weights(whole)
    assert sum(line.startswith("stopped at u = ") for line in said) == 3
    assert sum(line.startswith("complete") for line in said) == 1


def test_a_run_goes_on_in_another_folder_under_another_plan_with_the_same_beginning(photos, tmp_path):
    first = load_config(None, arguments(photos, tmp_path / "first", STAGES))
    assert pretrain(first, say=lambda _: None, until=0.5) == 0
    (checkpoint,) = (tmp_path / "first" / "checkpoints").iterdir()
    longer = "curriculum.stages=[{end: 0.5, bandwidth: 8}, {end: 0.75, bandwidth: 12}, {end: 1, bandwidth: 16}]"
    second = load_config(None, arguments(photos, tmp_path / "second", longer))
    assert pretrain(second, resume=str(checkpoint), say=lambda _: None) == 0
    whole = run_here(photos, tmp_path / "whole", longer)
    assert weights(tmp_path / "second") == weights(whole)


def test_the_clock_stops_a_run_for_good(photos, tmp_path):
    run = tmp_path / "run"
    config = load_config(None, arguments(photos, run, "epochs=100000", "protocol.wall_hours=1e-4"))
    said: list[str] = []
    assert pretrain(config, say=said.append) == 0
    rows = history(run)
    assert said[-1].startswith("time is up: ")
    assert 0 < rows[-1]["compute/fraction"] < 0.5
    # The learning rate is that of the whole budget, not of the time.
    plan = json.loads((run / "plan.json").read_text())
    assert sum(stage["steps"] for stage in plan["stages"]) > 100 * len(rows)
    assert pretrain(config, say=said.append) == 0
    assert history(run) == rows


def test_accuracy_is_taken_when_the_time_is_up(tmp_path):
    images = write_classes(tmp_path / "images")
    run = finetune_here(images, tmp_path / "run", *TINY_VIT, "epochs=100000", "protocol.wall_hours=1e-4")
    report = json.loads((run / "report.json").read_text())
    assert 0 <= report["test"]["top1"] <= 1
    assert report["step"] == history(run)[-1]["step"]


def test_a_protocol_for_gpus_is_refused_elsewhere(photos, tmp_path):
    config = load_config(None, arguments(photos, tmp_path / "run", "protocol.gpus=1"))
    with pytest.raises(ConfigError, match=r"protocol\.gpus=1, and this run has 1 x cpu"):
        pretrain(config, say=lambda _: None)
