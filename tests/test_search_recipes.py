"""Every recipe of a search loads, and its header tells the truth about its commands and its cost."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from mae_et.config import SearchConfig, load_config
from mae_et.curriculum.search import Candidate
from mae_et.curriculum.stage import as_size
from mae_et.curriculum.table import quantity
from mae_et.search.images import SearchImages
from mae_et.search.run import axis_of, choose_candidates, load_recipe, planned_cost
from mae_et.search.trainings import Trainings
from mae_et.training import load_any
from tests.recipes import REPOSITORY, check_estimate, commands, recipes, written

RECIPES = recipes("search")
# Images that train, and classes, once those that score are held out.
COUNTS = {"fashion_mnist": (54_000, 10), "imagenet1k": (1_255_544, 1000)}

every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


class Counted:
    """Images of which there is but a number."""

    def __init__(self, images: int, classes: int):
        self.images, self.name, self.channels = images, "counted", 3
        self.classes = tuple(str(number) for number in range(classes))
        self.labels = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return self.images

    def image(self, i: int):
        raise AssertionError("a plan opens no image")

    def label(self, i: int) -> int:
        raise AssertionError("a plan reads no label")

    def describe(self, i: int) -> str:
        return str(i)


def trainings_of(path: Path) -> Trainings:
    config = load_config(path, [], SearchConfig)
    recipe = load_recipe(config)
    source = Counted(*COUNTS[recipe.data.source])
    return Trainings(config, recipe, SearchImages(source, source, source), axis_of(config), lambda _line: None)


@every_recipe
def test_a_header_gives_the_commands_and_they_load(path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    searches = commands(path, "mae_et search")
    assert searches
    for command in searches:
        assert REPOSITORY / command.config == path
        load_recipe(load_config(command.config, command.overrides, SearchConfig))
    run = load_config(path, [], SearchConfig).run
    (found,) = [*commands(path, "pretrain.py"), *commands(path, "finetune.py")]
    (curriculum,) = [word for word in found.overrides if word.startswith("curriculum=")]
    assert curriculum == f"curriculum={run}/curriculum.yaml"
    load_any(found.config, [word for word in found.overrides if word != curriculum])


@every_recipe
def test_the_cost_is_that_of_the_plans(path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    trainings = trainings_of(path)
    candidates = choose_candidates(trainings.search, trainings)
    planned = planned_cost(trainings.search, trainings, candidates)
    cost = written(path, r"cost: ([\d.]+) equivalent epochs, ([\d.]+ [TPE])FLOPs")
    assert float(cost[1]) == pytest.approx(planned.epochs, rel=1e-4)
    assert cost[2] == quantity(planned.flops)
    if not re.search("two Zen 5 cores", path.read_text()):
        check_estimate(path, planned.flops)


@every_recipe
def test_a_header_says_what_was_published_and_what_was_run(path):
    assert written(path, r"published: (.+)")[1]
    assert written(path, r"here: (.+)")[1]


def test_the_papers_search(monkeypatch):
    """EfficientTrain++: Swin-T, 2/3 of 300 epochs, 10 epochs of fine-tuning before a score."""
    monkeypatch.chdir(REPOSITORY)
    config = load_config(REPOSITORY / "configs" / "search" / "swin_tiny_imagenet.yaml", [], SearchConfig)
    recipe = load_recipe(config)
    assert (config.algorithm, recipe.epochs, config.settle * recipe.epochs) == ("sequential", 200, 10)
    assert [Candidate(as_size(size)).name for size in config.bandwidths] == ["96", "128", "160", "192", "224"]
