"""MAE pretraining with HOG targets under the EfficientTrain++ curriculum.

What a training loop of your own needs is here; torch is loaded when something of it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mae_et import _timm as _timm  # before anything imports timm

if TYPE_CHECKING:
    from mae_et.curriculum import Curriculum, LearningRate, Plan, Stage
    from mae_et.models.mae import MaskedAutoencoder
    from mae_et.models.masking import mask_noise
    from mae_et.ops.hog import hog_targets
    from mae_et.ops.lowfreq import low_frequency_crop

__version__ = "0.1.0"

__all__ = [
    "Curriculum",
    "LearningRate",
    "MaskedAutoencoder",
    "Plan",
    "Stage",
    "hog_targets",
    "low_frequency_crop",
    "mask_noise",
]

_HOMES = {
    "Curriculum": "mae_et.curriculum",
    "LearningRate": "mae_et.curriculum",
    "MaskedAutoencoder": "mae_et.models.mae",
    "Plan": "mae_et.curriculum",
    "Stage": "mae_et.curriculum",
    "hog_targets": "mae_et.ops.hog",
    "low_frequency_crop": "mae_et.ops.lowfreq",
    "mask_noise": "mae_et.models.masking",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mae_et' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
