"""Configuration: dataclasses with published runs as defaults, a YAML file over them, `a.b=c` overrides over that."""

from mae_et.config.finetune import (
    AugmentConfig,
    ClassifierConfig,
    FinetuneConfig,
    LabelledDataConfig,
    LabelledOptimConfig,
    TestingConfig,
)
from mae_et.config.loading import (
    ConfigError,
    as_dict,
    checked_keys,
    differences,
    dump_config,
    load_config,
    task_of,
    validate,
)
from mae_et.config.pretrain import DataConfig, EvaluationConfig, ModelConfig, OptimConfig, PretrainConfig, TargetConfig
from mae_et.config.probe import GridConfig, NeighboursConfig, ProbeConfig
from mae_et.config.sections import CurriculumConfig, EngineConfig, RunConfig, SavingConfig, StageConfig, TrackingConfig

__all__ = [
    "AugmentConfig",
    "ClassifierConfig",
    "ConfigError",
    "CurriculumConfig",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "FinetuneConfig",
    "GridConfig",
    "LabelledDataConfig",
    "LabelledOptimConfig",
    "ModelConfig",
    "NeighboursConfig",
    "OptimConfig",
    "PretrainConfig",
    "ProbeConfig",
    "RunConfig",
    "SavingConfig",
    "StageConfig",
    "TargetConfig",
    "TestingConfig",
    "TrackingConfig",
    "as_dict",
    "checked_keys",
    "differences",
    "dump_config",
    "load_config",
    "task_of",
    "validate",
]
