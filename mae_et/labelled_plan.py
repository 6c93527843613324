"""From a configuration of training on labels to its plan."""

from __future__ import annotations

import math
from functools import lru_cache, partial

from torch import nn

from mae_et.config import ConfigError, FinetuneConfig
from mae_et.curriculum import LearningRate, Plan
from mae_et.curriculum.budget import LONG
from mae_et.curriculum.calibration import Calibration
from mae_et.curriculum.cost import CountedCost
from mae_et.curriculum.stage import as_size
from mae_et.exchange.backbone import Backbone
from mae_et.models.backbones import check_sizes, multiply_adds, stride
from mae_et.planning import accounting, build_curriculum, replay_buffer, settle_epochs, settle_replay

Size = tuple[int, int]


def peak_learning_rate(config: FinetuneConfig) -> float:
    """`optim.lr`, or MAE's rule: base_lr * batch / 256."""
    return config.optim.lr or config.optim.base_lr * config.optim.batch / 256


def examination_size(config: FinetuneConfig, backbone: Backbone) -> tuple[int, int]:
    """(height, width) in px at which accuracy is taken: the final size, or `evaluation.size` (FixRes)."""
    try:
        return backbone.size if config.evaluation.size is None else as_size(config.evaluation.size)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"evaluation.size: {error}") from None


def build_plan(
    config: FinetuneConfig,
    backbone: Backbone,
    images: int,
    classes: int,
    ranks: int = 1,
    frozen: bool = False,
    calibration: Calibration | None = None,
) -> Plan:
    """The run in steps, once the network has been tried at every B; nothing is computed.

    Args:
        config, backbone: of the run.
        images, classes: in the training set.
        ranks: processes that share a batch.
        frozen: whether the network is run forward alone, under a head whose own cost is nothing beside it.
        calibration: of the configuration, where `needs_calibration` says so.

    Raises:
        ConfigError: a B that the network cannot take, or whatever `Curriculum.plan` refuses.
    """
    optim, augment = config.optim, config.augment
    magnitude = (augment.magnitude[0], augment.magnitude[1]) if augment.randaugment else (0.0, 0.0)
    try:
        step = grain(backbone, classes)
        stages = partial(build_curriculum, config.curriculum, backbone.size, step, magnitude=magnitude)
        # Growth refuses too few epochs, and a budget has none yet; its sizes are those of any number.
        curriculum = stages(epochs=config.epochs if config.budget is None else LONG)
        sizes = [*(stage.bandwidth for stage in curriculum.stages), backbone.size]
        counts = {size: count(backbone.to_json(), classes, size) for size in sizes}
        check_sizes(network(backbone.to_json(), classes), [examination_size(config, backbone)], backbone.channels)
        # A plan counts a backward pass of twice the cost.
        counted = CountedCost({size: value / 3 if frozen else value for size, value in counts.items()})
        terms = {
            "images": images,
            "batch": optim.batch,
            "patch_size": step,
            "cost": accounting(config.curriculum, counted, calibration),
            "flops": counted,
            "learning_rate": LearningRate(peak_learning_rate(config), optim.warmup, optim.min_lr),
            "final_size": backbone.size,
            "learning_rate_cap": config.curriculum.lr_cap,
            "more_tokens": config.curriculum.more_tokens,
            "replay": replay_buffer(config.replay, backbone.channels, backbone.size, config.data.downsample),
            "drop_last": config.curriculum.drop_last,
            "ranks": ranks,
            "accumulation": optim.accumulation,
        }

        def plan_of(epochs: float, times: float = 1.0) -> Plan:
            settled = settle_replay(stages(epochs=epochs), config.replay, calibration, epochs=times * epochs, **terms)
            return settled.plan(epochs=times * epochs, **terms)

        plan = plan_of(settle_epochs(config, plan_of, calibration))
        if calibration is not None:
            calibration.seconds(plan.stages)  # refuses stages that it does not hold
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"budget={config.budget}: {error}" if config.budget else str(error)) from None
    check_batch(config, ranks)
    return plan


def check_batch(config: FinetuneConfig, ranks: int) -> None:
    """Raise ConfigError for a batch that mixing or repeats do not divide."""
    optim, augment = config.optim, config.augment
    micro = optim.batch // (ranks * optim.accumulation)
    if (augment.mixup or augment.cutmix) and micro % 2:
        raise ConfigError(
            f"optim.batch={optim.batch} gives {micro} images at a time, and mixup and cutmix mix them in pairs: choose "
            "an even number, or augment.mixup=0 augment.cutmix=0"
        )
    if optim.batch % config.data.repeats:
        raise ConfigError(f"data.repeats={config.data.repeats} does not divide optim.batch={optim.batch}")


def grain(backbone: Backbone, classes: int) -> int:
    """Px of which every B is a multiple: the patch of a plain ViT, else the stride of the last feature map."""
    if backbone.shape is not None:
        return backbone.shape.patch_size
    return math.gcd(stride(network(backbone.to_json(), classes)), *backbone.size)


# A budget or a search asks for many plans of one network: it is built and counted once.
@lru_cache(maxsize=4)
def network(backbone: str, classes: int) -> nn.Module:
    """A backbone's network without data, from its JSON."""
    return Backbone.from_json(backbone).build_without_data(classes)


@lru_cache(maxsize=256)
def count(backbone: str, classes: int, size: Size) -> float:
    """Multiply-adds of an image of `size` px, once the network has been tried at it.

    Raises:
        ValueError: it cannot take the size.
    """
    net, channels = network(backbone, classes), Backbone.from_json(backbone).channels
    check_sizes(net, [size], channels)
    return multiply_adds(net, [size], channels)[size]
