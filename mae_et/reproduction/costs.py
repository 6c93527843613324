"""What an experiment will cost, before anything is spent: the plan of every cell, made without a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mae_et.config import (
    ClassifierConfig,
    ConfigError,
    FinetuneConfig,
    LabelledDataConfig,
    PretrainConfig,
    ProbeConfig,
    SearchConfig,
    load_config,
    task_of,
)
from mae_et.curriculum import Plan
from mae_et.curriculum.stage import as_size, format_size
from mae_et.curriculum.table import quantity, text_table
from mae_et.exchange.backbone import Backbone, choose_backbone
from mae_et.reproduction.cells import Run, runs_of
from mae_et.reproduction.experiments import PROBES, REPOSITORY, STUDIES, Scale

if TYPE_CHECKING:
    from mae_et.search.trainings import Spent

Config: TypeAlias = PretrainConfig | FinetuneConfig | ProbeConfig
# FLOP/s that a cost is converted with, and what has them: assumptions, not measurements.
SPEEDS = {
    "laptop": (100e9, "two CPU cores at a sustained 100 GFLOP/s"),
    "paper": (0.25 * 989e12, "one H100 at 25 % of 989 TFLOP/s dense bf16"),
}


def configuration(run: Run) -> Config | None:
    """The run that a command comes to, but for its folder and seed; None for programs that have no such file.

    Raises:
        ConfigError: whatever `load_config` refuses.
    """
    if run.cell.program in (*STUDIES, "search"):
        return None
    path, words = _config_and_overrides(run)
    return _configuration(run.cell.program, path, (*words, *run.cell.planning))


@lru_cache(maxsize=1024)
def _configuration(program: str, path: Path | None, overrides: tuple[str, ...]) -> Config:
    """The same command stands in many tables."""
    if program in PROBES:
        return load_config(path, overrides, ProbeConfig)
    if program == "finetune.py" or (path is not None and task_of(path) == "finetune"):
        return load_config(path, overrides, FinetuneConfig)
    # Pretraining has no labels to count.
    return load_config(path, [word for word in overrides if not word.startswith("data.classes=")])


def _config_and_overrides(run: Run) -> tuple[Path | None, list[str]]:
    """The file of a command, and its overrides but for curricula that a search has yet to find."""
    words = run.words[1:]
    path = None
    if "--config" in words:
        at = words.index("--config")
        path = REPOSITORY / words[at + 1]
        words = words[:at] + words[at + 2 :]
    return path, [word for word in words if not _to_be_found(word)]


def _to_be_found(word: str) -> bool:
    key, _, value = word.partition("=")
    return key == "curriculum" and value.endswith(".yaml") and not (REPOSITORY / value).exists()


class Planner:
    """Plans of the cells of one scale.

    Args:
        scale: of the experiment.
        places: by the names that commands have in braces.

    Raises:
        ConfigError: whatever the programs would refuse.
    """

    def __init__(self, scale: Scale, places: Mapping[str, str]):
        self.runs = {cell.name: runs_of(scale, cell, places) for cell in scale.cells.values()}
        self._makers = {str(run.folder): run for runs in self.runs.values() for run in runs}

    def plan(self, name: str) -> Plan | Spent | str:
        """The plan of a cell's first seed; of a search what it spends; or why there is none."""
        run = self.runs[name][0]
        if run.cell.program == "search":
            return search_cost(run)
        config = configuration(run)
        if isinstance(config, PretrainConfig):
            return _pretraining(replace(config, run="-"))
        if config is None:
            return "no training, scores alone"
        if run.cell.program == "knn" or (isinstance(config, ProbeConfig) and config.protocol != "mae"):
            return "forward passes alone"
        backbone = self.backbone(config)
        if isinstance(backbone, str):
            return backbone
        if isinstance(config, FinetuneConfig):
            return _labelled(replace(config, run="-", checkpoint=None), backbone, frozen=False)
        from mae_et.probing import as_finetuning

        return _labelled(replace(as_finetuning(config), run="-", checkpoint=None), backbone, frozen=True)

    def wall_hours(self, name: str) -> float | None:
        """When the clock stops a cell's run."""
        config = configuration(self.runs[name][0])
        return config.protocol.wall_hours if isinstance(config, PretrainConfig | FinetuneConfig) else None

    def backbone(self, config: FinetuneConfig | ProbeConfig) -> Backbone | str:
        """The network of a run on labels, which may be that of an earlier cell; a string says what is missing."""
        if config.checkpoint is None:
            return choose_backbone(config.model, config.data, None)
        maker = self._makers.get(str(REPOSITORY / config.checkpoint))
        if maker is None:
            if not (REPOSITORY / config.checkpoint).exists():
                return f"of the network in {config.checkpoint}, which is not there"
            from mae_et.finetuning import settle_start

            start = replace(FinetuneConfig(), model=config.model, data=config.data, checkpoint=config.checkpoint)
            return settle_start(start).backbone
        made = configuration(maker)
        assert made is not None
        parent = _encoder(made) if isinstance(made, PretrainConfig) else self.backbone(made)
        if isinstance(parent, str):
            return parent
        size = parent.size if config.data.size is None else as_size(config.data.size)
        return replace(parent, size=size, shape=parent.shape and replace(parent.shape, size=size))


@dataclass(frozen=True)
class CountedImages:
    """In place of images that only their number is asked of."""

    number: int
    classes: tuple[str, ...]
    name: str = "counted"
    channels: int = 3

    def __len__(self) -> int:
        return self.number


def search_cost(run: Run) -> Spent:
    """What a search spends on its trainings, by their plans; of Algorithm 1 the most.

    Raises:
        ConfigError: whatever the search would refuse.
    """
    from mae_et.search.images import SearchImages, open_images_of
    from mae_et.search.run import axis_of, choose_candidates, load_recipe, planned_cost
    from mae_et.search.trainings import Trainings

    path, words = _config_and_overrides(run)
    config = load_config(path, [*words, f"run={run.folder}", f"seed={run.seed}"], SearchConfig)
    recipe = load_recipe(config)
    given = dict(word.split("=", 1) for word in run.cell.planning)
    if given:
        classes = tuple(str(number) for number in range(int(given.get("data.classes", 1))))
        counted: Any = CountedImages(int(given["data.images"]), classes)
        images = SearchImages(counted, counted, counted)
    else:
        images = open_images_of(config, recipe)
    trainings = Trainings(config, recipe, images, axis_of(config), lambda _line: None)
    candidates = choose_candidates(config, trainings)
    trainings.check(candidates)
    return planned_cost(config, trainings, candidates)


def _encoder(config: PretrainConfig) -> Backbone:
    """The network that pretraining makes."""
    model, data = config.model, config.data
    settings = ClassifierConfig(
        model.name, model.patch_size, model.width, model.depth, model.heads, model.mlp_ratio, locality=model.locality
    )
    shown = LabelledDataConfig(size=data.size, channels=data.channels, mean=data.mean, std=data.std)
    return choose_backbone(settings, shown, None)


# Counting a network's multiply-adds takes seconds, and the same baseline stands in many tables.
_PLANS: dict[str, Plan] = {}


def _pretraining(config: PretrainConfig) -> Plan:
    from mae_et.planning import build_plan

    key = json.dumps(asdict(config))
    if key not in _PLANS:
        images = config.data.images
        if images is None:
            from mae_et.data.sources import count_images

            images = count_images(config.data.source, config.data.root, config.data.split)
        _PLANS[key] = build_plan(config, images)
    return _PLANS[key]


def _labelled(config: FinetuneConfig, backbone: Backbone, frozen: bool) -> Plan:
    from mae_et.labelled import open_labelled
    from mae_et.labelled_plan import build_plan

    key = f"{json.dumps(asdict(config))} {backbone.to_json()} {frozen}"
    if key not in _PLANS:
        images, classes = config.data.images, config.data.classes
        if images is None or classes is None:
            opened = open_labelled(config.data, backbone.channels)
            images, classes = len(opened.train), len(opened.classes)
        _PLANS[key] = build_plan(config, backbone, images, classes, frozen=frozen)
    return _PLANS[key]


def cost_table(scale: Scale, places: Mapping[str, str]) -> str:
    """Equivalent epochs, steps and FLOPs of each cell and of all, and an estimate of the time they take.

    Raises:
        ConfigError: a cell that its program would refuse.
    """
    planner, rows, total, timed = Planner(scale, places), [], 0.0, 0.0
    steps_in_all = 0
    for name, cell in scale.cells.items():
        try:
            plan = planner.plan(name)
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from None
        seeds = 1 if cell.program in (*STUDIES, "plan") else len(cell.seeds)
        if isinstance(plan, str):
            rows.append([name, str(seeds), "", "", "", "", plan])
            continue
        if not isinstance(plan, Plan):
            total += plan.flops
            rows.append([name, "1", f"{plan.epochs:.3g}", "", *[quantity(plan.flops)] * 2])
            rows[-1].append(f"{plan.trainings} trainings")
            continue
        flops = plan.total_flops or 0.0
        counted = 0 if cell.program == "plan" else seeds
        limit = planner.wall_hours(name)
        if limit is None:
            total, steps_in_all = total + counted * flops, steps_in_all + counted * plan.total_steps
        else:
            timed += counted * limit
        sizes = ", ".join(format_size(stage.bandwidth) for stage in plan.stages)
        sizes = sizes if len(plan.stages) < 6 else f"{format_size(plan.stages[0].bandwidth)} ... {sizes.split()[-1]}"
        epochs, each, all_of_it = f"{plan.equivalent_epochs:.4g}", quantity(flops), quantity(counted * flops)
        until = "" if limit is None else f", stopped after {_time(limit)}"
        rows.append([name, str(seeds), epochs, f"{plan.total_steps:,}", each, all_of_it, f"B={sizes}{until}"])
    header = ["cell", "seeds", "equivalent epochs", "steps", "FLOPs", "of all seeds", "px"]
    speed, what = SPEEDS["paper" if scale.name == "paper" else "laptop"]
    in_all = [f"{_time(timed)} by the clock"] if timed else []
    if total:
        work = f"{steps_in_all:,} steps, {quantity(total)}FLOPs of training, {_time(total / speed / 3600)} of {what}"
        in_all.insert(0, f"{work} (estimate, not measured; fixed costs of small steps come on top)")
    return f"{text_table(header, rows)}\n\nin all: {', and '.join(in_all) or 'nothing is trained'}"


def _time(hours: float) -> str:
    return f"{hours:,.0f} hours" if hours >= 10 else f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"


def traffic_table(plan: Plan, channels: int) -> str:
    """Bytes of uint8 images that a step takes to the device, by stage: down-sampled by the worker, or at full size."""
    height, width = plan.reference_size
    rows = []
    for stage in plan.stages:
        sent, full = (stage.batch * channels * h * w for h, w in (stage.bandwidth, (height, width)))
        rows.append(
            [
                *(format_size(stage.bandwidth), str(stage.batch), f"{stage.steps:,}"),
                *(f"{sent / 1e6:.1f}", f"{full / 1e6:.1f}", f"{sent / full:.3f}"),
            ]
        )
    header = ["B", "batch", "steps", "MB a step", f"MB a step at {format_size(plan.reference_size)} px", "ratio"]
    sent = sum(s.images * s.bandwidth[0] * s.bandwidth[1] for s in plan.stages)
    full = plan.total_images * height * width
    return f"{text_table(header, rows)}\n\nover the whole run: {sent / full:.3f} of the bytes"
