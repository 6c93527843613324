"""What detection and semantic segmentation share: their network, their plan, and which images are for what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae_et.config import ConfigError, DenseOptimConfig, DetectConfig, ImageDataConfig, ProtocolConfig, SegmentConfig
from mae_et.curriculum import Curriculum, LearningRate, Plan
from mae_et.curriculum.cost import CountedCost
from mae_et.curriculum.stage import as_size, format_size
from mae_et.data.loader import SampleDataset
from mae_et.data.splits import Images
from mae_et.engine.distributed import Ranks
from mae_et.engine.loop import Observer
from mae_et.engine.optim import supervised_groups
from mae_et.engine.run_folder import RunFolder
from mae_et.engine.state import TrainState
from mae_et.engine.tasks import Task
from mae_et.exchange.matching import load_weights
from mae_et.labelled import AnnotatedImages
from mae_et.models.detection import Detector
from mae_et.models.segmentation import Segmenter
from mae_et.models.trunk import Kind, Trunk, build_trunk, check_trunk
from mae_et.running import Assembly, Say, execute, loop_config, main_first
from mae_et.supervised import Start, build_state, kept_start, records, settle_start
from mae_et.tracking.tracker import Tracker

DenseConfig: TypeAlias = DetectConfig | SegmentConfig
Size = tuple[int, int]
# New in a network without a head: what normalised the mean of a classifier's patches does not fit all of them.
FRESH = ("norm.", "fc_norm.", "head.")


def settle_dense_start(config: DenseConfig, kept: Start | None = None) -> Start:
    """The network and its first weights; those of a run that continues are `kept`.

    A ViT loses its class token: all patches are wanted, and nothing else.

    Raises:
        ConfigError, WeightsError: nothing says which network or which size, or the checkpoint cannot be used.
    """
    if config.data.size is None:
        raise ConfigError("data.size=null: checkpoints were trained at other sizes than these tasks need; give one")
    start = settle_start(config, kept)
    shape = start.backbone.shape
    if shape is None:
        return start
    return replace(start, backbone=replace(start.backbone, shape=replace(shape, class_token=False)))


def dense_trunk(config: DenseConfig, start: Start, kind: Kind, say: Say, least_stride: int = 1) -> Trunk:
    """The network with its first weights, giving a pyramid of maps or its plain map; from torch's global generator.

    Args:
        config, start: of the run.
        kind: "pyramid" or "map".
        say: where the report on weights goes.
        least_stride: of the pyramid's levels, in px.

    Raises:
        ConfigError: the network cannot be built, gives no maps, or does not take the final size.
        WeightsError: the checkpoint does not fit it.
    """
    model = config.model
    net = start.backbone.build(0, "none", model.drop_path)
    plain = isinstance(net, VisionTransformer)
    if start.weights is not None:
        say(load_weights(net, start.weights, fresh=FRESH).text())
    try:
        trunk = build_trunk(
            net,
            kind=kind,
            channels=model.channels,
            window=model.window,
            global_blocks=model.global_blocks,
            taps=model.taps if plain and kind == "pyramid" else "last",  # pyright: ignore[reportArgumentType] - validated
            checkpointing=model.checkpointing,
            # Statistics of a network from scratch are those of nothing.
            frozen_norm=model.frozen_norm and start.parent is not None,
            least_stride=least_stride,
            size=start.backbone.size,
        )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    check_grain("data.size", start.backbone.size, trunk)
    return trunk


def check_grain(key: str, size: Size, trunk: Trunk) -> None:
    """Raise ConfigError for a size that the trunk's coarsest map does not divide."""
    if any(side % trunk.grain for side in size):
        raise ConfigError(f"{key}={format_size(size)}: sides must be multiples of {trunk.grain} px for this network")


def size_of(key: str, value: int | Sequence[int] | None, default: Size | None = None) -> Size:
    """(height, width) in px of a configured size; the default, if there is one, for null.

    Raises:
        ConfigError: it is no size.
    """
    try:
        return default if value is None and default else as_size(value)  # pyright: ignore[reportArgumentType] - it checks
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{key}: {error}") from None


def learning_rate(optim: DenseOptimConfig) -> LearningRate:
    """The configured schedule.

    Raises:
        ValueError: a minimum above the peak, or drops outside of the budget.
    """
    peak = optim.lr or optim.base_lr * optim.batch / 256
    return LearningRate(peak, optim.warmup, optim.min_lr, optim.decay, tuple(optim.drops))


def dense_plan(config: DenseConfig, size: Size, grain: int, multiply_adds: float, images: int, ranks: int) -> Plan:
    """The run in steps: one stage at the final size.

    Args:
        config: of the run.
        size: (height, width) in px.
        grain: px, of the network's coarsest map.
        multiply_adds: of a forward pass of one image.
        images: in the training set.
        ranks: processes that share a batch.

    Raises:
        ConfigError: whatever `Curriculum.plan` refuses.
    """
    optim = config.optim
    cost = CountedCost({size: multiply_adds})
    # A plan leaves out each pass's last partial batch, where there is a whole one.
    whole = images // optim.batch * optim.batch or images
    epochs = config.epochs if config.steps is None else config.steps * optim.batch / whole
    try:
        return Curriculum.preset("baseline", size, grain, (0.0, 0.0)).plan(
            epochs=epochs,
            images=images,
            batch=optim.batch,
            patch_size=grain,
            cost=cost,
            flops=cost,
            learning_rate=learning_rate(optim),
            final_size=size,
            ranks=ranks,
            accumulation=optim.accumulation,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def dense_state(config: DenseConfig, model: nn.Module, trunk: Trunk, ranks: Ranks) -> TrainState:
    """Optimizer, average and number format, on this rank's device.

    Learning rates fall towards the network's first layer (`optim.layer_decay`); its head has the schedule's own.
    BatchNorm that is not frozen takes its statistics over all GPUs, whose shares of a batch are small.
    """
    optim = config.optim
    if ranks.count > 1 and ranks.device.type == "cuda":  # gloo has no such thing
        model = convert_sync_batchnorm(model)  # timm's, which keeps the activations that some of its layers hold

    def groups() -> list[dict[str, object]]:
        return supervised_groups(trunk.net, optim.weight_decay, optim.layer_decay, model)

    return build_state(config, model, trunk.net, groups, ranks)


S = TypeVar("S", bound=Images)


def open_annotated(
    data: ImageDataConfig,
    splits: Callable[[Path], tuple[str, ...]],
    opened: Callable[[Path, str, tuple[str, ...]], S],
    hold_out: Callable[[S, float, int], tuple[S, S]],
) -> AnnotatedImages[S]:
    """Open the splits; which of them is for what follows `labelled.open_labelled`.

    Args:
        data: of the configuration.
        splits: that a root holds.
        opened: (root, split, names of classes) to the images of a split, its classes in the order of the names.
        hold_out: divides images by a share and a seed.

    Raises:
        ConfigError: no root, splits that are not there, or classes that differ between splits.
    """
    if data.root is None:
        raise ConfigError("data.root is not set: give the folder of the images and their annotations, data=/folder")
    root = Path(data.root)
    try:
        others = [split for split in splits(root) if split != data.train_split]
        test_split = data.test_split or ("test" if "test" in others else "val" if "val" in others else None)
        val_split = data.val_split or ("val" if "val" in others and test_split != "val" else None)
        train = opened(root, data.train_split, ())
        val = None if val_split is None else opened(root, val_split, train.classes)
        test = None if test_split is None else opened(root, test_split, train.classes)
        for other in (val, test):
            if other is not None and other.classes != train.classes:
                raise ValueError(
                    f"the classes of {train.name} and {other.name} differ: {', '.join(train.classes)} against "
                    f"{', '.join(other.classes)}; give both the same categories, in the same order of their ids"
                )
        for name in train.classes:
            if not name.isprintable():  # pictures and tables cannot show it
                raise ValueError(f"{train.name} has a class named {name!r}: give it a name that can be printed")
        if val is None and data.holdout > 0:
            train, val = hold_out(train, data.holdout, data.subset_seed)
    except (ValueError, OSError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"data: {error}") from None
    return AnnotatedImages(train, val, test)


M = TypeVar("M", Detector, Segmenter)


@dataclass(frozen=True)
class Parts(Generic[S, M]):
    """What makes a run one of detection, or one of segmentation.

    Attributes:
        open_images: (channels of the network, say) to the images.
        build_model: (start, classes, say) to the model, from torch's global generator.
        multiply_adds: of a forward pass of one training image of a size.
        examined: sizes in px of what the trunk sees in examinations.
        dataset: of the training images.
        task: what a step asks.
        watch: (state, images, ranks) to what looks at held-out images during training.
        conclude: (state, plan, images, ranks, folder, tracker, say, again), as of `running.Assembly`.
    """

    open_images: Callable[[int, Say], AnnotatedImages[S]]
    build_model: Callable[[Start, int, Say], M]
    multiply_adds: Callable[[M, Size], float]
    examined: Callable[[M], Sequence[Size]]
    dataset: Callable[[S], SampleDataset]
    task: Task
    watch: Callable[[TrainState, AnnotatedImages[S], Ranks], Sequence[Observer]]
    conclude: Callable[[TrainState, Plan, AnnotatedImages[S], Ranks, RunFolder, Tracker, Say, bool], None]


def plan_dense(config: DenseConfig, parts: Parts[S, M], ranks: int = 1) -> Plan:
    """The plan of a run, from `data.images` and `data.classes` or from the data; nothing is computed.

    Raises:
        ConfigError: there are neither.
    """
    start, data = settle_dense_start(config), config.data
    images, classes = data.images, data.classes
    if images is None or classes is None:
        try:
            opened = parts.open_images(start.backbone.channels, print)
        except ConfigError as error:
            raise ConfigError(f"{error}\n(a plan needs only their numbers: data.images=... data.classes=...)") from None
        images, classes = len(opened.train), len(opened.classes)
    return planned(config, parts, start, images, classes, ranks)


def planned(config: DenseConfig, parts: Parts[S, M], start: Start, images: int, classes: int, ranks: int) -> Plan:
    """The plan of so many images, once the model has been tried without data."""
    with torch.device("meta"):
        outline = parts.build_model(replace(start, weights=None), classes, lambda _line: None)
    size = start.backbone.size
    try:
        check_trunk(outline.trunk, [size, *parts.examined(outline)], start.backbone.channels)
    except ValueError as error:
        raise ConfigError(f"evaluation: {error}") from None
    return dense_plan(config, size, outline.trunk.grain, parts.multiply_adds(outline, size), images, ranks)


def run_dense(
    config: DenseConfig,
    parts: Parts[S, M],
    resume: str = "auto",
    say: Say = print,
    only_evaluate: bool = False,
    until: float = 1.0,
) -> int:
    """Run, or continue, a run; `running.execute` documents arguments, exit code and errors.

    Args:
        config, parts: of the run.
        resume, say, until: see there.
        only_evaluate: examine the run's last checkpoint, and train nothing.
    """

    def assemble(folder: RunFolder, ranks: Ranks, resuming: bool) -> Assembly:
        start = settle_dense_start(config, kept_start(folder, ranks) if resuming else None)
        quiet = say if ranks.is_main else lambda _line: None
        with main_first(ranks):
            images = parts.open_images(start.backbone.channels, quiet)
        return assemble_dense(config, parts, start, images, folder, ranks, quiet)

    return execute(config, assemble, resume, say, only_evaluate, until)


def assemble_dense(
    config: DenseConfig,
    parts: Parts[S, M],
    start: Start,
    images: AnnotatedImages[S],
    folder: RunFolder,
    ranks: Ranks,
    say: Say,
) -> Assembly:
    """`run_dense` from its network and images on."""
    plan = planned(config, parts, start, len(images.train), len(images.classes), ranks.count)
    torch.manual_seed(config.seed)
    model = parts.build_model(start, len(images.classes), say)
    parameters = sum(p.numel() for p in model.parameters())
    state = dense_state(config, model, model.trunk, ranks)
    return Assembly(
        title=f"{config.model.head} on {start.backbone.name} ({parameters / 1e6:.1f} M parameters), "
        f"{'from scratch' if start.parent is None else 'from ' + start.parent.path}; {images.describe()}",
        plan=plan,
        dataset=parts.dataset(images.train),
        task=parts.task,
        state=state,
        observers=parts.watch(state, images, ranks),
        loop=loop_config(config, ProtocolConfig(), ranks, config.optim.accumulation, config.optim.clip),
        parent=start.parent,
        records=records(start, images.classes),
        conclude=partial(parts.conclude, state, plan, images, ranks, folder),
    )
