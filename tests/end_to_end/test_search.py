"""Whole searches, tiny: what they find is best, costs what was said, runs, and does not depend on interruptions."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mae_et.config import ConfigError, FinetuneConfig, SearchConfig, dump_config, load_config
from mae_et.curriculum.search import Candidate, cell_name
from mae_et.planning import build_plan
from mae_et.search.images import open_images_of
from mae_et.search.run import axis_of, choose_candidates, load_recipe, planned_cost, search
from mae_et.search.trainings import InterruptionError, Trainings
from mae_et.training import load_any, start
from tests.end_to_end.labelled import TINY_FINETUNE, TINY_VIT, write_classes
from tests.end_to_end.tiny import TINY, weights

SEQUENTIAL = ["stages=3", "bandwidths=[8,16]", "settle=0.12", "holdout=0.25"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_classes(tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="module")
def recipes(tmp_path_factory, images) -> dict[str, str]:
    """Files of a tiny pretraining and of a tiny training on labels."""
    folder = tmp_path_factory.mktemp("recipes")
    made = {
        "pretrain": load_config(None, [*TINY, f"data={images}", "run=unused"]),
        "finetune": load_config(None, [*TINY_FINETUNE, *TINY_VIT, f"data={images}", "run=unused"], FinetuneConfig),
    }
    for name, config in made.items():
        (folder / f"{name}.yaml").write_text(dump_config(config))
    return {name: str(folder / f"{name}.yaml") for name in made}


def configured(recipe: str, run: Path, *changes: str) -> SearchConfig:
    return load_config(None, [f"recipe={recipe}", f"run={run}", *SEQUENTIAL, *changes], SearchConfig)


def searched(recipe: str, run: Path, *changes: str) -> list[str]:
    """Search; returns what was said."""
    said: list[str] = []
    assert search(configured(recipe, run, *changes), said.append) == 0
    return said


def trainings_of(config: SearchConfig) -> Trainings:
    recipe = load_recipe(config)
    return Trainings(config, recipe, open_images_of(config, recipe), axis_of(config), lambda _line: None)


def candidates_for(trainings: Trainings) -> tuple[Candidate, ...]:
    return choose_candidates(trainings.search, trainings)


def scores(run: Path) -> dict[str, float]:
    return {
        str(path.relative_to(run)): json.loads(path.read_text())["score"]
        for path in sorted((run / "cells").rglob("score.json"))
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory, recipes) -> tuple[Path, list[str]]:
    """A search of a pretraining's curriculum that nothing interrupts, with all of its checkpoints, and what it said."""
    run = tmp_path_factory.mktemp("whole") / "search"
    return run, searched(recipes["pretrain"], run, "keep_checkpoints=true")


def test_finds_the_best_of_each_stage(whole):
    run, _ = whole
    found = json.loads((run / "search.json").read_text())
    rows = list(csv.DictReader((run / "search.csv").read_text().splitlines()))
    assert [(row["stage"], row["candidate"]) for row in rows] == [("1", "8"), ("1", "16"), ("2", "8"), ("2", "16")]
    chosen = []
    for stage in ("1", "2"):
        of_stage = {row["candidate"]: float(row["score"]) for row in rows if row["stage"] == stage}
        chosen.append(max(of_stage, key=lambda name: of_stage[name]))  # the smaller B is first
    assert found["curriculum"] == "-".join([*chosen, "16"])
    assert {row["trained"] for row in rows if row["stage"] == "2"} == {f"{chosen[0]}-8", f"{chosen[0]}-16"}
    assert (run / "pictures" / "search.png").stat().st_size > 5000


def test_costs_what_was_said(whole, recipes):
    """Before, after and by the plans: the numbers are the same."""
    run, said = whole
    found = json.loads((run / "search.json").read_text())
    assert found["spent"]["trainings"] == found["planned"]["trainings"] == 4
    for key in ("epochs", "flops"):
        assert found["spent"][key] == pytest.approx(found["planned"][key], rel=1e-12)
    costs = [re.search(r"4 trainings, ([\d.]+) equivalent epochs at B=16, ([\d.]+ \w)FLOPs", line) for line in said]
    before, after = (match.groups() for match in costs if match)
    assert before == after
    # What the runs themselves counted: compute in the last row of each training's metrics, less where it began.
    flops = 0.0
    for settled in (run / "cells").rglob("settled/metrics.jsonl"):
        trained = settled.parents[1] / "metrics.jsonl"
        first = json.loads(trained.read_text().splitlines()[0])
        last = json.loads(settled.read_text().splitlines()[-1])
        flops += last["compute/flops"] - first["compute/flops"]
        steps = json.loads((settled.parents[1] / "plan.json").read_text())["stages"]
        stage = next(s for s in steps if s["start"] <= first["compute/fraction"] <= s["end"] + 1e-9)
        flops += stage["batch"] * stage["flops_per_image"]  # of the first row's own step
    assert flops == pytest.approx(found["planned"]["flops"], rel=1e-9)


def test_a_candidate_continues_what_was_chosen(whole, recipes, tmp_path):
    """A cell of stage 2 has the weights and moments of one uninterrupted run with its curriculum, settled or not."""
    run, _ = whole
    found = json.loads((run / "search.json").read_text())
    trainings = trainings_of(configured(recipes["pretrain"], tmp_path / "x"))
    candidates = {candidate.name: candidate for candidate in candidates_for(trainings)}
    cell = tuple(candidates[name] for name in found["trials"][2]["trained"].split("-"))
    for until, folder in ((2 / 3, "seed0"), (2 / 3 + 0.12, "seed0/settled")):
        straight = tmp_path / folder
        config = trainings.config(cell, 0, straight)
        assert start(config, say=lambda _line: None, until=until, images=trainings.images.train) == 0
        assert weights(straight) == weights(run / "cells" / cell_name(cell) / folder)


def test_what_is_found_runs(whole, recipes, tmp_path):
    run, _ = whole
    file = run / "curriculum.yaml"
    found = json.loads((run / "search.json").read_text())["curriculum"].split("-")
    values = yaml.safe_load(file.read_text())
    assert (values["axis"], values["size"], values["stages"][-1]) == ("compute", 16, {"end": 1.0, "bandwidth": 16})
    ends = [stage["end"] for stage in values["stages"]]
    assert ends == sorted(set(ends))
    sides = [next(s["bandwidth"] for s in values["stages"] if (i + 0.5) / 3 < s["end"]) for i in range(3)]
    assert [str(side) for side in sides] == found
    config = load_any(recipes["pretrain"], [f"curriculum={file}", f"run={tmp_path / 'found'}"])
    assert start(config, say=lambda _line: None) == 0
    # Comments hold the evidence; another final size takes the stages in proportion.
    assert re.search(r"^# +8  +[\d.]+ %", file.read_text(), re.MULTILINE)
    larger = load_config(recipes["pretrain"], [f"curriculum={file}", "data.size=32"])
    bands = [stage.bandwidth[0] for stage in build_plan(larger, 100).stages]
    assert bands == [2 * stage["bandwidth"] for stage in values["stages"]]


@pytest.mark.parametrize("lost", ["cells and scores", "moment"])
def test_interruptions_change_nothing(whole, recipes, tmp_path, lost, monkeypatch):
    """Scores and folders that are gone (also those that others continue); ends amid trainings."""
    straight, _ = whole
    run = tmp_path / "search"
    if lost == "moment":
        calls = []

        def sometimes(config, resume, say, until, images):
            calls.append(config)
            if len(calls) not in (1, 6):
                return start(config, resume, say, until, images)
            assert start(config, resume, say, until - 0.12, images) == 0  # saved, and not where it should be
            raise InterruptionError(143)

        monkeypatch.setattr("mae_et.search.trainings.start", sometimes)
        for _ in range(2):
            assert search(configured(recipes["pretrain"], run), lambda _line: None) == 143
    else:
        searched(recipes["pretrain"], run)
        assert not list((run / "cells").rglob("checkpoints/step-*"))
        cells = sorted((run / "cells").iterdir())
        assert len(cells) == 4
        shutil.rmtree(cells[0])
        (cells[1] / "seed0" / "score.json").unlink()
        (cells[3] / "seed0" / "score.json").unlink()
    searched(recipes["pretrain"], run)
    assert scores(run) == scores(straight)
    assert stages_of(run) == stages_of(straight)


def stages_of(run: Path) -> object:
    return yaml.safe_load((run / "curriculum.yaml").read_text())


def test_kill_9(whole, recipes, tmp_path):
    """Killed amid its second training, the same command finishes with the same scores, and then has nothing to do."""
    straight, _ = whole
    run, file = tmp_path / "search", tmp_path / "search.yaml"
    file.write_text(dump_config(configured(recipes["pretrain"], run)))
    command = [sys.executable, "-m", "mae_et", "search", "--config", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (run / "cells" / "16" / "seed0" / "checkpoints").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(scores(run)) < 4
    searched(recipes["pretrain"], run)
    assert scores(run) == scores(straight)
    assert stages_of(run) == stages_of(straight)
    again = searched(recipes["pretrain"], run)
    assert sum("(from before)" in line for line in again) == 4
    with pytest.raises(ConfigError, match=r"holds another search \(holdout: 0.25 -> 0.3\)"):
        searched(recipes["pretrain"], run, "holdout=0.3")


def test_images_that_score_do_not_train(recipes, tmp_path):
    for recipe, score in (("pretrain", "probe"), ("finetune", "top1")):
        config = configured(recipes[recipe], tmp_path, f"score={score}", "images=20")
        images = open_images_of(config, load_recipe(config))
        train, fit, held = ({s.describe(i) for i in range(len(s))} for s in (images.train, images.fit, images.held))
        assert len(images.train) == 20
        assert (len(fit), len(held)) == (27, 9)
        assert train < fit
        assert not held & fit
        assert not any("test" in Path(name).parts for name in train | fit | held)
        assert images.labelled().test is None


def test_greedy_of_training_on_labels(recipes, tmp_path):
    run = tmp_path / "greedy"
    config = ["score=top1", "algorithm=greedy", "margin=1", "bandwidths=[8,12]"]
    said = searched(recipes["finetune"], run, *config)
    found = json.loads((run / "search.json").read_text())
    # Everything is allowed: down to the smallest size at once, in three trainings of at most five.
    assert [trial["trained"] for trial in found["trials"]] == ["16-16-16", "12-12-16", "8-8-16"]
    assert found["curriculum"] == "8-8-16"
    assert any("at most 5 trainings" in line for line in said)
    assert found["spent"]["epochs"] < found["planned"]["epochs"]
    assert stages_of(run)["axis"] == "epoch"  # pyright: ignore[reportIndexIssue]
    for report in (run / "cells").rglob("report.json"):
        assert set(json.loads(report.read_text())) == {"step", "size", "val"}


@pytest.mark.parametrize(
    ("recipe", "changes", "within"),
    [
        ("pretrain", ["score=loss", "objective=loss_time", "mask_ratios=[0.75,0.5]"], (0, 1)),
        ("pretrain", ["score=knn", "objective=error_time", "seeds=[0,1]", "axis=epoch"], (0, 1)),
        ("pretrain", ["score=finetune", "batch_scales=[1,2]"], (0, 1)),
        ("finetune", ["score=loss", "objective=loss_time"], (0.5, 3)),
        ("finetune", ["score=top1"], (0, 1)),
    ],
)
def test_scores_and_candidates(recipes, tmp_path, recipe, changes, within):
    run = tmp_path / "search"
    more = ["stages=2", "bandwidths=[8]"]
    if "score=finetune" in changes:
        tuning = "[model.name=null,model.patch_size=16,model.width=null,model.depth=null,model.heads=null,epochs=1]"
        more += [f"tuning.recipe={recipes['finetune']}", f"tuning.overrides={tuning}"]
        more += ["overrides=[curriculum.lr_cap=1]"]
    said = searched(recipes[recipe], run, *more, *changes)
    found = json.loads((run / "search.json").read_text())
    assert all(within[0] <= score <= within[1] for score in scores(run).values())
    seeds = 2 if "seeds=[0,1]" in changes else 1
    assert len(scores(run)) == found["spent"]["trainings"] == seeds * len(found["trials"])
    assert found["spent"]["epochs"] == pytest.approx(found["planned"]["epochs"], rel=1e-12)
    values = [trial["utility"] for trial in found["trials"]]
    best = found["trials"][values.index(max(values))]["candidate"]
    assert found["curriculum"].split("-")[0] == best
    if "objective=error_time" in changes:
        (trial,) = found["trials"]
        trainings = trainings_of(configured(recipes[recipe], run, *more, *changes))
        plan = trainings.plan((candidates_for(trainings)[0],))
        spent = plan.compute_fraction(plan.first_step_at(0.62)) * plan.equivalent_epochs
        assert trial["utility"] == pytest.approx(-(1 - trial["score"]) * spent)
    assert any(line.startswith("cost: ") for line in said)


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("pretrain", ["score=top1"], "score=top1: a pretrain recipe is scored by one of probe, knn, finetune, loss"),
        ("pretrain", ["score=loss"], "objective=acc with score=loss"),
        ("pretrain", ["objective=loss_time"], "objective=loss_time with score=probe"),
        ("pretrain", ["settle=0.4"], r"settle=0.4 is more than a stage: at most 0.333"),
        ("pretrain", ["bandwidths=[8,32]"], r"bandwidths: \(32, 32\) is above the final size \(16, 16\)"),
        ("pretrain", ["bandwidths=[9]"], "B=9 px is not a multiple of the patch size 2 px"),
        ("pretrain", ["bandwidths=[]"], "seeds and bandwidths need at least one entry"),
        ("pretrain", ["batch_scales=[2]"], "batch_scale=2 raises the peak learning rate"),
        ("pretrain", ["algorithm=greedy", "mask_ratios=[0.5,0.6]"], "algorithm=greedy goes down in B alone"),
        ("pretrain", ["score=finetune"], "score=finetune needs tuning.recipe"),
        ("pretrain", ["overrides=['budget=5 minutes']"], "depends on measured times"),
        ("finetune", ["score=top1", "mask_ratios=[0.5]"], "training on labels masks nothing"),
    ],
)
def test_refusals_come_before_anything_is_trained(recipes, tmp_path, recipe, changes, message):
    with pytest.raises(ConfigError, match=message):
        searched(recipes[recipe], tmp_path / "search", *changes)
    assert not (tmp_path / "search").exists()


def test_no_search_under_torchrun_or_without_a_recipe(recipes, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="recipe is not set"):
        search(load_config(None, [f"run={tmp_path}"], SearchConfig))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun"):
        searched(recipes["pretrain"], tmp_path)


def test_unlabelled_images_are_searched_by_loss(photos, recipes, tmp_path):
    changes = [f"overrides=[data.root={photos}]", "stages=2", "bandwidths=[8]"]
    with pytest.raises(ConfigError, match="score=probe needs labels"):
        searched(recipes["pretrain"], tmp_path / "a", *changes)
    searched(recipes["pretrain"], tmp_path / "b", *changes, "score=loss", "objective=loss_time")
    counts = json.loads((tmp_path / "b" / "search.json").read_text())["images"]
    assert counts == {"train": 34, "held_out": 11}


def test_the_planned_cost_is_that_of_every_choice(recipes, tmp_path):
    """What a stage costs does not depend on the stages before it."""
    trainings = trainings_of(configured(recipes["pretrain"], tmp_path))
    small, large = candidates_for(trainings)
    for last in (small, large):
        for first in (small, large):
            cost, planned = trainings.cost((first, last)), trainings.planned(1, last)
            assert (cost.epochs, cost.flops) == pytest.approx((planned.epochs, planned.flops), rel=1e-12)
            assert cost.trainings == planned.trainings == 1
    total = planned_cost(trainings.search, trainings, (small, large))
    assert total.trainings == 4


def test_plan_of_a_search(recipes, tmp_path):
    said: list[str] = []
    assert search(configured(recipes["pretrain"], tmp_path / "search"), said.append, only_plan=True) == 0
    assert any("4 trainings" in line for line in said)
    assert not (tmp_path / "search").exists()
