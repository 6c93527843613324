"""What a checkpoint of a search comes to on held-out images, at the final size."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_et.config import ConfigError, FinetuneConfig, PretrainConfig, SearchConfig, load_config
from mae_et.curriculum.stage import patch_grid, visible_tokens
from mae_et.data.loader import Batch, RequestDataset, batches_of, build_loader
from mae_et.data.sources import Source
from mae_et.data.transforms import EvalTransform
from mae_et.engine.checkpoint import Checkpoint
from mae_et.engine.distributed import Ranks, choose_device
from mae_et.evaluation.accuracy import classify
from mae_et.evaluation.features import InOrder
from mae_et.evaluation.scores import LabelledSets, embed_with, score
from mae_et.examination import REPORT_FILE
from mae_et.finetuning import build_model as build_classifier
from mae_et.finetuning import build_state as classifier_state
from mae_et.finetuning import examination
from mae_et.labelled import LabelledImages
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.masking import mask_noise
from mae_et.planning import final_size
from mae_et.pretraining import build_state
from mae_et.resuming import restore
from mae_et.search.images import SearchImages
from mae_et.supervised import settle_start
from mae_et.training import start

# Which kinds of training a score is of.
SCORES = {PretrainConfig: ("probe", "knn", "finetune", "loss"), FinetuneConfig: ("top1", "loss")}


def score_checkpoint(
    config: PretrainConfig | FinetuneConfig, checkpoint: Checkpoint, images: SearchImages, kind: str
) -> float:
    """`probe`, `knn`, `top1` (in [0, 1]) or `loss` of a checkpoint; `fine_tune` is the other kind."""
    ranks = Ranks(0, 1, choose_device(config.engine.device, 0))
    if isinstance(config, PretrainConfig):
        return score_encoder(config, checkpoint, images, kind, ranks)
    return score_classifier(config, checkpoint, images, kind, ranks)


def score_encoder(
    config: PretrainConfig, checkpoint: Checkpoint, images: SearchImages, kind: str, ranks: Ranks
) -> float:
    """Of a pretrained encoder; `loss` is that of held-out images under masks that are the same for all checkpoints."""
    state = build_state(config, ranks)
    restore(state, checkpoint)
    model = state.model.eval()
    assert isinstance(model, MaskedAutoencoder)
    size, settings = final_size(config), config.evaluation
    if kind != "loss":
        embed = partial(embed_with, model, state.precision, settings.pooling)
        asked = replace(settings, probe=kind == "probe", knn=settings.knn[:1])
        found = score(embed, LabelledSets(images.fit, images.held), asked, size, config.data.workers or 0)
        return found["probe" if kind == "probe" else f"knn{settings.knn[0]}"]
    rows, columns = patch_grid(size, config.model.patch_size)
    visible = visible_tokens(rows * columns, config.mask_ratio)

    def loss(batch: Batch) -> Tensor:
        with state.precision.autocast():
            return model(batch.images, mask_noise(batch.indices, rows * columns), visible).loss

    show = EvalTransform(size, settings.crop_fraction)
    return mean_loss(loss, images.held, show, config.data.workers or 0, ranks.device)


def score_classifier(
    config: FinetuneConfig, checkpoint: Checkpoint, images: SearchImages, kind: str, ranks: Ranks
) -> float:
    """Of a classifier, or of the running average of its weights; `loss` is plain cross-entropy."""
    begin = settle_start(config)
    model = build_classifier(config, begin, len(images.train.classes), lambda _line: None, config.epochs)
    state = classifier_state(config, model, ranks)
    restore(state, checkpoint)
    how = examination(config, begin.backbone, config.data.workers or 0)
    if kind == "top1":
        return classify(state, images.held, how, ranks).top1
    network = state.evaluated.eval()

    def loss(batch: Batch) -> Tensor:
        with state.precision.autocast():
            logits = network(batch.images)
        return F.cross_entropy(logits.float(), batch.labels)

    return mean_loss(loss, images.held, EvalTransform(how.size, how.crop_fraction), how.workers, ranks.device)


def mean_loss(
    loss: Callable[[Batch], Tensor], source: Source, show: EvalTransform, workers: int, device: torch.device
) -> float:
    """Mean over the images of a source of a loss that is a mean over its batch."""
    order = InOrder(list(range(len(source))), show.size, 256)
    loader = build_loader(RequestDataset(source, show), order, workers, pin_memory=False)
    total = 0.0
    with torch.no_grad(), batches_of(loader) as batches:
        for batch in batches:
            total += loss(batch.to(device)).item() * len(batch.labels)
    return total / len(source)


def tuning_config(search: SearchConfig, like: PretrainConfig | FinetuneConfig) -> FinetuneConfig:
    """The short fine-tuning of `score: finetune`, before it has a checkpoint and a folder; executed `like` another.

    Raises:
        ConfigError: `tuning.recipe` is not set, or cannot be used.
    """
    if search.tuning.recipe is None:
        raise ConfigError("score=finetune needs tuning.recipe, e.g. configs/finetune/fashion_mnist.yaml")
    config = load_config(search.tuning.recipe, search.tuning.overrides, FinetuneConfig)
    return replace(
        config,
        engine=like.engine,
        saving=like.saving,
        tracking=like.tracking,
        evaluation=replace(config.evaluation, every=None),
    )


def fine_tune(config: FinetuneConfig, checkpoint: Path, folder: Path, images: SearchImages) -> tuple[int, float]:
    """(exit code, held-out top-1 in [0, 1]) of a fine-tuning of a checkpoint; it goes on where it was interrupted."""
    run = replace(config, checkpoint=str(checkpoint), run=str(folder))
    labelled = LabelledImages(images.fit, images.held, None)
    code = start(run, say=lambda _line: None, images=labelled)
    if code:
        return code, 0.0
    return code, json.loads((folder / REPORT_FILE).read_text())["val"]["top1"]
