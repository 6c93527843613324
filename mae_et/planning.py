"""From a configuration of pretraining to a plan. Needs neither torch nor the data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from mae_et.config import ConfigError, CurriculumConfig, FinetuneConfig, PretrainConfig, ReplayConfig, StageConfig
from mae_et.config.plain import JSON_LIMIT, parse_json, read_bytes
from mae_et.curriculum import (
    AreaCost,
    Curriculum,
    LearningRate,
    MAECost,
    MeasuredCost,
    Plan,
    Replay,
    Stage,
    TransformerShape,
    auto_replay,
)
from mae_et.curriculum.budget import LONG, Budget, PlanOf, epochs_for, parse_budget
from mae_et.curriculum.calibration import Calibration
from mae_et.curriculum.cost import CostModel, CrossDecoderShape
from mae_et.curriculum.stage import as_size, format_size, replace_stage, stage_in_proportion
from mae_et.sizes import ENCODER_SIZES, EncoderSize, TargetKind, hog_cell, target_values

Trial = TypeVar("Trial", PretrainConfig, FinetuneConfig)

AUTO = "auto"  # replay.ratio by measured times
WITHOUT_CALIBRATION = (
    "needs to know how long steps take: give calibration=FILE of `python -m mae_et calibrate --config ... --out FILE`, "
    "made with the same model, stages, batch and machine; `plan` can measure here and now with --calibrate"
)


def final_size(config: PretrainConfig) -> tuple[int, int]:
    """(height, width) in px of the last stage."""
    try:
        return as_size(config.data.size)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"data.size: {error}") from None


def encoder_size(config: PretrainConfig) -> EncoderSize:
    """Width, depth and heads: the named size with the numbers that the configuration changes."""
    model, named = config.model, ENCODER_SIZES[config.model.name]
    if model.locality:
        raise ConfigError(
            "model.locality=true: its convolution needs every patch and its neighbours, and a masked autoencoder's "
            "encoder sees only those that are not masked; use it in supervised training (finetune.py)"
        )
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


def decoder_shape(config: PretrainConfig) -> TransformerShape | CrossDecoderShape:
    """The decoder's blocks in plain numbers.

    Raises:
        ConfigError: a part of the masked patches is to be predicted by MAE's decoder.
    """
    model = config.model
    if model.decoder == "crossmae":
        return CrossDecoderShape(model.decoder_width, model.decoder_depth, model.mlp_ratio, model.inter_block)
    if model.prediction_ratio is not None:
        raise ConfigError(
            f"model.prediction_ratio={model.prediction_ratio} needs model.decoder=crossmae: in MAE's decoder masked "
            "patches attend to each other, so that leaving some out changes what the others are given; set it to null "
            "or change the decoder"
        )
    return TransformerShape(model.decoder_width, model.decoder_depth, model.mlp_ratio)


def model_cost(config: PretrainConfig) -> MAECost:
    """Multiply-adds of the configured model by the geometry of a stage."""
    model, size = config.model, encoder_size(config)
    kind: TargetKind = config.target.kind  # pyright: ignore[reportAssignmentType] - validated by the configuration
    values = target_values(kind, model.patch_size, config.data.channels, config.target.cell, config.target.bins)
    return MAECost(
        encoder=TransformerShape(size.width, size.depth, model.mlp_ratio),
        decoder=decoder_shape(config),
        patch_values=config.data.channels * model.patch_size**2,
        target_values=values,
        prediction_ratio=model.prediction_ratio,
    )


def needs_calibration(config: PretrainConfig | FinetuneConfig) -> bool:
    """Whether the plan depends on how long a step takes on some machine.

    Raises:
        ConfigError: the budget cannot be read.
    """
    budget = budget_of(config)
    measured = config.curriculum.cost == "measured" and not config.curriculum.seconds
    return measured or config.replay.ratio == AUTO or (budget is not None and budget.is_time)


def budget_of(config: PretrainConfig | FinetuneConfig) -> Budget | None:
    """The budget where one takes the place of `epochs`.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return None if config.budget is None else parse_budget(config.budget)
    except ValueError as error:
        raise ConfigError(f"budget: {error}") from None


def settle_epochs(config: PretrainConfig | FinetuneConfig, plan_of: PlanOf, calibration: Calibration | None) -> float:
    """`epochs`, or those that `budget` comes to.

    Raises:
        ConfigError: a budget in time without a calibration, or too little for the curriculum.
        ValueError: whatever `plan_of` refuses.
    """
    budget = budget_of(config)
    if budget is None:
        return config.epochs
    if budget.is_time and calibration is None:
        raise ConfigError(f"budget={config.budget} {WITHOUT_CALIBRATION}")
    return epochs_for(budget, plan_of, calibration)


def plan_of(text: str) -> Plan:
    """The plan that a run's plan.json holds.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: it holds none.
    """
    return Plan.from_dict(parse_json(text))


def read_calibration(path: str, processes: int | None = None) -> Calibration:
    """A saved calibration.

    Args:
        path: of the file.
        processes: that will share a batch; None takes any number.

    Raises:
        ConfigError: it cannot be read, or is of another number of processes.
    """
    try:
        calibration = Calibration.from_json(read_bytes(Path(path).expanduser(), JSON_LIMIT).decode())
    except (OSError, ValueError) as error:
        raise ConfigError(f"calibration={path}: {error}") from None
    if processes not in (None, calibration.processes):
        raise ConfigError(
            f"calibration={path} was measured with {calibration.processes} processes, and this run has {processes}: "
            "calibrate with as many, e.g. torchrun --nproc-per-node N -m mae_et calibrate"
        )
    return calibration


def trial_config(config: Trial) -> Trial:
    """The configuration with nothing in it that takes a calibration, and stages of the same geometries."""
    curriculum = replace(config.curriculum, cost="area")
    return replace(config, budget=None, epochs=LONG, curriculum=curriculum, replay=ReplayConfig())


def accounting(settings: CurriculumConfig, flops: CostModel, calibration: Calibration | None = None) -> CostModel:
    """The cost model that the budget is accounted in; `flops` is the model's own.

    Raises:
        ConfigError: a measured cost without measurements.
    """
    if settings.cost == "measured" and not settings.seconds:
        if calibration is None:
            raise ConfigError(f"curriculum.cost=measured without curriculum.seconds {WITHOUT_CALIBRATION}")
        return calibration.cost()
    if settings.cost == "measured":
        try:
            return MeasuredCost({int(size): seconds for size, seconds in settings.seconds.items()})
        except ValueError:
            raise ConfigError('curriculum.seconds must map B to seconds per image, e.g. {"96": 0.004}') from None
    return AreaCost() if settings.cost == "area" else flops


def replay_buffer(settings: ReplayConfig, channels: int, size: tuple[int, int], downsample: str) -> Replay:
    """The configured replay buffer; `auto` replays nothing before it is settled.

    Args:
        settings: of the buffer.
        channels: of the images.
        size: final (height, width) in px.
        downsample: how workers bring images down to B; the Fourier methods leave that to the device.

    Raises:
        ConfigError: the ratio is neither a whole number nor auto.
    """
    ratio = settings.ratio
    if ratio == AUTO:
        ratio = 0
    if isinstance(ratio, bool) or not isinstance(ratio, int) or ratio < 0:
        raise ConfigError(
            f"replay.ratio={ratio!r} must be how many steps replay images after each step on fresh ones: 0 (none), "
            "1, 2, ..., or auto"
        )
    return Replay(ratio, 1e9 * settings.gigabytes, channels, size if downsample.startswith("fourier") else None)


def settle_replay(
    curriculum: Curriculum, settings: ReplayConfig, calibration: Calibration | None, **terms: Any
) -> Curriculum:
    """The curriculum with the replay that measured times call for, where `replay.ratio` is auto.

    Stages that say themselves how much they replay keep it.

    Args:
        curriculum, settings: as configured.
        calibration: of the same geometries.
        terms: of `Curriculum.plan`.

    Raises:
        ConfigError: there is no calibration.
        ValueError: whatever `Curriculum.plan` and `Calibration.timing` refuse.
    """
    if settings.ratio != AUTO:
        return curriculum
    if calibration is None:
        raise ConfigError(f"replay.ratio=auto {WITHOUT_CALIBRATION}")
    stages = []
    for stage, planned in zip(curriculum.stages, curriculum.plan(**terms).stages):
        timing = calibration.timing(planned)
        measured = auto_replay(timing.data_seconds, timing.step_seconds, settings.most)
        stages.append(replace_stage(stage, replay=measured if stage.replay is None else stage.replay))
    return replace(curriculum, stages=tuple(stages))


def build_curriculum(
    settings: CurriculumConfig,
    size: tuple[int, int],
    stride: int,
    epochs: float,
    magnitude: tuple[float, float] = (0.0, 0.0),
) -> Curriculum:
    """The configured schedule.

    Args:
        settings: of the curriculum.
        size: final (height, width) in px.
        stride: px of which every B is a multiple: the patch.
        epochs: of the run, for sizes that grow by the epoch.
        magnitude: of augmentation at u = 0 and u = 1; MAE augments by crop and flip alone, so it is 0 there.

    Raises:
        ConfigError: unknown preset, or stages that do not make a curriculum.
    """
    try:
        if settings.stages is not None:
            stages = [stage_of(stage) for stage in settings.stages]
            found_for = size if settings.size is None else as_size(settings.size)
            if found_for != size:
                stages = [stage_in_proportion(stage, found_for, size, stride) for stage in stages]
            curriculum = Curriculum(tuple(stages), axis=settings.axis, magnitude=magnitude)
        elif settings.growth.first is not None:
            first, growth = settings.growth.first, settings.growth
            curriculum = Curriculum.growth(first, growth.step, growth.every, epochs, size, magnitude)
        else:
            curriculum = Curriculum.preset(settings.preset or "baseline", size, stride, magnitude, settings.floor)
        for stage in curriculum.stages:
            if stage.bandwidth[0] > size[0] or stage.bandwidth[1] > size[1]:
                raise ValueError(
                    f"B={format_size(stage.bandwidth)} is above the final size {format_size(size)}: raise data.size, "
                    "or say with curriculum.size which final size the stages are meant for, to take them in proportion"
                )
        return curriculum.early_large_batch(size) if settings.early_large_batch else curriculum
    except (ValueError, TypeError) as error:
        raise ConfigError(f"curriculum: {error}") from None


def stage_of(settings: StageConfig) -> Stage:
    """A stage as it is configured."""
    magnitude = settings.magnitude
    return Stage(
        settings.end,
        as_size(settings.bandwidth),
        settings.mask_ratio,
        visible=settings.visible,
        batch_scale=settings.batch_scale,
        magnitude=magnitude if magnitude is None or isinstance(magnitude, int | float) else tuple(magnitude),
        low_pass=settings.low_pass,
        replay=settings.replay,
    )


def build_plan(config: PretrainConfig, images: int, ranks: int = 1, calibration: Calibration | None = None) -> Plan:
    """The run in steps.

    Args:
        config: of the run.
        images: in the data set.
        ranks: processes that share a batch.
        calibration: of the configuration, where `needs_calibration` says so.

    Raises:
        ConfigError: whatever `Curriculum.plan` refuses.
    """
    optim = config.optim
    peak = peak_learning_rate(config)
    try:
        size, curriculum = final_size(config), config.curriculum
        terms = {
            "images": images,
            "batch": optim.batch,
            "patch_size": config.model.patch_size,
            "mask_ratio": config.mask_ratio,
            "cell": hog_cell(config.model.patch_size, config.target.cell) if config.target.kind == "hog" else None,
            "cost": accounting(curriculum, model_cost(config), calibration),
            "flops": model_cost(config),
            "final_size": size,
            "learning_rate": LearningRate(peak, optim.warmup, optim.min_lr),
            "learning_rate_cap": curriculum.lr_cap,
            "more_tokens": curriculum.more_tokens,
            "replay": replay_buffer(config.replay, config.data.channels, size, config.data.downsample),
            "drop_last": curriculum.drop_last,
            "ranks": ranks,
            "accumulation": optim.accumulation,
        }

        def plan_of(epochs: float, times: float = 1.0) -> Plan:
            stages = build_curriculum(curriculum, size, config.model.patch_size, epochs)
            settled = settle_replay(stages, config.replay, calibration, epochs=times * epochs, **terms)
            return settled.plan(epochs=times * epochs, **terms)

        plan = plan_of(settle_epochs(config, plan_of, calibration))
        if calibration is not None:
            calibration.seconds(plan.stages)  # refuses stages that it does not hold
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"budget={config.budget}: {error}" if config.budget else str(error)) from None
    for stage in plan.stages:
        if not stage.masked:
            raise ConfigError(f"{stage.name}: no patch is masked, so there is nothing to predict; raise mask_ratio")
    return plan
