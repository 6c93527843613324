"""Runs of any kind, from their YAML: what tools need that train with other people's recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from mae_et.config import ConfigError, FinetuneConfig, PretrainConfig, load_config, task_of
from mae_et.data.sources import Source
from mae_et.finetuning import finetune
from mae_et.labelled import LabelledImages
from mae_et.pretraining import pretrain
from mae_et.running import Say

Trainable: TypeAlias = PretrainConfig | FinetuneConfig

SCHEMAS: dict[str, type[PretrainConfig] | type[FinetuneConfig]] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
}


def load_any(path: Path | str, overrides: Sequence[str] = ()) -> Trainable:
    """The configuration of a training, of whatever kind the file is.

    Raises:
        ConfigError: whatever `load_config` refuses, or a file of something that trains nothing.
    """
    task = task_of(path)
    if task not in SCHEMAS:
        raise ConfigError(f"{path} configures a {task} run; a training is one of {', '.join(SCHEMAS)}")
    return load_config(path, overrides, SCHEMAS[task])


def start(
    config: Trainable,
    resume: str = "auto",
    say: Say = print,
    until: float = 1.0,
    images: Source | LabelledImages | None = None,
) -> int:
    """Run, or continue, a training.

    Args:
        config: of the run.
        resume, say, until: see `running.execute`.
        images: in place of those that the configuration names: a source for pretraining, else labelled images.

    Returns:
        Exit code, as of `running.execute`.
    """
    if isinstance(config, PretrainConfig):
        assert not isinstance(images, LabelledImages), "pretraining takes a source"
        return pretrain(config, resume, say, until=until, source=images)
    assert images is None or isinstance(images, LabelledImages), "training on labels takes labelled images"
    return finetune(config, resume, say, until=until, images=images)
