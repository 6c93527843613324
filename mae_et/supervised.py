"""What runs on annotated images share: the network that they begin with, and what trains it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from mae_et.config import DetectConfig, FinetuneConfig, SegmentConfig
from mae_et.config.kept import read_kept
from mae_et.engine.distributed import Ranks, on_main
from mae_et.engine.optim import Groups, OptimizerSettings, build_optimizer
from mae_et.engine.parallel import parallelise, shard, whole_copy
from mae_et.engine.precision import Precision, choose_attention
from mae_et.engine.run_folder import RunFolder
from mae_et.engine.state import TrainState
from mae_et.exchange.backbone import Backbone, choose_backbone
from mae_et.exchange.weights import Origin, Weights, open_weights

AnnotatedConfig: TypeAlias = FinetuneConfig | DetectConfig | SegmentConfig

BACKBONE_FILE, LINEAGE_FILE, CLASSES_FILE = "backbone.json", "lineage.json", "classes.json"


@dataclass(frozen=True)
class Start:
    """What a run begins with.

    Attributes:
        backbone: the network.
        weights: for it; None from scratch, and for a run that continues.
        parent: where they came from.
    """

    backbone: Backbone
    weights: Weights | None
    parent: Origin | None


def kept_start(folder: RunFolder, ranks: Ranks) -> Start | None:
    """What a run that continues began with: it no longer needs the checkpoint. None where its folder does not say.

    Raises:
        ConfigError: the files that say so are damaged.
    """

    def read() -> Start | None:
        backbone, lineage = folder.path / BACKBONE_FILE, folder.path / LINEAGE_FILE
        if not backbone.exists():
            return None
        parent = read_kept(lineage, Origin.from_json) if lineage.exists() else None
        return Start(read_kept(backbone, Backbone.from_json), None, parent)

    return on_main(ranks, read)


def settle_start(config: AnnotatedConfig, kept: Start | None = None) -> Start:
    """The network and its first weights; those of a run that continues are `kept`.

    Raises:
        ConfigError, WeightsError: nothing says which network, or the checkpoint cannot be used.
    """
    if kept is not None:
        return kept
    weights = None if config.checkpoint is None else open_weights(config.checkpoint, config.model.heads)
    backbone = choose_backbone(config.model, config.data, weights)
    return Start(backbone, weights, None if weights is None else weights.origin)


def compile_blocks(net: nn.Module, choice: str, device: torch.device) -> None:
    """Compile a ViT's blocks one by one; other networks run as they are."""
    blocks = getattr(net, "blocks", ())
    if choice == "always" or (choice == "auto" and device.type == "cuda"):
        for block in blocks if isinstance(blocks, nn.Sequential | nn.ModuleList) else ():
            block.compile(dynamic=True)


def build_state(
    config: AnnotatedConfig, model: nn.Module, net: nn.Module, groups: Callable[[], Groups], ranks: Ranks
) -> TrainState:
    """Optimizer, average and number format, on this rank's device.

    Args:
        config: of the run.
        model: what is trained.
        net: timm's network in it, whose blocks are compiled.
        groups: the model's parameters for the optimizer, once it is laid out over ranks.
        ranks: of the run.
    """
    optim = config.optim
    compile_blocks(net, config.engine.compile, ranks.device)
    precision = Precision.choose(config.engine.precision, ranks.device)
    choose_attention(model, precision)
    settings = OptimizerSettings(optim.name, optim.weight_decay, (optim.betas[0], optim.betas[1]), optim.momentum)
    layout = config.engine.parallel
    twin = whole_copy(model, ranks, layout)
    average = None if optim.ema is None else running_average(model, optim.ema, ranks, layout)
    network = parallelise(model, ranks, layout)
    return TrainState(
        model=model,
        network=network,
        twin=twin,
        optimizer=build_optimizer(groups(), settings),
        precision=precision,
        device=ranks.device,
        scaler=precision.scaler(),
        average=average,
    )


def running_average(model: nn.Module, decay: float, ranks: Ranks, layout: str) -> ModelEmaV3:
    """An average of the model's weights, laid out over ranks as the model is about to be."""
    average = ModelEmaV3(model, decay=decay, foreach=layout == "ddp")  # torch.lerp_ of lists takes no mixed layouts
    if layout == "fsdp" and ranks.count > 1:
        shard(average.module, ranks)
    else:
        average.module.to(ranks.device)
    return average


def records(start: Start, classes: Sequence[str]) -> dict[str, str]:
    """What the run's folder keeps of its beginning, so that it continues and is opened without the parent."""
    kept = {BACKBONE_FILE: start.backbone.to_json(), CLASSES_FILE: json.dumps(classes, indent=0)}
    return kept if start.parent is None else {**kept, LINEAGE_FILE: json.dumps(asdict(start.parent), indent=1)}
