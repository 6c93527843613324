"""What a bench measures: a recipe, with its images or with numbers in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from mae_et import finetuning, labelled_plan, planning, pretraining
from mae_et.config import ConfigError, FinetuneConfig, PretrainConfig, load_config, task_of
from mae_et.curriculum.plan import Plan
from mae_et.data.sources import Source
from mae_et.engine.distributed import Ranks
from mae_et.labelled import LabelledImages, open_labelled
from mae_et.planning import needs_calibration
from mae_et.running import Assembly, main_first
from mae_et.supervised import settle_start

Config = TypeVar("Config", PretrainConfig, FinetuneConfig)

IMAGENET = 1_281_167
"""Images that the bench without a recipe plans for."""

WITHOUT_DATA = "data.images=... measures the peak and the step without them"


class Noise:
    """Stands in for images that are not here; what a step takes does not depend on what they show.

    Args:
        images: how many.
        channels: of each.
        classes: how many classes; 0 for none.
    """

    name = "random pixels"

    def __init__(self, images: int, channels: int, classes: int = 0):
        self.images, self.channels = images, channels
        self.classes = tuple(str(number) for number in range(classes))
        self.labels: np.ndarray = np.broadcast_to(np.int32(0), images)

    def __len__(self) -> int:
        return self.images

    def image(self, i: int) -> torch.Tensor:
        """Random uint8 [channels, 256, 256]."""
        return torch.randint(0, 256, (self.channels, 256, 256), dtype=torch.uint8)

    def label(self, i: int) -> int:
        """Class 0."""
        return 0

    def describe(self, i: int) -> str:
        """Its number."""
        return f"{self.name} #{i}"


@dataclass(frozen=True)
class Subject:
    """A recipe that can be rehearsed.

    Attributes:
        config: of the run.
        plan: of the run; None where the plan itself needs measured times.
        rehearse: the run with `engine.compile` as configured, or as it is told.
        no_data: why no image is read, in words; None where they are.
    """

    config: PretrainConfig | FinetuneConfig
    plan: Plan | None
    rehearse: Callable[[Ranks, str], Assembly]
    no_data: str | None


def read_config(path: str | None, overrides: Sequence[str]) -> PretrainConfig | FinetuneConfig:
    """The recipe; without one, and without images that the overrides name, the paper's ViT-B on numbers.

    Raises:
        ConfigError: whatever the configuration refuses, and recipes of another kind.
    """
    task = "pretrain" if path is None else task_of(path)
    if task not in ("pretrain", "finetune"):
        raise ConfigError(f"{path}: a recipe of {task}; bench measures those of pretraining and fine-tuning")
    config = load_config(path, overrides, FinetuneConfig if task == "finetune" else PretrainConfig)
    if path is None and config.data.root is None and config.data.images is None and config.data.source == "imagenet1k":
        config.data.images = IMAGENET
    return config


def open_subject(config: PretrainConfig | FinetuneConfig, ranks: Ranks) -> Subject:
    """Open the images, unless `data.images` stands for them; all ranks call it together.

    Raises:
        ConfigError: there are no images, or no plan can be made.
    """
    no_data = None
    if config.data.images is not None:
        no_data = (
            f"data.images={config.data.images} stands for the images: name them with data.source and data.root in its "
            "place to measure their reading"
        )
    opened = _labelled(config, ranks) if isinstance(config, FinetuneConfig) else _unlabelled(config, ranks)
    return Subject(config, *opened, no_data)


Opened = tuple[Plan | None, Callable[[Ranks, str], Assembly]]
"""`Subject.plan` and `.rehearse`."""


def compiled(config: Config, choice: str) -> Config:
    """The configuration with another `engine.compile`."""
    return replace(config, engine=replace(config.engine, compile=choice))


def _unlabelled(config: PretrainConfig, ranks: Ranks) -> Opened:
    """A run of pretraining."""
    if config.data.images is not None:
        source: Source = Noise(config.data.images, config.data.channels)
    else:
        try:
            with main_first(ranks):
                source = pretraining.build_source(config)
        except ConfigError as error:
            raise ConfigError(f"{error}\n({WITHOUT_DATA})") from None
    plan = None if needs_calibration(config) else planning.build_plan(config, len(source), ranks.count)
    return plan, lambda ranks, choice: pretraining.rehearse(compiled(config, choice), source, ranks)


def _labelled(config: FinetuneConfig, ranks: Ranks) -> Opened:
    """A run on labels."""
    data, backbone = config.data, settle_start(config).backbone
    if data.images is not None:
        if data.classes is None:
            raise ConfigError("data.images=... without data: say how many classes, too, with data.classes=...")
        images = LabelledImages(Noise(data.images, backbone.channels, data.classes), None, None)
    else:
        try:
            with main_first(ranks):
                images = open_labelled(data, backbone.channels)
        except ConfigError as error:
            raise ConfigError(f"{error}\n({WITHOUT_DATA}, with data.classes=...)") from None
    count, classes = len(images.train), len(images.classes)
    planned = labelled_plan.build_plan
    plan = None if needs_calibration(config) else planned(config, backbone, count, classes, ranks.count)
    return plan, lambda ranks, choice: finetuning.rehearse(compiled(config, choice), backbone, images, ranks)
