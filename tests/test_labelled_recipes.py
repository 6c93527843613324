"""Recipes of fine-tuning, supervised training and probes: each loads and plans, and its header tells the truth."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml

from mae_et.config import FinetuneConfig, PretrainConfig, ProbeConfig, load_config
from mae_et.curriculum import Plan
from mae_et.exchange.backbone import Backbone, choose_backbone
from mae_et.finetuning import drop_path
from mae_et.labelled_plan import build_plan, check_batch, examination_size, peak_learning_rate
from mae_et.probing import as_finetuning
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

SCHEMAS = {"finetune": FinetuneConfig, "supervised": FinetuneConfig, "probe": ProbeConfig}
RECIPES = [path for kind in SCHEMAS for path in recipes(kind)]
# Keys that neither the network nor its schedule depends on; batches are checked for themselves.
BESIDE_THE_PLAN = {"run", "checkpoint", "data", "data.root", "data.shots", "data.subset_seed", "optim.accumulation"}
IMAGENET = {"images": 1_281_167, "classes": 1000}


def schema_of(path: Path) -> type[FinetuneConfig] | type[ProbeConfig]:
    return SCHEMAS[path.parent.name]


@cache
def loaded(path: Path, *overrides: str) -> FinetuneConfig | ProbeConfig:
    """The run that a recipe and overrides come to."""
    return load_config(path, overrides, schema_of(path))


def is_trained(path: Path) -> bool:
    """Whether steps are made: not by protocols on cached features, of which there is no plan."""
    config = loaded(path)
    return isinstance(config, FinetuneConfig) or config.protocol == "mae"


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


every_recipe = pytest.mark.parametrize("path", RECIPES, ids=name_of)
every_trained_recipe = pytest.mark.parametrize("path", [path for path in RECIPES if is_trained(path)], ids=name_of)


def planned_model(path: Path) -> list[str]:
    """The network of the header's plan, where the recipe takes its checkpoint's."""
    (command,) = commands(path, "mae_et plan")
    return [override for override in command.overrides if override.startswith("model.")]


def load(path: Path, overrides: list[str]) -> FinetuneConfig:
    """The run that a command starts, without its checkpoint, which is not on this machine."""
    config = loaded(path, *planned_model(path), *overrides)
    return replace(config if isinstance(config, FinetuneConfig) else as_finetuning(config), checkpoint=None)


def backbone_of(config: FinetuneConfig) -> Backbone:
    return choose_backbone(config.model, config.data, None)


@cache
def plan_of(path: Path, *overrides: str) -> Plan:
    """The plan of a command other than the header's own, of as many images and a thousand classes."""
    config = load(path, list(overrides))
    return build_plan(config, backbone_of(config), printed(path).plan.images, IMAGENET["classes"])


def check_command(path: Path, command: Command) -> None:
    """What a command starts fits its ranks; where it changes the network or its schedule, its plan is made as well."""
    config = load(path, command.overrides)
    plan = printed(path).plan
    keys = {override.partition("=")[0] for override in command.overrides}
    if not keys <= BESIDE_THE_PLAN:
        plan = plan_of(path, *command.overrides)
    assert plan.stages[-1].bandwidth == backbone_of(config).size
    assert config.optim.batch % (command.ranks * config.optim.accumulation) == 0
    check_batch(config, command.ranks)


@every_recipe
def test_a_header_gives_the_commands_and_they_load(path):
    starts = commands(path, schema_of(path).PROGRAM)
    assert starts
    for command in starts:
        assert REPOSITORY / command.config == path
        config = loaded(path, *command.overrides)
        # A command without a checkpoint is one from scratch, and names its network.
        assert config.checkpoint or (config.model.name and not isinstance(config, ProbeConfig))
        if is_trained(path):
            check_command(path, command)


@every_trained_recipe
def test_the_cost_is_what_the_plan_command_prints(path):
    check_cost(path, printed(path).text)
    config, plan = load(path, []), printed(path).plan
    by_epochs = config.curriculum.growth.first is not None
    spent = sum(stage.passes for stage in plan.stages) if by_epochs else plan.equivalent_epochs
    assert spent == pytest.approx(config.epochs, rel=0.01)


@every_trained_recipe
def test_gpu_hours_follow_from_their_assumption(path):
    flops = printed(path).plan.total_flops
    assert flops is not None
    check_estimate(path, flops)


@every_recipe
def test_a_header_says_what_was_published_and_what_was_run(path):
    published = claim(path, "published")
    assert published.startswith("no published result") or re.search(r"\d %.*\(.+\)", published)
    assert written(path, r"here: (.+)")[1]


@every_recipe
def test_keys_of_the_prose_exist(path):
    own = [override for override in keys_of_the_prose(path) if not override.startswith(("data=", "checkpoint="))]
    load_config(path, own, schema_of(path))


def test_no_two_recipes_share_a_folder():
    runs = [loaded(path).run for path in RECIPES]
    runs += [load_config(path, [], PretrainConfig).run for path in recipes("pretrain")]
    assert len(runs) == len(set(runs))


def test_checkpoints_are_those_that_other_recipes_make():
    made = {load_config(path, [], PretrainConfig).run for path in recipes("pretrain")}
    for path in recipes("pretrain"):
        made |= {load_config(path, command.overrides).run for command in commands(path, "pretrain.py")}
    for path in RECIPES:
        for command in commands(path, schema_of(path).PROGRAM):
            made.add(loaded(path, *command.overrides).run)
    for path in RECIPES:
        for command in commands(path, schema_of(path).PROGRAM):
            checkpoint = loaded(path, *command.overrides).checkpoint or ""
            if checkpoint.startswith("timm/"):
                name, _, tag = checkpoint.removeprefix("timm/").partition(".")
                assert f"{name}.{tag}" in timm.list_pretrained(name + "*")
            elif checkpoint.startswith("runs/"):
                assert checkpoint in made, f"{path.name}: nothing makes {checkpoint}"


@every_recipe
def test_test_data_choose_nothing(path):
    """ImageNet's published recipes train on all of train and hold nothing out; everywhere else something is."""
    data = loaded(path).data
    assert data.test_split is None or data.test_split != data.val_split
    assert (data.holdout == 0) == data.source.startswith("imagenet")


@pytest.mark.parametrize(
    ("name", "epochs", "rate", "layer_decay", "rate_of_drop_path"),
    [
        ("vit_base_in1k", 100, 2e-3, 0.65, 0.1),
        ("vit_large_in1k", 50, 4e-3, 0.75, 0.2),
        ("vit_huge14_in1k", 50, 4e-3, 0.75, 0.3),
    ],
)
def test_mae_fine_tuning(name, epochs, rate, layer_decay, rate_of_drop_path):
    """facebookresearch/mae, FINETUNE.md, and the defaults of its main_finetune.py."""
    config = load(REPOSITORY / "configs" / "finetune" / f"{name}.yaml", [])
    assert (config.epochs, config.optim.layer_decay, drop_path(config)) == (epochs, layer_decay, rate_of_drop_path)
    assert peak_learning_rate(config) == pytest.approx(rate)
    assert config.optim.warmup * config.epochs == pytest.approx(5)
    assert (config.optim.name, config.optim.batch, config.optim.weight_decay) == ("adamw", 1024, 0.05)
    assert (config.optim.min_lr, config.optim.clip, config.optim.ema) == (1e-6, None, None)
    augment = config.augment
    assert (augment.magnitude, augment.magnitude_std, augment.erasing) == ([9.0, 9.0], 0.5, 0.25)
    assert (augment.mixup, augment.cutmix, augment.smoothing, augment.switch_probability) == (0.8, 1.0, 0.1, 0.5)
    assert (config.model.pooling, config.model.head_std, config.evaluation.crop_fraction) == ("mean", 2e-5, 0.875)
    assert (config.data.scale, config.data.repeats, config.data.holdout) == ([0.08, 1.0], 1, 0)
    assert config.curriculum.preset == "baseline"


@pytest.mark.parametrize(("name", "epochs"), [("vit_base_in1k", 90), ("vit_large_in1k", 50)])
def test_mae_linear_probe(name, epochs):
    """facebookresearch/mae, FINETUNE.md, and the defaults of its main_linprobe.py."""
    config = load_config(REPOSITORY / "configs" / "probe" / f"{name}.yaml", [], ProbeConfig)
    optim = config.optim
    assert (config.protocol, config.epochs, config.model.pooling) == ("mae", epochs, "cls")
    assert (optim.name, optim.batch, optim.weight_decay, optim.min_lr) == ("lars", 16384, 0, 0)
    assert peak_learning_rate(as_finetuning(config)) == pytest.approx(6.4)
    assert optim.warmup * epochs == pytest.approx(10, rel=1e-3)  # the recipe rounds
    # MAE's BatchNorm sees 512 images a GPU.
    path = REPOSITORY / "configs" / "probe" / f"{name}.yaml"
    for command in commands(path, "linear_probe.py"):
        accumulation = load_config(path, command.overrides, ProbeConfig).optim.accumulation
        assert optim.batch // (command.ranks * accumulation) == 512


STANDARD, CONVNEXT = [96, 160, 224], [160, 160, 224]
DEIT = [96, 160, 192, 224]


@pytest.mark.parametrize(
    ("name", "sizes", "optimizer", "rate", "rate_of_drop_path", "clip", "ema"),
    [
        ("resnet50", STANDARD, "adamw", 4e-3, 0.0, None, None),
        ("convnext_tiny", CONVNEXT, "adamw", 4e-3, 0.1, None, 0.9999),
        ("deit_small", DEIT, "adamw", 4e-3, 0.1, 5.0, None),
        ("deit_tiny", DEIT, "adamw", 4e-3, 0.1, 5.0, None),
        ("swin_tiny", STANDARD, "adamw", 4e-3, 0.2, 5.0, None),
        ("caformer_s18", STANDARD, "lamb", 8e-3, 0.15, None, None),
        ("pvt_v2_b1", STANDARD, "adamw", 4e-3, 0.1, 5.0, None),
    ],
)
def test_supervised_recipes(name, sizes, optimizer, rate, rate_of_drop_path, clip, ema):
    """The released scripts; CAFormer and PVTv2, of which there is none, by their own repositories or by ours."""
    path = REPOSITORY / "configs" / "supervised" / f"{name}.yaml"
    config, plan = load(path, []), printed(path).plan
    assert [stage.bandwidth[0] for stage in plan.stages] == sizes
    assert [stage.end for stage in plan.stages] == ([0.2, 0.6, 0.8, 1.0] if len(sizes) == 4 else [0.2, 0.6, 1.0])
    assert plan.cost_unit == "pixels"
    assert (config.optim.name, config.optim.batch, config.optim.weight_decay) == (optimizer, 4096, 0.05)
    assert (config.optim.clip, config.optim.ema, config.optim.layer_decay) == (clip, ema, None)
    assert peak_learning_rate(config) == pytest.approx(rate)
    assert (config.augment.magnitude, config.augment.staircase) == ([0.0, 10.0], True)
    assert (config.data.downsample, config.data.repeats, config.evaluation.crop_fraction) == ("lanczos", 1, 0.875)
    for epochs in (100, 150, 200, 300):
        assert drop_path(load(path, [f"epochs={epochs}"])) == pytest.approx(rate_of_drop_path * epochs / 200)


@pytest.mark.parametrize(
    ("name", "expected"), [("resnet50", 20 / 1088), ("convnext_tiny", 20 / 392), ("swin_tiny", 20 / 1088)]
)
def test_warmup_ends_where_the_scripts_reach_their_peak(name, expected):
    """20 of the epochs that the whole budget would be at the first stage's size; to the digits that recipes write."""
    path = REPOSITORY / "configs" / "supervised" / f"{name}.yaml"
    assert load(path, []).optim.warmup == pytest.approx(expected, rel=0.002)
    first = printed(path).plan.stages[0]
    steps_an_epoch = IMAGENET["images"] // 4096
    step = round(load(path, []).optim.warmup / (first.end - first.start) * first.steps)
    assert step == pytest.approx(20 * steps_an_epoch, rel=0.005)


@pytest.mark.parametrize(
    "name", ["resnet50", "convnext_tiny", "deit_small", "deit_tiny", "swin_tiny", "pvt_v2_b1", "caformer_s18"]
)
def test_the_baseline_differs_in_the_schedule_alone(name):
    path = REPOSITORY / "configs" / "supervised" / f"{name}.yaml"
    (command,) = [found for found in commands(path, "finetune.py") if "curriculum.preset=baseline" in found.overrides]
    config = load(path, command.overrides)
    plan = plan_of(path, *command.overrides)
    assert [stage.bandwidth for stage in plan.stages] == [(224, 224)]
    assert plan.equivalent_epochs == pytest.approx(300)
    assert plan.at(0).magnitude == plan.at(plan.total_steps - 1).magnitude == 9
    # The scripts' bases are what the originals have at 300 epochs.
    assert drop_path(config) == load(path, []).model.drop_path
    assert config.optim.warmup * 300 == pytest.approx(20, rel=0.001)


def test_the_one_gpu_recipe():
    """BorealisAI/efficient-vit-training: varsize_1gpu_best.sh, and the defaults of its main.py."""
    path = REPOSITORY / "configs" / "supervised" / "deit_small_1gpu24h.yaml"
    config, plan = load(path, []), printed(path).plan
    assert [stage.bandwidth[0] for stage in plan.stages] == [32, 64, 96, 128, 160, 192, 224]
    assert [stage.passes for stage in plan.stages] == pytest.approx([5] * 6 + [270], rel=1e-3)
    assert peak_learning_rate(config) == pytest.approx(1e-3 * 64 / 512)
    optim, augment = config.optim, config.augment
    assert (optim.min_lr, optim.warmup, optim.weight_decay, optim.name) == (1e-5, 0, 0.05, "adamw")
    assert (optim.layer_decay, optim.clip, optim.ema) == (None, None, None)
    assert (augment.magnitude, augment.staircase, augment.smoothing) == ([9.0, 9.0], False, 0.1)
    assert (augment.mixup, augment.cutmix, augment.erasing) == (0.8, 1.0, 0.25)
    assert (config.data.repeats, config.data.downsample, drop_path(config)) == (3, "resize", 0.1)
    assert (config.protocol.wall_hours, config.protocol.gpus, config.model.locality) == (24, 1, True)


def test_the_small_race_has_its_proportions():
    large, small = (
        printed(REPOSITORY / "configs" / "supervised" / f"{name}.yaml").plan
        for name in ("deit_small_1gpu24h", "fashion_mnist_20min")
    )
    shares = [[stage.bandwidth[0] / plan.stages[-1].bandwidth[0] for stage in plan.stages] for plan in (large, small)]
    assert shares[0] == shares[1]
    assert [stage.end for stage in large.stages] == pytest.approx([stage.end for stage in small.stages])
    for plan, path in ((large, "deit_small_1gpu24h"), (small, "fashion_mnist_20min")):
        config = load(REPOSITORY / "configs" / "supervised" / f"{path}.yaml", [])
        assert config.optim.min_lr / plan.at(0).learning_rate == pytest.approx(0.08)
    hours = load(REPOSITORY / "configs" / "supervised" / "fashion_mnist_20min.yaml", []).protocol.wall_hours
    assert hours == pytest.approx(20 / 60, rel=1e-3)


def test_convnext_from_22k_to_1k():
    """facebookresearch/ConvNeXt, TRAINING.md; at 384 px only the size and the crop of test images differ."""
    folder = REPOSITORY / "configs" / "supervised"
    small, large = (load(folder / f"convnext_base_in22k_1k{suffix}.yaml", []) for suffix in ("", "_384"))
    optim = small.optim
    assert (optim.batch, peak_learning_rate(small), optim.min_lr, optim.weight_decay) == (512, 5e-5, 1e-6, 1e-8)
    assert (small.epochs, optim.warmup, drop_path(small)) == (30, 0, 0.2)
    assert (small.augment.mixup, small.augment.cutmix, small.augment.smoothing) == (0, 0, 0.1)
    assert (large.data.size, large.evaluation.crop_fraction) == (384, 1.0)
    assert examination_size(large, backbone_of(large)) == (384, 384)
    same = replace(large, run=small.run, data=replace(large.data, size=224), evaluation=small.evaluation)
    assert same == small


def test_vit_base_at_384_differs_in_size_alone():
    folder = REPOSITORY / "configs" / "finetune"
    small, large = (load(folder / f"vit_base_in1k{suffix}.yaml", []) for suffix in ("", "_384"))
    assert (large.data.size, large.evaluation.crop_fraction) == (384, 1.0)
    same = replace(large, run=small.run, data=replace(large.data, size=224), evaluation=small.evaluation)
    assert same == small


def test_layers_of_convnext_have_the_rates_that_its_authors_give_them():
    """12 groups at 0.8 (ConvNeXt's optim_factory.py), and here every block at the recipe's decay: within 16 %."""
    from mae_et.engine.optim import supervised_groups

    path = REPOSITORY / "configs" / "supervised" / "convnext_base_in22k_1k.yaml"
    config = load(path, [])
    net = backbone_of(config).build_without_data(IMAGENET["classes"])
    names = {parameter: name for name, parameter in net.named_parameters()}
    groups: Any = supervised_groups(net, config.optim.weight_decay, config.optim.layer_decay)
    scales = {names[parameter]: group["lr_scale"] for group in groups for parameter in group["params"]}

    def theirs(name: str) -> int:
        if not name.startswith("stages."):
            return 0 if name.startswith("stem.") else 13
        stage, block = (int(number) for number in re.findall(r"\d+", name)[:2])
        return (1, 2, 3 + block // 3, 12)[stage]

    kernels = [name for name in scales if re.fullmatch(r"stem\.0\.weight|head\.fc\.weight|.*conv_dw\.weight", name)]
    assert len(kernels) == 1 + 36 + 1
    for name in kernels:
        assert scales[name] == pytest.approx(0.8 ** (13 - theirs(name)), rel=0.16)


def test_files_say_their_task():
    """`plan` reads it before anything else; without it a file is taken for pretraining."""
    for path in RECIPES:
        assert yaml.safe_load(path.read_text())["task"] == schema_of(path)().task
