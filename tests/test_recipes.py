"""Every recipe loads and plans, and its header tells the truth about its commands and its cost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mae_et.__main__ import main
from mae_et.config import PretrainConfig, load_config
from mae_et.data.sources import count_images
from mae_et.planning import build_plan, final_size, peak_learning_rate
from mae_et.pretraining import build_model
from mae_et.sizes import hog_cell
from tests.recipes import REPOSITORY, check_cost, check_estimate, commands, recipes, written

RECIPES = recipes("pretrain")

every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def planned_images(path: Path) -> int:
    """Images that the header's plan is made for: those it names, else those of a set whose count is published."""
    (command,) = commands(path, "mae_et plan")
    data = load_config(path, command.overrides).data
    return data.images or count_images(data.source, data.root, data.split)


def sizes(path: Path, overrides: list[str]) -> list[int]:
    """B of each stage."""
    return [stage.bandwidth[0] for stage in build_plan(load_config(path, overrides), 100_000).stages]


@every_recipe
def test_loads_and_plans(path):
    config = load_config(path)
    # A number of images of its own stands in for sets that are not on this machine.
    plan = build_plan(config, 100_000)
    assert plan.stages[-1].bandwidth == final_size(config)
    assert plan.equivalent_epochs == pytest.approx(config.epochs, rel=0.01)


@every_recipe
def test_a_header_gives_the_commands_and_they_load(path):
    trainings = commands(path, "pretrain.py")
    assert trainings
    for command in trainings:
        assert REPOSITORY / command.config == path
        config = load_config(path, command.overrides)
        # The plan refuses a batch that ranks and accumulation do not divide.
        plan = build_plan(config, planned_images(path), command.ranks)
        assert plan.stages[-1].bandwidth == final_size(config)
        check_model(config)


def check_model(config: PretrainConfig) -> None:
    """The model can be built; on the meta device, where weights take no memory."""
    with torch.device("meta"):
        model = build_model(config)
    assert model.cell == config.target.cell


@every_recipe
def test_the_cost_is_what_the_plan_command_prints(path, monkeypatch, capsys):
    (command,) = commands(path, "mae_et plan")
    assert command.words[:4] == ["python", "-m", "mae_et", "plan"]
    assert REPOSITORY / command.config == path
    monkeypatch.chdir(REPOSITORY)
    assert main(command.words[3:]) == 0
    check_cost(path, capsys.readouterr().out)


@every_recipe
def test_gpu_hours_follow_from_their_assumption(path):
    check_estimate(path, build_plan(load_config(path), planned_images(path)).total_flops)


@every_recipe
def test_a_header_says_what_was_published_and_what_was_run(path):
    published = written(path, r"published: (.+)")[1]
    assert published.startswith("no published result") or re.search(r"\d %", published)
    assert written(path, r"here: (.+)")[1]


@pytest.mark.parametrize(
    ("name", "epochs", "preset", "targets", "accuracy"),
    [
        ("vit_base_mae1600", 1600, "baseline", "norm_pixel", 83.6),
        ("vit_base_mae400", 400, "baseline", "norm_pixel", 83.0),
        ("vit_base_mae1600_hog", 1600, "baseline", "hog", 83.7),
        ("vit_base_mae400_hog", 400, "baseline", "hog", 83.2),
        ("vit_base_et400_hog", 400, "efficienttrain_pp", "hog", 83.7),
    ],
)
def test_rows_of_table_15(name, epochs, preset, targets, accuracy):
    """EfficientTrain++, Table 15: the five rows on top of MAE."""
    path = REPOSITORY / "configs" / "pretrain" / f"{name}.yaml"
    config = load_config(path)
    assert (config.epochs, config.curriculum.preset, config.target.kind) == (epochs, preset, targets)
    assert (config.model.name, config.data.size, config.mask_ratio) == ("vit_base", 224, 0.75)
    assert peak_learning_rate(config) == pytest.approx(2.4e-3)  # 1.5e-4 per 256, batch 4096
    # MAE warms up for 40 epochs whatever the run's length (PRETRAIN.md).
    assert config.optim.warmup * config.epochs == pytest.approx(40)
    assert written(path, r"published: (.+)")[1].startswith(f"{accuracy:.1f} % top-1")


def test_rows_of_table_15_differ_in_nothing_else():
    folder = REPOSITORY / "configs" / "pretrain"
    named = ("vit_base_mae1600", "vit_base_mae400", "vit_base_mae1600_hog", "vit_base_mae400_hog", "vit_base_et400_hog")
    # `downsample` acts below 224 px only, so it is the curriculum's business.
    same = ["run=x", "epochs=1", "optim.warmup=0", "target.kind=hog", "curriculum.preset=baseline"]
    same.append("data.downsample=resize")
    first, *others = [load_config(folder / f"{name}.yaml", same) for name in named]
    assert all(other == first for other in others)


@pytest.mark.parametrize(
    ("name", "cell", "expected"),
    [
        ("vit_base_et400_hog", 8, [96, 160, 224]),
        ("vit_huge14_et400_hog", 7, [98, 154, 224]),
        ("cifar10", 2, [14, 22, 32]),
        ("fashion_mnist", 2, [12, 20, 28]),
    ],
)
def test_sizes_of_the_stages(name, cell, expected):
    path = REPOSITORY / "configs" / "pretrain" / f"{name}.yaml"
    assert sizes(path, []) == expected
    config = load_config(path)
    assert hog_cell(config.model.patch_size, config.target.cell) == cell


def test_cifar10_serves_cifar100():
    path = REPOSITORY / "configs" / "pretrain" / "cifar10.yaml"
    (command,) = [command for command in commands(path, "pretrain.py") if "data.source=cifar100" in command.overrides]
    config = load_config(path, command.overrides)
    assert config.run == "runs/cifar100"
    assert count_images(config.data.source) == 50_000
