"""From a configuration of pretraining to a plan. Needs neither torch nor the data."""

from __future__ import annotations

from mae_et.config import ConfigError, CurriculumConfig, PretrainConfig
from mae_et.curriculum import (
    AreaCost,
    Curriculum,
    LearningRate,
    MAECost,
    MeasuredCost,
    Plan,
    Stage,
    TransformerShape,
)
from mae_et.curriculum.cost import CostModel
from mae_et.curriculum.stage import as_size
from mae_et.sizes import ENCODER_SIZES, EncoderSize, TargetKind, hog_cell, target_values


def final_size(config: PretrainConfig) -> tuple[int, int]:
    """(height, width) in px of the last stage."""
    try:
        return as_size(config.data.size)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"data.size: {error}") from None


def encoder_size(config: PretrainConfig) -> EncoderSize:
    """Width, depth and heads: the named size with the numbers that the configuration changes."""
    model, named = config.model, ENCODER_SIZES[config.model.name]
    size = EncoderSize(model.width or named.width, model.depth or named.depth, model.heads or named.heads)
    pairs = {
        "model.width": (size.width, size.heads),
        "model.decoder_width": (model.decoder_width, model.decoder_heads),
    }
    for key, (width, heads) in pairs.items():
        if width % heads or width % 4:
            raise ConfigError(f"{key}={width} must be a multiple of 4 and of its {heads} heads")
    return size


def peak_learning_rate(config: PretrainConfig) -> float:
    """`optim.lr`, or MAE's rule: base_lr * batch / 256."""
    return config.optim.lr or config.optim.base_lr * config.optim.batch / 256


def model_cost(config: PretrainConfig) -> MAECost:
    """Multiply-adds of the configured model by the geometry of a stage."""
    model, size = config.model, encoder_size(config)
    kind: TargetKind = config.target.kind  # pyright: ignore[reportAssignmentType] - validated by the configuration
    values = target_values(kind, model.patch_size, config.data.channels, config.target.cell, config.target.bins)
    return MAECost(
        encoder=TransformerShape(size.width, size.depth, model.mlp_ratio),
        decoder=TransformerShape(model.decoder_width, model.decoder_depth, model.mlp_ratio),
        patch_values=config.data.channels * model.patch_size**2,
        target_values=values,
    )


def accounting(settings: CurriculumConfig, flops: CostModel) -> CostModel:
    """The cost model that the budget is accounted in; `flops` is the model's own."""
    if settings.cost == "measured":
        try:
            return MeasuredCost({int(size): seconds for size, seconds in settings.seconds.items()})
        except ValueError:
            raise ConfigError('curriculum.seconds must map B to seconds per image, e.g. {"96": 0.004}') from None
    return AreaCost() if settings.cost == "area" else flops


def build_curriculum(
    settings: CurriculumConfig, size: tuple[int, int], stride: int, magnitude: tuple[float, float] = (0.0, 0.0)
) -> Curriculum:
    """The configured schedule.

    Args:
        settings: of the curriculum.
        size: final (height, width) in px.
        stride: px of which every B is a multiple: the patch.
        magnitude: of augmentation at u = 0 and u = 1; MAE augments by crop and flip alone, so it is 0 there.

    Raises:
        ConfigError: unknown preset, or stages that do not make a curriculum.
    """
    try:
        if settings.stages is None:
            return Curriculum.preset(settings.preset or "baseline", size, stride, magnitude, settings.floor)
        stages = tuple(Stage(s.end, as_size(s.bandwidth), s.mask_ratio) for s in settings.stages)
        return Curriculum(stages, axis="epoch" if settings.axis == "epoch" else "compute", magnitude=magnitude)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"curriculum: {error}") from None


def build_plan(config: PretrainConfig, images: int, ranks: int = 1) -> Plan:
    """The run in steps.

    Args:
        config: of the run.
        images: in the data set.
        ranks: processes that share a batch.

    Raises:
        ConfigError: whatever `Curriculum.plan` refuses.
    """
    optim = config.optim
    peak = peak_learning_rate(config)
    try:
        plan = build_curriculum(config.curriculum, final_size(config), config.model.patch_size).plan(
            epochs=config.epochs,
            images=images,
            batch=optim.batch,
            patch_size=config.model.patch_size,
            mask_ratio=config.mask_ratio,
            cell=hog_cell(config.model.patch_size, config.target.cell) if config.target.kind == "hog" else None,
            cost=accounting(config.curriculum, model_cost(config)),
            flops=model_cost(config),
            learning_rate=LearningRate(peak, optim.warmup, optim.min_lr),
            drop_last=config.curriculum.drop_last,
            ranks=ranks,
            accumulation=optim.accumulation,
        )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for stage in plan.stages:
        if not stage.masked:
            raise ConfigError(f"{stage.name}: no patch is masked, so there is nothing to predict; raise mask_ratio")
    return plan
