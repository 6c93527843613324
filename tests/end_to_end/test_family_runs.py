"""Runs under what a stage can say besides its B: batch, visible patches, filter and magnitude."""

from __future__ import annotations

import json

import pytest

from mae_et.config import ConfigError, load_config
from mae_et.curriculum.plan import Plan
from mae_et.evaluation import accuracy
from mae_et.pretraining import pretrain
from tests.end_to_end.labelled import TINY_VIT, finetune_here, write_classes
from tests.end_to_end.tiny import arguments, history, run_here, weights

# Two stages of four steps of 16, and of eight steps of 8 images; the first sees 6 of 16 patches, filtered.
FAMILY = (
    "curriculum.stages=[{end: 0.5, bandwidth: 8, batch_scale: 2, visible: 6, low_pass: 2.5}, {end: 1, bandwidth: 16}]",
    "curriculum.axis=epoch",
    "curriculum.lr_cap=1.0",
    "optim.accumulation=2",
)


def test_larger_batches_and_filters_resume_to_the_bit_around_the_boundary(photos, tmp_path):
    whole = run_here(photos, tmp_path / "whole", *FAMILY)
    plan = Plan.from_dict(json.loads((whole / "plan.json").read_text()))
    assert [stage.batch for stage in plan.stages] == [16, 8]
    boundary = plan.boundaries[1]
    config = load_config(None, arguments(photos, tmp_path / "parts", *FAMILY))
    for stop in (boundary - 1, boundary, boundary + 1, plan.total_steps):
        # `until` is a fraction: that of the step itself.
        assert pretrain(config, say=lambda _: None, until=plan.u(stop)) == 0
    assert history(tmp_path / "parts") == history(whole)
    assert weights(tmp_path / "parts") == weights(whole)


@pytest.mark.parametrize("change", ["low_pass: 2.5", "visible: 6", "batch_scale: 2"])
def test_each_of_them_changes_what_is_learned(photos, tmp_path, change):
    plain = "curriculum.stages=[{end: 1, bandwidth: 16}]"
    changed = f"curriculum.stages=[{{end: 1, bandwidth: 16, {change}}}]"
    more = ("curriculum.lr_cap=1.0", "curriculum.more_tokens=true", "epochs=1")
    assert weights(run_here(photos, tmp_path / "a", plain, *more)) != weights(
        run_here(photos, tmp_path / "b", changed, *more)
    )


def test_two_step_augmentation_reaches_the_images(tmp_path):
    images = write_classes(tmp_path / "images")
    stages = "curriculum.stages=[{{end: 0.5, bandwidth: 16, magnitude: {}}}, {{end: 1, bandwidth: 16}}]"
    runs = [
        finetune_here(images, tmp_path / str(first), *TINY_VIT, stages.format(first), "epochs=2", "model.drop_path=0")
        for first in (0, 9)
    ]
    plans = [Plan.from_dict(json.loads((run / "plan.json").read_text())) for run in runs]
    assert [plan.at(0).magnitude for plan in plans] == [0, 9]
    assert weights(runs[0]) != weights(runs[1])


@pytest.mark.parametrize(("follow", "sizes"), [("false", [16, 16, 16]), ("true", [6, 6, 16])])
def test_accuracy_is_taken_at_the_final_size_or_the_stages(tmp_path, monkeypatch, follow, sizes):
    seen: list[int] = []

    class Watched(accuracy.EvalTransform):
        def __init__(self, size, crop_fraction):
            seen.append(size[0])
            super().__init__(size, crop_fraction)

    monkeypatch.setattr(accuracy, "EvalTransform", Watched)
    images = write_classes(tmp_path / "images")
    stages = "curriculum.stages=[{end: 0.6, bandwidth: 6}, {end: 1, bandwidth: 16}]"
    how = ("evaluation.every=0.25", f"evaluation.follow_stage={follow}", "epochs=3")
    finetune_here(images, tmp_path / "run", *TINY_VIT, stages, *how)
    # Three looks on the way, and at the end held-out and test images, which are always at the final size.
    assert seen[:3] == sizes
    assert seen[3:] == [16, 16]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("curriculum.early_large_batch=true", r"say with curriculum\.lr_cap"),
        ("curriculum.stages=[{end: 1, bandwidth: 16, visible: 65}]", r"visible=65 is not among its 1 to 64 patches"),
        ("curriculum.stages=[{end: 1, bandwidth: 16, low_pass: -1}]", r"low_pass=-1.*above 0"),
        ("curriculum.stages=[{end: 1, bandwidth: 16, mask_ratio: 0.5, visible: 3}]", r"a stage takes one of them"),
        ("curriculum.growth={first: 4, step: 4, every: 1}", r"reaches 16 px at epoch 3, and the run ends at epoch 3"),
        ("curriculum.stages=[{end: 1, bandwidth: 32}]", r"B=32 is above the final size 16: raise data\.size"),
        ("curriculum.stages=[{end: 1, bandwidth: 16, magnitude: [0, 5, 6]}]", r"magnitude=.* must be a number or"),
        ("curriculum=nosuch.yaml", r"there is no curriculum file nosuch\.yaml"),
        ("curriculum.axis=time", r"curriculum\.axis='time' is not one of"),
        ("curriculum.growth={frist: 4}", r"unknown key 'curriculum.growth.frist'"),
        ("curriculum.preset=lienar", r"unknown curriculum 'lienar'"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(photos, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        pretrain(load_config(None, arguments(photos, tmp_path / "run", change)), say=lambda _: None)
    assert not (tmp_path / "run" / "plan.json").exists()
