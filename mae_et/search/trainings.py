"""The trainings of a search: one folder a cell and seed, each resumable, each with a score that is written once."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

from mae_et.config import (
    EngineConfig,
    FinetuneConfig,
    GrowthConfig,
    PretrainConfig,
    ProtocolConfig,
    SavingConfig,
    SearchConfig,
    StageConfig,
    TrackingConfig,
)
from mae_et.curriculum.plan import Plan
from mae_et.curriculum.search import Candidate, Cell, cell_name, cell_stages
from mae_et.curriculum.stage import Stage
from mae_et.engine.checkpoint import Checkpoint, latest_checkpoint
from mae_et.engine.run_folder import RunFolder, write_text_atomic
from mae_et.exchange.backbone import Backbone
from mae_et.labelled_plan import build_plan as build_labelled_plan
from mae_et.planning import build_plan, final_size
from mae_et.running import Say
from mae_et.search.images import SearchImages
from mae_et.search.scoring import fine_tune, score_checkpoint, tuning_config
from mae_et.supervised import settle_start
from mae_et.training import start

SCORE_FILE = "score.json"

Settings = TypeVar("Settings", EngineConfig, SavingConfig, TrackingConfig)


class InterruptionError(Exception):
    """A signal ended a training, which is saved; carries the exit code."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


@dataclass(frozen=True)
class Spent:
    """What one training, or several, cost.

    Attributes:
        trainings: how many.
        epochs: equivalent ones, at the final size.
        flops: forward and backward.
        seconds: of training; 0 where nothing was trained yet.
        scoring: seconds of scores.
    """

    trainings: int = 0
    epochs: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0
    scoring: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))

    def __mul__(self, times: int) -> Spent:
        return Spent(*(value * times for value in vars(self).values()))


def given(settings: Settings, others: Settings) -> Settings:
    """`others` with those of `settings` that are not the defaults."""
    default = type(settings)()
    values = {item.name: getattr(settings, item.name) for item in fields(default)}
    return replace(others, **{name: value for name, value in values.items() if value != getattr(default, name)})


def segment_cost(plan: Plan, begin: float, end: float) -> Spent:
    """Of a stretch of a plan's axis."""
    first, last = plan.first_step_at(begin), plan.first_step_at(end)
    share = plan.compute_fraction(last) - plan.compute_fraction(first)
    flops = (plan.flops_before(last) or 0.0) - (plan.flops_before(first) or 0.0)
    return Spent(1, share * plan.equivalent_epochs, flops)


def stage_configs(stages: Sequence[Stage]) -> list[StageConfig]:
    """Stages as a configuration has them."""
    return [
        StageConfig(
            end=stage.end,
            bandwidth=stage.bandwidth[0] if stage.bandwidth[0] == stage.bandwidth[1] else list(stage.bandwidth),
            mask_ratio=stage.mask_ratio,
            batch_scale=stage.batch_scale,
        )
        for stage in stages
    ]


class Trainings:
    """Trains and scores cells.

    A cell of `sequential` has the stages up to the one that is decided; its training begins from that of the cell
    without its last stage, and its score is taken a little later, after `settle` at the final size. That is the run by
    the plan which has the final size for all later stages, so that learning rate and augmentation follow u, and the
    optimizer keeps its moments (the paper leaves the last two open). What comes next begins before `settle`.

    A cell of `greedy` has all stages.

    Args:
        search: the configuration.
        recipe: of the trainings.
        images: of the search.
        axis: of the curriculum.
        say: receives a line for each score.
    """

    def __init__(
        self,
        search: SearchConfig,
        recipe: PretrainConfig | FinetuneConfig,
        images: SearchImages,
        axis: str,
        say: Say,
    ):
        self.search, self.images, self.axis, self.say = search, images, axis, say
        self.folder = Path(search.run) / "cells"
        tracking, saving = given(search.tracking, recipe.tracking), given(search.saving, recipe.saving)
        self.recipe = replace(
            recipe,
            engine=given(search.engine, recipe.engine),
            saving=replace(saving, keep=1),
            tracking=replace(tracking, console=False, pictures=False, wandb="disabled"),
            protocol=ProtocolConfig(),
            evaluation=replace(recipe.evaluation, every=None),
        )
        if isinstance(self.recipe, FinetuneConfig):
            self.recipe.data = replace(self.recipe.data, holdout=search.holdout)
        self.backbone: Backbone | None = None
        size = final_size(self.recipe) if isinstance(self.recipe, PretrainConfig) else self.network().size
        self.final = Candidate(size)
        self.tuning = tuning_config(search, self.recipe) if search.score == "finetune" else None
        self.plans: dict[Cell, Plan] = {}
        self.settle_budget()

    def network(self) -> Backbone:
        """Of training on labels."""
        assert isinstance(self.recipe, FinetuneConfig)
        if self.backbone is None:
            self.backbone = settle_start(self.recipe).backbone
        return self.backbone

    def settle_budget(self) -> None:
        """Epochs in place of another budget, which rounding would make other epochs for every cell."""
        epochs = self.plan(()).epochs
        assert epochs is not None
        self.recipe = replace(self.recipe, budget=None, epochs=epochs)
        self.plans.clear()

    @property
    def whole(self) -> bool:
        """Whether a cell is a whole training."""
        return self.search.algorithm == "greedy"

    def config(self, cell: Cell, seed: int, run: Path | str = "unused") -> PretrainConfig | FinetuneConfig:
        """Of the training of a cell."""
        stages = stage_configs(cell_stages(cell, self.search.stages, self.final))
        growth, axis = GrowthConfig(), self.axis
        curriculum = replace(
            self.recipe.curriculum, preset=None, stages=stages, growth=growth, axis=axis, early_large_batch=False
        )
        return replace(self.recipe, run=str(run), seed=seed, curriculum=curriculum)

    def plan(self, cell: Cell) -> Plan:
        """Of the training of a cell, at the final size from its last stage on."""
        if cell not in self.plans:
            config, images = self.config(cell, 0), len(self.images.train)
            if isinstance(config, PretrainConfig):
                self.plans[cell] = build_plan(config, images)
            else:
                classes = len(self.images.train.classes)
                self.plans[cell] = build_labelled_plan(config, self.network(), images, classes)
        return self.plans[cell]

    def decided(self, cell: Cell) -> float:
        """u up to which a cell is trained before it settles."""
        return 1.0 if self.whole else len(cell) / self.search.stages

    def scored(self, cell: Cell) -> float:
        """u at which a cell is scored."""
        return 1.0 if self.whole else min(1.0, self.decided(cell) + self.search.settle)

    def cost(self, cell: Cell) -> Spent:
        """Of one training of a cell, by its plan; of `sequential` without the stages before its last."""
        begin = 0.0 if self.whole else (len(cell) - 1) / self.search.stages
        return segment_cost(self.plan(cell), begin, self.scored(cell))

    def planned(self, stage: int, candidate: Candidate) -> Spent:
        """The same for a candidate of a stage (from 0) of `sequential`, after whatever is chosen before it.

        A stage has its steps whatever the others are, so a plan for each candidate is enough.
        """
        cell = (candidate,) * (self.search.stages - 1)
        begin, decided = stage / self.search.stages, (stage + 1) / self.search.stages
        settled = segment_cost(self.plan(()), decided, min(1.0, decided + self.search.settle))
        return replace(segment_cost(self.plan(cell), begin, decided) + settled, trainings=1)

    def check(self, candidates: Sequence[Candidate]) -> None:
        """Make the plans that the search may need.

        Raises:
            ConfigError: a candidate that cannot be trained.
        """
        self.plan(())
        for candidate in candidates:
            self.plan((candidate,) * (self.search.stages - 1))

    def compute(self, cell: Cell) -> float:
        """T of the objectives: planned compute up to the score, in equivalent epochs."""
        plan = self.plan(cell)
        return plan.compute_fraction(plan.first_step_at(self.scored(cell))) * plan.equivalent_epochs

    def utility(self, cell: Cell) -> float:
        """What a cell comes to by the objective, the more the better; trains and scores what is not there yet."""
        if not self.whole:
            self.forget(cell)
        there = all((self.place(cell, seed) / SCORE_FILE).exists() for seed in self.search.seeds)
        score = self.mean_score(cell)
        seconds = sum(record["seconds"] + record["scoring_seconds"] for record in self.records(cell))
        self.say(
            f"{cell_name(cell)}: {score_text(self.search.score, score)}, {seconds:.0f} s"
            f"{' (from before)' if there else ''}"
        )
        return self.objective(score, self.compute(cell))

    def mean_score(self, cell: Cell) -> float:
        """Over the seeds."""
        return statistics.fmean(record["score"] for record in self.records(cell))

    def objective(self, score: float, compute: float) -> float:
        """EfficientTrain++'s objectives (Table 21), those to be lowered with their sign changed."""
        if self.search.objective == "acc":
            return score
        loss = score if self.search.objective == "loss_time" else 1 - score
        return -loss * compute**self.search.alpha

    def place(self, cell: Cell, seed: int) -> Path:
        """The folder of one training of a cell."""
        return self.folder / cell_name(cell) / f"seed{seed}"

    def records(self, cell: Cell) -> list[dict[str, float]]:
        """What is written of a cell's trainings, one a seed."""
        return [self.record(cell, seed) for seed in self.search.seeds]

    def record(self, cell: Cell, seed: int) -> dict[str, float]:
        """What is written of one training of a cell; it is made first where it is not there yet."""
        folder = self.place(cell, seed)
        path = folder / SCORE_FILE
        if not path.exists():
            checkpoint = ready = self.trained(cell, seed)
            first = self.whole or len(cell) == 1
            before = 0.0 if first else self.record(cell[:-1], seed)["seconds_to_stage_end"]
            if not self.whole:
                settled = folder / "settled"
                ready = self.train(cell, seed, settled, self.scored(cell), checkpoint.path)
            clock = time.perf_counter()
            score = self.score(cell, seed, ready, folder)
            cost = self.cost(cell)
            values = {
                "score": score,
                "equivalent_epochs": cost.epochs,
                "flops": cost.flops,
                "seconds": ready.state["seconds"] - before,
                "scoring_seconds": time.perf_counter() - clock,
                "seconds_to_stage_end": checkpoint.state["seconds"],
                "step": ready.step,
            }
            write_text_atomic(path, json.dumps(values, indent=1))
        if not self.search.keep_checkpoints:
            done = [folder / "settled", folder / "tuned", *([folder] if self.whole else [])]
            drop_checkpoints(done)
        return json.loads(path.read_text())

    def score(self, cell: Cell, seed: int, checkpoint: Checkpoint, folder: Path) -> float:
        """By the kind that the search asks for."""
        if self.tuning is None:
            config = self.config(cell, seed)
            return score_checkpoint(config, checkpoint, self.images, self.search.score)
        code, score = fine_tune(self.tuning, checkpoint.path, folder / "tuned", self.images)
        if code:
            raise InterruptionError(code)
        return score

    def trained(self, cell: Cell, seed: int) -> Checkpoint:
        """The checkpoint of a cell where its last stage ends; trained again where it is gone, to the same bits."""
        folder = self.place(cell, seed)
        found = self.finished(cell, folder, self.decided(cell))
        if found is not None:
            return found
        begun = latest_checkpoint(folder / "checkpoints") is not None
        parent = None if begun or self.whole or len(cell) == 1 else self.trained(cell[:-1], seed).path
        return self.train(cell, seed, folder, self.decided(cell), parent)

    def train(self, cell: Cell, seed: int, folder: Path, until: float, parent: Path | None) -> Checkpoint:
        """Train in a folder until `until`, from `parent` where the folder has no checkpoint of its own yet."""
        found = self.finished(cell, folder, until)
        if found is not None:
            return found
        begun = latest_checkpoint(folder / "checkpoints") is not None
        resume = "auto" if begun or parent is None else str(parent)
        given = self.images.train if isinstance(self.recipe, PretrainConfig) else self.images.labelled()
        code = start(self.config(cell, seed, folder), resume, lambda _line: None, until, given)
        if code:
            raise InterruptionError(code)
        found = self.finished(cell, folder, until)
        assert found is not None, f"{folder} did not reach u = {until}"
        return found

    def finished(self, cell: Cell, folder: Path, until: float) -> Checkpoint | None:
        """The folder's checkpoint at `until`, if it came so far."""
        found = latest_checkpoint(folder / "checkpoints")
        return found if found is not None and found.step == self.plan(cell).first_step_at(until) else None

    def forget(self, cell: Cell) -> None:
        """Remove checkpoints that no training continues any more once `cell` is looked at: all of earlier stages but
        the one that it continues."""
        if self.search.keep_checkpoints or not self.folder.exists():
            return
        for place in self.folder.iterdir():
            stages = place.name.count("-") + 1
            if stages < len(cell) and place.name != cell_name(cell[:-1]):
                drop_checkpoints(list(place.iterdir()))

    def finish(self) -> None:
        """Remove the last checkpoints."""
        if not self.search.keep_checkpoints:
            drop_checkpoints([seed for cell in self.folder.iterdir() for seed in cell.iterdir()])


def drop_checkpoints(folders: Sequence[Path]) -> None:
    """Remove what runs have saved, and what says so, that they may begin anew; their metrics and plans stay."""
    for folder in folders:
        run = RunFolder(folder, writes=False)
        run.status_path.unlink(missing_ok=True)
        if run.checkpoints.exists():
            shutil.rmtree(run.checkpoints)


def score_text(kind: str, score: float) -> str:
    """A score for people."""
    return f"loss {score:.4f}" if kind == "loss" else f"{kind} {100 * score:.2f} %"
