"""What all runs on annotated images say of their images and of their network."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mae_et.config.sections import Choices, Ranges


@dataclass
class ImageDataConfig:
    """Annotated images: which of them train, choose and test, and how large the network sees them."""

    source: str = ""
    root: str | None = None  # folder or list file; null takes the source's usual place
    train_split: str = "train"
    val_split: str | None = None  # null: "val" where the source has "test" besides, else `holdout` of train
    test_split: str | None = None  # null: "test", or "val" where there is no "test"
    holdout: float = 0.1  # share of train that chooses settings, where no split does; 0 keeps all to train
    subset_seed: int = 0  # of every choice among images, whatever the run's own seed
    images: int | None = None  # number of training images, for `plan` without the data; null counts them
    classes: int | None = None  # likewise
    size: Any = None  # final B in px, a number or [height, width]; null is the checkpoint's, or 224
    channels: int | None = None  # null is the checkpoint's, or 3
    mean: list[float] | None = None  # per channel, of pixels in [0, 1]; null is the checkpoint's, or ImageNet's
    std: list[float] | None = None
    flip: bool = True
    max_pixels: int = 100_000_000  # larger images are refused from their header
    max_bad: float = 0.01  # share of the images that may be unreadable; they are replaced, and listed in the run folder
    workers: int | None = None  # processes per rank; null chooses by device and cores
    timeout_minutes: float = 15.0  # that a worker may take for a batch before the run stops

    RANGES: ClassVar[Ranges] = {
        "holdout": (0, 0.999999, True),
        "subset_seed": (0, 2**63 - 1, True),
        "images": (1, math.inf, True),
        "classes": (1, math.inf, True),
        "channels": (1, 3, True),
        "workers": (0, math.inf, True),
        "max_pixels": (1, math.inf, True),
        "max_bad": (0, 1, True),
        "timeout_minutes": (0, math.inf, False),
    }


@dataclass
class NetworkConfig:
    """A network: the checkpoint's own, one of timm's, or one of our sizes."""

    name: str | None = None  # null: the checkpoint's; timm/<any>; vit_tiny, vit_small, vit_base, vit_large, vit_huge
    patch_size: int = 16  # of vit_*, as the four numbers below
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float = 4.0
    arguments: dict[str, Any] = field(default_factory=dict)  # for timm's constructor, e.g. {depths: [2, 2, 4, 2]}
    locality: bool = False  # of plain ViTs from scratch: a 3x3 convolution in each feed-forward layer (LocalViT)
    drop_path: float = 0.1

    CHOICES: ClassVar[Choices] = {}
    RANGES: ClassVar[Ranges] = {
        "patch_size": (1, math.inf, True),
        "width": (4, math.inf, True),
        "depth": (1, math.inf, True),
        "heads": (1, math.inf, True),
        "mlp_ratio": (0, math.inf, False),
        "drop_path": (0, 0.999999, True),
    }
    FREE_FORM: ClassVar[tuple[str, ...]] = ("arguments",)
