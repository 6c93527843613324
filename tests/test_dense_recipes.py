"""Recipes of detection and segmentation: each loads and plans, and its header tells the truth."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import timm
import yaml

from mae_et.config import DetectConfig, FinetuneConfig, PretrainConfig, SegmentConfig, load_config
from mae_et.curriculum import Plan
from mae_et.curriculum.stage import as_size
from mae_et.dense import dense_plan, learning_rate
from mae_et.detecting import plan_detection
from mae_et.segmenting import examination, plan_segmentation
from tests.recipes import (
    REPOSITORY,
    Command,
    check_cost,
    check_estimate,
    claim,
    commands,
    keys_of_the_prose,
    printed,
    recipes,
    written,
)

SCHEMAS = {"detect": DetectConfig, "segment": SegmentConfig}
RECIPES = [path for kind in SCHEMAS for path in recipes(kind)]
PUBLISHED = [path for path in RECIPES if path.stem.startswith(("coco", "ade20k"))]
# Keys that neither the network nor the cost of a step depends on; batches are checked for themselves.
BESIDE_THE_PLAN = {"run", "checkpoint", "data", "data.root", "data.names", "optim.accumulation"}

every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
every_published_recipe = pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)


@cache
def loaded(path: Path, *overrides: str) -> DetectConfig | SegmentConfig:
    """The run that a recipe and overrides come to."""
    return load_config(path, overrides, SCHEMAS[path.parent.name])


def named(name: str) -> DetectConfig | SegmentConfig:
    """A recipe by its name."""
    (path,) = [path for path in RECIPES if path.stem == name]
    return loaded(path)


@cache
def made() -> dict[str, str | None]:
    """The network of every run that recipes of pretraining and of training on labels make."""
    networks: dict[str, str | None] = {}
    for kind, schema in (("pretrain", PretrainConfig), ("supervised", FinetuneConfig)):
        for path in recipes(kind):
            config = load_config(path, [], schema)
            # Loading each command as well takes seconds; other tests do.
            for overrides in ([], *(command.overrides for command in commands(path, schema.PROGRAM))):
                changed = dict(override.split("=", 1) for override in overrides)
                networks[changed.get("run", config.run)] = changed.get("model.name", config.model.name)
    return networks


@cache
def plan_of(path: Path, *overrides: str) -> Plan:
    """The plan of a command whose network is not the header's."""
    config = loaded(path, *overrides)
    return plan_detection(config) if isinstance(config, DetectConfig) else plan_segmentation(config)


def check_command(path: Path, command: Command) -> None:
    """What a command starts fits its ranks; where it changes the network, the plan of that is made as well."""
    config, plan = loaded(path, *command.overrides), printed(path).plan
    optim, stage = config.optim, plan.stages[-1]
    micro, left = divmod(optim.batch, command.ranks * optim.accumulation)
    assert left == 0
    assert not (isinstance(config, SegmentConfig) and config.model.norm == "batch") or micro >= 2
    # Refuses a batch that ranks and micro-batches do not divide, and a schedule that is none.
    dense_plan(config, stage.bandwidth, 1, 1.0, plan.images, command.ranks)
    if not {override.partition("=")[0] for override in command.overrides} <= BESIDE_THE_PLAN:
        network = made()[config.checkpoint] if config.checkpoint else config.model.name
        own = [override for override in command.overrides if override.partition("=")[0] not in BESIDE_THE_PLAN]
        numbers = [f"data.images={plan.images}", "data.classes=150", f"model.name={network}"]
        assert plan_of(path, *own, *numbers).stages[-1].bandwidth == as_size(config.data.size)


@every_recipe
def test_a_header_gives_the_commands_and_they_load(path):
    starts = commands(path, loaded(path).PROGRAM)
    assert starts
    for command in starts:
        assert REPOSITORY / command.config == path
        config = loaded(path, *command.overrides)
        # A command without a checkpoint is one from scratch, and names its network.
        assert config.checkpoint or config.model.name
        assert config.data.root
        check_command(path, command)


@every_recipe
def test_the_cost_is_what_the_plan_command_prints(path):
    check_cost(path, printed(path).text)
    config, plan = loaded(path), printed(path).plan
    if config.steps is None:
        assert plan.equivalent_epochs == pytest.approx(config.epochs, rel=0.01)
    else:
        assert plan.total_steps == config.steps


@every_recipe
def test_gpu_hours_follow_from_their_assumption(path):
    check_estimate(path, printed(path).plan.total_flops)


@every_recipe
def test_a_header_says_what_was_published_and_what_was_run(path):
    published = claim(path, "published")
    assert published.startswith("no published result") or re.search(r"\d %.*\(.+\)", published)
    assert written(path, r"here: (.+)")[1]


@every_recipe
def test_keys_of_the_prose_exist(path):
    load_config(path, keys_of_the_prose(path), SCHEMAS[path.parent.name])


def test_no_two_recipes_share_a_folder():
    runs = [loaded(path).run for path in RECIPES]
    assert len(runs) == len(set(runs))
    assert not set(runs) & set(made())


@every_recipe
def test_checkpoints_are_those_that_other_recipes_make(path):
    for command in commands(path, loaded(path).PROGRAM):
        checkpoint = loaded(path, *command.overrides).checkpoint or ""
        if checkpoint.startswith("timm/"):
            name, _, tag = checkpoint.removeprefix("timm/").partition(".")
            assert f"{name}.{tag}" in timm.list_pretrained(name + "*")
        elif checkpoint.startswith("runs/"):
            assert checkpoint in made(), f"{path.name}: nothing makes {checkpoint}"


def test_files_say_their_task():
    """`plan` reads it before anything else; without it a file is taken for pretraining."""
    for path in RECIPES:
        assert yaml.safe_load(path.read_text())["task"] == path.parent.name


@every_published_recipe
def test_published_recipes_train_on_all_of_train_and_look_at_val_once(path):
    config = loaded(path)
    assert (config.data.holdout, config.data.val_split, config.data.test_split) == (0, None, None)
    assert config.checkpoint is None  # the commands name it
    assert config.model.name is None


@pytest.mark.parametrize("name", ["coco_retinanet_1x", "coco_cascade_mask_rcnn_1x"])
def test_the_1x_schedule(name):
    """mmdetection's schedule_1x, as Swin's authors have it: 12 epochs, tenths after 8 and 11, 500 steps of warm-up."""
    config = named(name)
    plan = printed(REPOSITORY / "configs" / "detect" / f"{name}.yaml").plan
    rate, epoch = learning_rate(config.optim), 1 / 12
    assert (config.epochs, config.optim.batch, config.optim.name) == (12, 16, "adamw")
    assert [rate(epoch * passed) for passed in (7.9, 8.1, 10.9, 11.1)] == pytest.approx([1e-4, 1e-5, 1e-5, 1e-6])
    assert config.optim.warmup * plan.total_steps == pytest.approx(500, abs=1)
    assert (config.optim.weight_decay, config.optim.layer_decay, config.optim.clip) == (0.05, None, None)


def test_heads_of_table_17():
    """RetinaNet: mmdetection's retinanet_swin-t-p4-w7_fpn_1x_coco.py; the cascade: Swin's authors' adamw_1x_coco.py."""
    retina, cascade = named("coco_retinanet_1x"), named("coco_cascade_mask_rcnn_1x")
    assert isinstance(retina, DetectConfig)
    assert isinstance(cascade, DetectConfig)
    assert (retina.model.head, retina.model.drop_path, retina.data.scale) == ("retinanet", 0.2, [1.0, 1.0])
    assert (cascade.model.head, cascade.model.drop_path) == ("cascade_mask_rcnn", 0.0)
    # Short sides of 480 to 800 px of the usual 480 x 640 images.
    assert [round(cascade.data.size * 480 / 640 * scale) for scale in cascade.data.scale] == [490, 816]
    assert cascade.model.box_head == "conv"
    for config in (retina, cascade):
        assert (config.evaluation.score, config.evaluation.overlap, config.evaluation.most) == (0.05, 0.5, 100)
        assert config.model.anchor_scale == 1


def test_vitdet():
    """arXiv 2203.16527, appendix A.2 and Table 11; steps from detectron2's mask_rcnn_vitdet_b_100ep.py."""
    config = named("coco_vitdet_base")
    assert isinstance(config, DetectConfig)
    plan = printed(REPOSITORY / "configs" / "detect" / "coco_vitdet_base.yaml").plan
    assert (config.epochs, config.optim.batch, config.optim.lr, config.optim.weight_decay) == (100, 64, 1e-4, 0.1)
    assert (config.optim.layer_decay, config.model.drop_path, config.optim.decay) == (0.7, 0.1, "steps")
    assert config.optim.warmup * plan.total_steps == pytest.approx(250, abs=1)
    assert config.optim.drops == pytest.approx([163_889 / 184_375, 177_546 / 184_375], abs=5e-4)
    assert (config.data.size, config.data.scale) == (1024, [0.1, 2.0])
    model = config.model
    assert (model.head, model.box_head, model.window, model.global_blocks) == ("mask_rcnn", "conv", 14, 4)
    assert (model.channels, model.representation, model.mask_channels, model.samples) == (256, 1024, 256, 512)


@pytest.mark.parametrize(
    ("name", "steps", "rate", "weight_decay", "layer_decay", "drop_path", "channels"),
    [
        ("ade20k_upernet_80k", 80_000, 6e-5, 0.01, None, 0.3, 512),
        ("ade20k_upernet_160k", 160_000, 6e-5, 0.01, None, 0.3, 512),
        ("ade20k_upernet_vit_base", 160_000, 1e-4, 0.05, 0.65, 0.1, 768),
    ],
)
def test_upernet(name, steps, rate, weight_decay, layer_decay, drop_path, channels):
    """Swin's authors' upernet_swin_tiny_..._160k_ade20k.py; ViT-B: implus/mae_segmentation."""
    config = named(name)
    assert isinstance(config, SegmentConfig)
    optim, model, data = config.optim, config.model, config.data
    assert (config.steps, optim.batch, optim.decay, optim.min_lr) == (steps, 16, "linear", 0)
    assert (optim.lr, optim.weight_decay, optim.layer_decay) == (rate, weight_decay, layer_decay)
    assert optim.warmup * steps == pytest.approx(1500)
    assert (model.drop_path, model.channels, model.head_channels) == (drop_path, channels, channels)
    assert (model.norm, model.auxiliary, model.dropout) == ("batch", 0.4, 0.1)
    assert (data.size, data.scale, data.category_share, data.photometric) == (512, [0.5, 2.0], 0.75, True)
    assert (config.evaluation.scales, config.evaluation.flip) == ([0.5, 0.75, 1.0, 1.25, 1.5, 1.75], True)
    shown = examination(config)
    assert (shown.short, shown.longest) == (512, 2048)
    # Swin's and DeiT's test images are seen whole, MAE's through windows of 512 px that move by 341.
    expected = ((512, 512), (341, 341)) if name == "ade20k_upernet_vit_base" else (None, None)
    assert (shown.window, shown.stride) == expected
