"""Runs as studies see them: every checkpoint that is kept, its place in the compute, its network, and its images."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mae_et.config import (
    ClassifierConfig,
    ConfigError,
    FinetuneConfig,
    LabelledDataConfig,
    PretrainConfig,
)
from mae_et.config.kept import kept_config, kept_task, names_of, read_kept, unique_names
from mae_et.curriculum.plan import Plan
from mae_et.engine.checkpoint import load_checkpoint
from mae_et.engine.distributed import choose_device
from mae_et.engine.precision import Precision, choose_attention
from mae_et.exchange.backbone import Backbone, choose_backbone
from mae_et.exchange.weights import open_weights
from mae_et.labelled_plan import examination_size
from mae_et.models.classifier import Classifier
from mae_et.planning import plan_of
from mae_et.probing import frozen_encoder
from mae_et.supervised import BACKBONE_FILE, CLASSES_FILE


class Kept(NamedTuple):
    """A checkpoint in a run's folder: its own folder, its step, and the fraction of the compute spent by then."""

    path: Path
    step: int
    compute: float


@dataclass(frozen=True)
class StudiedRun:
    """A run that was made.

    Attributes:
        name: for tables and pictures.
        path: of its folder.
        config: as it ran, with the overrides of the study.
        plan: in steps.
    """

    name: str
    path: Path
    config: PretrainConfig | FinetuneConfig
    plan: Plan

    def checkpoints(self, which: str) -> list[Kept]:
        """The "last" one, or "all" that the folder holds, from the first on.

        Raises:
            ConfigError: there is none.
        """
        folder = self.path / "checkpoints"
        entries = folder.iterdir() if folder.is_dir() else ()
        found = sorted((int(m[1]), path) for path in entries if (m := re.fullmatch(r"step-(\d{8,})", path.name)))
        if not found:
            raise ConfigError(f"{self.path} holds no checkpoint yet")
        kept = [Kept(path, step, self.plan.compute_fraction(step)) for step, path in found]
        return kept if which == "all" else kept[-1:]


def open_runs(folders: Sequence[str | Path], overrides: Sequence[str] = ()) -> list[StudiedRun]:
    """Open runs of pretraining, fine-tuning or supervised training.

    Args:
        folders: of the runs.
        overrides: `key=value` changes to every configuration.

    Raises:
        ConfigError: a folder holds no run, or one of another kind.
    """
    paths = [Path(folder) for folder in folders]
    runs = []
    for path, name in zip(paths, unique_names(paths)):
        file, plan = path / "config.yaml", path / "plan.json"
        if not file.exists():
            raise ConfigError(f"{path} holds no run: there is no {file}")
        schemas = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
        schema = schemas.get(kept_task(file))
        if schema is None:
            raise ConfigError(
                f"{path} holds scores of a frozen encoder, by its config.yaml: study the run that made the encoder "
                "instead"
            )
        if not plan.exists():
            raise ConfigError(f"{path} holds no run: there is no {plan}")
        config = kept_config(file, schema, overrides)
        runs.append(StudiedRun(name, path, config, read_kept(plan, plan_of)))
    return runs


@dataclass(frozen=True)
class Network:
    """A network on its device, in evaluation mode, and the (height, width) in px at which it is shown images."""

    model: Classifier
    device: torch.device
    precision: Precision
    size: tuple[int, int]

    def embed(self, how: Callable[[nn.Module, Tensor], Any], images: Tensor) -> Any:
        """`how(net, normalised images)` of uint8 or [0, 1] images [N, C, H, W]; without gradients."""
        images = images.to(self.device, non_blocking=True)
        with torch.no_grad(), self.precision.autocast():
            return how(self.model.net, self.model.normalise(images))


def open_encoder(run: StudiedRun, checkpoint: Kept) -> Network:
    """The network of a checkpoint without its head; of a pretraining run its encoder.

    Raises:
        ConfigError, WeightsError: the checkpoint cannot be used.
    """
    config = run.config
    heads = config.model.heads
    pooling = config.evaluation.pooling if isinstance(config, PretrainConfig) else "mean"
    settings = ClassifierConfig(pooling=pooling)
    weights = open_weights(checkpoint.path, heads)
    backbone = choose_backbone(settings, LabelledDataConfig(), weights)
    net = frozen_encoder(backbone, weights, settings, lambda _line: None)
    return _network(run, net, backbone)


def open_classifier(run: StudiedRun, checkpoint: Kept) -> Network:
    """The whole network of a checkpoint of a run on labels; the running average where the run keeps one.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    assert isinstance(run.config, FinetuneConfig)
    backbone = read_kept(run.path / BACKBONE_FILE, Backbone.from_json)
    classes = len(read_kept(run.path / CLASSES_FILE, names_of))
    net = backbone.build(classes, "cls" if run.config.model.pooling == "cls" else "mean")
    network = _network(run, net, backbone)
    tensors = load_checkpoint(checkpoint.path).tensors
    network.model.load_state_dict(tensors.get("average", tensors["model"]))
    return network


def network_channels(run: StudiedRun) -> int:
    """Channels of the images that a run's network takes."""
    if isinstance(run.config, PretrainConfig):
        return run.config.data.channels
    return read_kept(run.path / BACKBONE_FILE, Backbone.from_json).channels


def _network(run: StudiedRun, net: nn.Module, backbone: Backbone) -> Network:
    config = run.config
    device = choose_device(config.engine.device, 0)
    precision = Precision.choose(config.engine.precision, device)
    model = Classifier(net, backbone.mean, backbone.std).to(device).eval()
    choose_attention(model, precision)
    size = examination_size(config, backbone) if isinstance(config, FinetuneConfig) else backbone.size
    return Network(model, device, precision, size)


def results_folder(folder: str | Path | None, runs: Sequence[StudiedRun]) -> Path:
    """`folder`, or `studies/` of the first run; it is made."""
    chosen = runs[0].path / "studies" if folder is None else Path(folder)
    chosen.mkdir(parents=True, exist_ok=True)
    return chosen


def file_name(run: StudiedRun) -> str:
    """The run's name as part of a file's."""
    return re.sub(r"[^\w.-]+", "-", run.name).strip("-")
