"""Configuration: dataclasses with the paper's run as defaults, a YAML file over them, `a.b=c` overrides over that."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and says what to do."""


@dataclass
class DataConfig:
    """Where images come from and how a worker crops them."""

    source: str = "imagenet1k"  # folder, list, fashion_mnist, cifar10, cifar100, flowers102, imagenet1k, imagenet22k
    root: str | None = None  # folder or list file; null takes the source's usual place
    split: str = "train"
    images: int | None = None  # number of images, for `plan` without the data; null counts them
    download: bool = True
    size: Any = 224  # final B in px, a number or [height, width]
    channels: int = 3
    mean: list[float] | None = None  # per channel, of pixels in [0, 1]; null takes ImageNet's for 3 channels
    std: list[float] | None = None
    scale: list[float] = field(default_factory=lambda: [0.2, 1.0])  # area of RandomResizedCrop
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])  # aspect of RandomResizedCrop
    flip: bool = True
    downsample: str = "resize"  # resize, lanczos, fourier, fourier_pixel0, bilinear, nearest
    max_pixels: int = 100_000_000  # larger images are refused from their header
    workers: int | None = None  # processes per rank; null chooses by device and cores


@dataclass
class ModelConfig:
    """The encoder by name, any of its numbers changed, and the decoder."""

    name: str = "vit_base"  # vit_tiny, vit_small, vit_base, vit_large, vit_huge
    patch_size: int = 16
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float = 4.0
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    positions: str = "from_final"  # from_final, native, interp


@dataclass
class TargetConfig:
    """What masked patches are asked for."""

    kind: str = "hog"  # hog, pixel, norm_pixel
    cell: int | None = None  # px; null is half a patch
    bins: int = 9


@dataclass
class StageConfig:
    """One stage of a curriculum of your own."""

    end: float = 1.0
    bandwidth: Any = 224  # px, a number or [height, width]
    mask_ratio: float | None = None


@dataclass
class CurriculumConfig:
    """A published schedule by name, or stages of your own."""

    preset: str | None = "efficienttrain_pp"  # baseline, efficienttrain, efficienttrain_pp, efficienttrain_pp_deit
    stages: list[StageConfig] | None = None  # takes the place of the preset
    axis: str = "compute"  # of `stages`: compute or epoch
    cost: str = "flops"  # flops, area, measured
    seconds: dict[str, float] = field(default_factory=dict)  # {"96": seconds per image} for cost: measured
    drop_last: bool = True  # leave out each pass's last partial batch


@dataclass
class OptimConfig:
    """Batch, learning rate and AdamW."""

    batch: int = 4096  # images per step over all ranks and accumulation steps
    accumulation: int = 1
    base_lr: float = 1.5e-4  # per 256 images
    lr: float | None = None  # peak learning rate; null is base_lr * batch / 256
    min_lr: float = 0.0
    warmup: float = 0.1  # fraction of the budget
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    clip: float | None = None  # largest gradient norm; null does not clip


@dataclass
class EngineConfig:
    """How steps are executed; none of it changes what is learned beyond rounding."""

    device: str = "auto"  # auto, cpu, cuda, mps
    precision: str = "auto"  # auto, bf16, fp16, fp32
    compile: str = "auto"  # auto (on GPUs), always, never: torch.compile of each transformer block
    threads: int | None = None  # CPU threads of a rank; null leaves torch's choice
    max_skipped: int = 10  # steps in a row with non-finite gradients before the run stops


@dataclass
class CheckpointConfig:
    """When to save, and how many to keep."""

    minutes: float | None = 15.0
    steps: int | None = None
    keep: int = 3


@dataclass
class TrackingConfig:
    """metrics.jsonl is always written; the rest is up to you."""

    every: int = 20  # steps between rows
    console: bool = True
    wandb: str = "disabled"  # online, offline, disabled
    project: str = "mae_et"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: list[str] = field(default_factory=list)
    pictures: bool = True  # reconstructions at the end of each stage
    picture_samples: int = 6


@dataclass
class EvaluationConfig:
    """Scores of the frozen encoder on a labelled set, during pretraining and by `python -m mae_et evaluate`."""

    every: float | None = None  # fraction of the compute between scores; null does not score during pretraining
    source: str | None = None  # null takes data.source
    root: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    train_images: int | None = 10_000  # null takes all
    test_images: int | None = 2_000
    knn: list[int] = field(default_factory=lambda: [20])
    probe: bool = True
    pooling: str = "mean"  # mean or cls
    crop_fraction: float = 0.875  # share of the resized image that the centre crop keeps


@dataclass
class PretrainConfig:
    """Everything that decides a pretraining run. The defaults are the paper's ViT-B run."""

    run: str = ""  # the run's folder; empty is runs/<name of the config file>
    seed: int = 0
    epochs: float = 400.0  # the budget, in epochs at the final size
    mask_ratio: float = 0.75
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


CHOICES: dict[str, tuple[str, ...]] = {
    "data.source": (
        *("folder", "list", "fashion_mnist", "cifar10", "cifar100"),
        *("flowers102", "imagenet1k", "imagenet22k"),
    ),
    "data.downsample": ("resize", "lanczos", "fourier", "fourier_pixel0", "bilinear", "nearest"),
    "model.name": ("vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"),
    "model.positions": ("from_final", "native", "interp"),
    "target.kind": ("hog", "pixel", "norm_pixel"),
    "curriculum.axis": ("compute", "epoch"),
    "curriculum.cost": ("flops", "area", "measured"),
    "engine.device": ("auto", "cpu", "cuda", "mps"),
    "engine.precision": ("auto", "bf16", "fp16", "fp32"),
    "engine.compile": ("auto", "always", "never"),
    "tracking.wandb": ("online", "offline", "disabled"),
    "evaluation.pooling": ("mean", "cls"),
}

# key: (lowest, highest, lowest itself allowed); every number must be finite besides. null is never checked.
RANGES: dict[str, tuple[float, float, bool]] = {
    "seed": (0, 2**63 - 1, True),
    "epochs": (0, math.inf, False),
    "mask_ratio": (0, 0.999999, True),
    "data.images": (1, math.inf, True),
    "data.channels": (1, math.inf, True),
    "data.workers": (0, math.inf, True),
    "data.max_pixels": (1, math.inf, True),
    "model.patch_size": (1, math.inf, True),
    "model.width": (4, math.inf, True),
    "model.depth": (1, math.inf, True),
    "model.heads": (1, math.inf, True),
    "model.mlp_ratio": (0, math.inf, False),
    "model.decoder_width": (4, math.inf, True),
    "model.decoder_depth": (1, math.inf, True),
    "model.decoder_heads": (1, math.inf, True),
    "target.cell": (1, math.inf, True),
    "target.bins": (1, math.inf, True),
    "optim.batch": (1, math.inf, True),
    "optim.accumulation": (1, math.inf, True),
    "optim.base_lr": (0, math.inf, False),
    "optim.lr": (0, math.inf, False),
    "optim.min_lr": (0, math.inf, True),
    "optim.warmup": (0, 0.999999, True),
    "optim.weight_decay": (0, math.inf, True),
    "optim.clip": (0, math.inf, False),
    "engine.threads": (1, math.inf, True),
    "engine.max_skipped": (1, math.inf, True),
    "checkpoint.minutes": (0, math.inf, False),
    "checkpoint.steps": (1, math.inf, True),
    "checkpoint.keep": (1, math.inf, True),
    "tracking.every": (1, math.inf, True),
    "tracking.picture_samples": (1, 64, True),
    "evaluation.every": (0, 1, False),
    "evaluation.crop_fraction": (0, 1, False),
    "evaluation.train_images": (2, math.inf, True),
    "evaluation.test_images": (1, math.inf, True),
}


def load_config(path: Path | str | None, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Defaults, then the YAML file, then `a.b=c` overrides.

    Raises:
        ConfigError: missing or malformed file, unknown key (with the nearest known one), wrong type, value out of
            range or not among the choices.
    """
    config = OmegaConf.structured(PretrainConfig)
    known = set(_keys(OmegaConf.to_container(config)))
    layers: list[tuple[str, Any]] = [] if path is None else [(str(path), _read(Path(path)))]
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} is not of the form key=value, e.g. optim.batch=256")
        layers.append((override, OmegaConf.from_dotlist([override])))
    for origin, layer in layers:
        _refuse_unknown(origin, OmegaConf.to_container(layer), known)
        try:
            config = OmegaConf.merge(config, layer)
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None) or "?"
            raise ConfigError(f"{origin}: {key}: {str(error).splitlines()[0]}") from None
    if not config.run:
        config.run = f"runs/{Path(path).stem if path else 'pretrain'}"
    result = OmegaConf.to_object(config)
    assert isinstance(result, PretrainConfig)
    validate(result)
    return result


def dump_config(config: PretrainConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def as_dict(config: PretrainConfig) -> dict[str, Any]:
    """The configuration as nested plain values."""
    values = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def differences(old: PretrainConfig, new: PretrainConfig) -> list[str]:
    """Keys whose values differ, as `key: old -> new`."""
    before, after = (OmegaConf.structured(config) for config in (old, new))
    keys = _keys(OmegaConf.to_container(OmegaConf.structured(PretrainConfig)))
    pairs = ((key, OmegaConf.select(before, key), OmegaConf.select(after, key)) for key in keys)
    return [f"{key}: {a} -> {b}" for key, a, b in pairs if a != b]


def validate(config: PretrainConfig) -> None:
    """Check choices and ranges.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    node = OmegaConf.structured(config)
    for key, choices in CHOICES.items():
        value = OmegaConf.select(node, key)
        if value not in choices:
            close = get_close_matches(str(value), choices, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{key}={value!r} is not one of {', '.join(choices)}{hint}")
    for key, (low, high, closed) in RANGES.items():
        value = OmegaConf.select(node, key)
        if value is None:
            continue
        if not (math.isfinite(value) and (value >= low if closed else value > low) and value <= high):
            bound = f"{'at least' if closed else 'above'} {low:g}"
            bound += f" and at most {high:g}" if high < math.inf else ""
            raise ConfigError(f"{key}={value} is out of range: it must be {bound}")
    for key in ("data.scale", "data.ratio", "optim.betas"):
        value = OmegaConf.select(node, key)
        if len(value) != 2 or not all(math.isfinite(v) and v > 0 for v in value):
            raise ConfigError(f"{key}={list(value)} must be two positive numbers")


def _read(path: Path) -> Any:
    """The YAML file as an OmegaConf node."""
    try:
        layer = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}; the recipes are in configs/") from None
    except Exception as error:  # PyYAML and OmegaConf raise many kinds for a file that is not a mapping of keys
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from None
    if not OmegaConf.is_dict(layer):
        raise ConfigError(f"{path} must hold keys and values at its top level")
    return layer


def _keys(values: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of the leaves of nested mappings; an empty mapping is a leaf."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _keys(value, f"{name}.")
        else:
            yield name


def _refuse_unknown(origin: str, values: Any, known: set[str]) -> None:
    """Raise ConfigError for keys that no dataclass has, with the nearest one that some dataclass has."""
    sections = {key.rpartition(".")[0] for key in known}
    for key in _keys(values):
        free_form = key.startswith("curriculum.seconds.")
        if key in known or key in sections or free_form:
            continue
        close = get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{origin}: unknown key {key!r}{hint}")
