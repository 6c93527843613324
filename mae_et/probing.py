"""What a frozen encoder is worth: MAE's linear probe, a grid of probes on cached features, logistic regression, kNN."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae_et.config import (
    AugmentConfig,
    ClassifierConfig,
    ConfigError,
    FinetuneConfig,
    ProbeConfig,
    ProtocolConfig,
    dump_config,
)
from mae_et.data.loader import RequestDataset
from mae_et.data.sources import Source
from mae_et.engine.distributed import Ranks, choose_device, replicate
from mae_et.engine.optim import OptimizerSettings, build_optimizer, decay_groups
from mae_et.engine.precision import Precision, choose_attention
from mae_et.engine.run_folder import RunFolder, write_text_atomic
from mae_et.engine.state import TrainState
from mae_et.evaluation.features import Features, extract_features, linear_kinds, stream_features, vit_features
from mae_et.evaluation.grid_probe import grid_probe, held_out_table
from mae_et.evaluation.knn import knn_accuracy
from mae_et.evaluation.probe import logistic_probe
from mae_et.examination import conclude
from mae_et.exchange.backbone import Backbone, choose_backbone
from mae_et.exchange.matching import load_weights
from mae_et.exchange.weights import Weights, open_weights
from mae_et.finetuning import build_task, build_transform, examination, watch
from mae_et.labelled import LabelledImages, open_labelled
from mae_et.labelled_plan import build_plan
from mae_et.models.classifier import Classifier, FrozenProbe
from mae_et.recording import open_trackers
from mae_et.running import (
    Assembly,
    Say,
    choose_workers,
    execute,
    loop_config,
    main_first,
    prepare_device,
)
from mae_et.supervised import Start, compile_blocks, kept_start, records, settle_start

SCORES_FILE = "scores.json"
PROTOCOLS = {
    "mae": "MAE's linear probe (LARS, BatchNorm without weights, random crops)",
    "grid": "linear heads over a grid of learning rates and features, chosen on held-out training images",
    "logistic": "logistic regression (scikit-learn) on standardised features, strength chosen on held-out images",
}


def probe(config: ProbeConfig, resume: str = "auto", say: Say = print) -> int:
    """Run the configured protocol; returns the exit code.

    Raises:
        ConfigError, WeightsError, RunFolderError: see there.
    """
    say(f"protocol {config.protocol}: {PROTOCOLS[config.protocol]}")
    if config.protocol == "mae":
        return train_probe(config, resume, say)
    return score_frozen(config, {"grid": grid_scores, "logistic": logistic_scores}[config.protocol], "probe", say)


def neighbours(config: ProbeConfig, say: Say = print) -> int:
    """Weighted nearest neighbours of the configured checkpoint; returns the exit code."""
    return score_frozen(config, neighbour_scores, "knn", say)


def as_finetuning(config: ProbeConfig) -> FinetuneConfig:
    """MAE's protocol as a run on labels: crops and flips, no mixing, no smoothing."""
    plain = AugmentConfig(randaugment=False, erasing=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0)
    shared = ("run", "seed", "engine", "saving", "tracking", "checkpoint", "epochs", "model", "data", "optim")
    values = {name: getattr(config, name) for name in (*shared, "evaluation")}
    return FinetuneConfig(**values, augment=plain)


def train_probe(config: ProbeConfig, resume: str, say: Say) -> int:
    """MAE's linear probe, on the engine of all training."""
    if config.checkpoint is None:
        raise ConfigError("checkpoint is not set: a probe needs one, e.g. checkpoint=runs/demo")
    if config.engine.parallel != "ddp":
        raise ConfigError(
            f"engine.parallel={config.engine.parallel}: a probe trains one layer; set engine.parallel=ddp"
        )
    settings = as_finetuning(config)

    def assemble(folder: RunFolder, ranks: Ranks, resuming: bool) -> Assembly:
        start = settle_start(settings, kept_start(folder, ranks) if resuming else None)
        with main_first(ranks):
            images = open_labelled(config.data, start.backbone.channels)
        classes = len(images.classes)
        plan = build_plan(settings, start.backbone, len(images.train), classes, ranks.count, frozen=True)
        torch.manual_seed(config.seed)
        encoder = frozen_encoder(start.backbone, start.weights, config.model, say if ranks.is_main else _nothing)
        state = probe_state(config, start, encoder, classes, ranks)
        how = examination(settings, start.backbone, choose_workers(config, ranks))
        return Assembly(
            title=f"linear probe of {start.backbone.name}, {config.model.pooling} pooling; {images.describe()}",
            plan=plan,
            dataset=RequestDataset(images.train, build_transform(settings, start.backbone), replace=True),
            task=build_task(settings, classes),
            state=state,
            observers=watch(state, images, how, ranks, config.evaluation.every),
            loop=loop_config(config, ProtocolConfig(), ranks, config.optim.accumulation, config.optim.clip),
            parent=start.parent,
            records=records(start, images.classes),
            conclude=partial(conclude, state, plan, images, how, ranks, folder),
        )

    return execute(config, assemble, resume, say)


def probe_state(config: ProbeConfig, start: Start, encoder: nn.Module, classes: int, ranks: Ranks) -> TrainState:
    """A frozen encoder with its new head, on this rank's device."""
    optim, backbone = config.optim, start.backbone
    embed = partial(pooled, pooling=config.model.pooling)
    model = Classifier(
        FrozenProbe(encoder, embed, feature_width(backbone, embed), classes), backbone.mean, backbone.std
    )
    model.to(ranks.device)
    compile_blocks(encoder, config.engine.compile, ranks.device)
    precision = Precision.choose(config.engine.precision, ranks.device)
    choose_attention(model, precision)
    settings = OptimizerSettings(optim.name, optim.weight_decay, (optim.betas[0], optim.betas[1]), optim.momentum)
    return TrainState(
        model=model,
        network=replicate(model, ranks),
        optimizer=build_optimizer(decay_groups(model, optim.weight_decay), settings),
        precision=precision,
        device=ranks.device,
        scaler=precision.scaler(),
    )


def frozen_encoder(backbone: Backbone, weights: Weights | None, model: ClassifierConfig, say: Say) -> nn.Module:
    """The network without a head, with the checkpoint's weights, its final norm included.

    Without `weights` (a probe that continues) its own checkpoint fills it.
    """
    has_class_token = backbone.shape is None or backbone.shape.class_token
    if model.pooling == "cls" and not has_class_token:
        raise ConfigError("model.pooling=cls: this network has no class token; use model.pooling=mean")
    net = backbone.build(0, "cls" if has_class_token and not backbone.norm_follows_pooling else "mean")
    if weights is not None:
        say(load_weights(net, weights, fresh=(), norm_to_fc_norm=True).text())
    return net.requires_grad_(False)


def pooled(net: nn.Module, images: Tensor, pooling: str) -> Tensor:
    """Features [N, D] of normalised images: of a ViT the class token or the mean of the patches.

    The final norm comes where the network has it: before the pooling, or after (`fc_norm`; the other is the identity).
    """
    if not isinstance(net, VisionTransformer):
        return net(images)
    tokens = net.forward_features(images)
    return net.fc_norm(tokens[:, 0] if pooling == "cls" else tokens[:, net.num_prefix_tokens :].mean(dim=1))


def feature_width(backbone: Backbone, embed: Callable[[nn.Module, Tensor], Tensor]) -> int:
    """Width of the pooled features."""
    net = backbone.build_without_data(0)
    return embed(net.eval(), torch.empty(1, backbone.channels, *backbone.size, device="meta")).shape[1]


Scorer = Callable[["Frozen", LabelledImages, ProbeConfig, Say], dict[str, Any]]


class Frozen:
    """A frozen encoder on its device, and how it is shown images."""

    def __init__(self, config: ProbeConfig, say: Say):
        if config.checkpoint is None:
            raise ConfigError("checkpoint is not set: scores need one, e.g. checkpoint=runs/demo")
        self.weights = open_weights(config.checkpoint, config.model.heads)
        self.backbone = choose_backbone(config.model, config.data, self.weights)
        self.device = choose_device(config.engine.device, 0)
        self.precision = Precision.choose(config.engine.precision, self.device)
        net = frozen_encoder(self.backbone, self.weights, config.model, say)
        self.model = Classifier(net, self.backbone.mean, self.backbone.std).to(self.device).eval()
        choose_attention(self.model, self.precision)
        testing = config.evaluation
        size = examination(as_finetuning(config), self.backbone, 0).size
        self.showing = {"size": size, "crop_fraction": testing.crop_fraction, "batch": testing.batch}
        self.showing["workers"] = config.data.workers or 0

    def embed(self, how: Callable[[nn.Module, Tensor], Any], images: Tensor) -> Any:
        """Features of uint8 images."""
        images = images.to(self.device, non_blocking=True)
        with torch.no_grad(), self.precision.autocast():
            return how(self.model.net, self.model.normalise(images))

    def all_features(self, how: Callable[[nn.Module, Tensor], Any], source: Source) -> Any:
        """Features of all images of a source, in memory."""
        return extract_features(partial(self.embed, how), source, list(range(len(source))), **self.showing)

    def stream(self, how: Callable[[nn.Module, Tensor], Tensor], source: Source) -> Iterator[Features]:
        """The same, a batch at a time."""
        return stream_features(partial(self.embed, how), source, list(range(len(source))), **self.showing)


def score_frozen(config: ProbeConfig, scorer: Scorer, job_type: str, say: Say) -> int:
    """Scores on features that are computed once; written to `scores.json`, metrics.jsonl and W&B with their lineage."""
    prepare_device(config)
    frozen = Frozen(config, say)
    # What chooses among candidates is cut from train by each protocol, and given back to train afterwards.
    images = open_labelled(replace(config.data, holdout=0.0), frozen.backbone.channels)
    test = images.test or images.val
    if test is None:
        raise ConfigError(f"{images.train.name} has neither test nor val images to score on; set data.test_split=...")
    images = replace(images, test=test)
    say(f"{frozen.backbone.name}; {images.describe()}")
    with RunFolder(config.run) as folder:
        if any(folder.checkpoints.iterdir()):
            raise ConfigError(f"{folder.path} holds a training run; choose another folder for scores with run=...")
        scores = scorer(frozen, images, config, say)
        origin = frozen.weights.origin
        tracker = open_trackers(config, folder, None, origin, job_type)
        tracker.log({f"{job_type}/{name}": value for name, value in scores.items() if isinstance(value, float)}, 0)
        tracker.finish(0)
        write_text_atomic(folder.config_path, dump_config(config))
        report = {"job": job_type, "scores": scores, "images": {"train": len(images.train), "test": len(test)}}
        write_text_atomic(folder.path / SCORES_FILE, json.dumps({**report, "seed": config.seed}, indent=1))
        say(f"everything is in {folder.path}")
    return 0


def grid_scores(frozen: Frozen, images: LabelledImages, config: ProbeConfig, say: Say) -> dict[str, Any]:
    """The grid of linear heads."""
    shape, settings = frozen.backbone.shape, config.grid
    layers = min(settings.layers, shape.depth) if shape is not None else settings.layers
    how = partial(vit_features, layers=layers)
    train, test = (frozen.all_features(how, _present(source)) for source in (images.train, images.test))
    result = grid_probe(
        train,
        test,
        kinds=linear_kinds(train),
        rates=settings.rates,
        batch=settings.batch,
        epochs=settings.epochs,
        least_steps=settings.least_steps,
        hold_out=settings.holdout,
        standardise=settings.standardise,
        seed=config.seed,
        device=frozen.device,
    )
    say(f"accuracy on held-out training images, in %:\n\n{held_out_table(result)}\n")
    if result.edge:
        say(f"note: the chosen rate {result.rate:g} is at the edge of the grid; extend grid.rates to look beyond it")
    say(f"test: top-1 {100 * result.accuracy:.2f} % with {result.kind} at {result.rate:g}; {result.protocol}")
    return {"top1": result.accuracy, "features": result.kind, "rate": result.rate, "protocol": result.protocol}


def logistic_scores(frozen: Frozen, images: LabelledImages, config: ProbeConfig, say: Say) -> dict[str, Any]:
    """Logistic regression."""
    how = partial(pooled, pooling=config.model.pooling)
    train, test = (frozen.all_features(how, _present(source)) for source in (images.train, images.test))
    result = logistic_probe(train, test, seed=config.seed)
    say(f"test: top-1 {100 * result.accuracy:.2f} % with C={result.strength:g}, {config.model.pooling} pooling")
    return {"top1": result.accuracy, "strength": result.strength, "protocol": PROTOCOLS["logistic"]}


def neighbour_scores(frozen: Frozen, images: LabelledImages, config: ProbeConfig, say: Say) -> dict[str, Any]:
    """Weighted nearest neighbours; test features are used as they come and not kept."""
    how = partial(pooled, pooling=config.model.pooling)
    bank = frozen.all_features(how, images.train)
    queries = frozen.stream(how, _present(images.test))
    settings = config.neighbours
    found = knn_accuracy(bank, queries, settings.k, settings.temperature, device=frozen.device)
    for k, accuracy in found.items():
        say(f"test: {k}-NN top-1 {100 * accuracy:.2f} % (T={settings.temperature:g}, {config.model.pooling} pooling)")
    return {f"top1_k{k}": accuracy for k, accuracy in found.items()}


def _present(source: Source | None) -> Source:
    assert source is not None
    return source


def _nothing(_line: str) -> None:
    """Says nothing: for ranks other than the main one."""
