"""What a step asks of the network: objects in images, or a class for every pixel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mae_et.curriculum.plan import StepPlan
from mae_et.data.dense import DetectionBatch, SceneBatch
from mae_et.models.segmentation import segmentation_loss


class Objects(NamedTuple):
    """Images uint8 [N, C, H, W], their sizes inside the padding, their objects, and their seeds int64 [N]."""

    images: Tensor
    sizes: tuple[tuple[int, int], ...]
    targets: list[dict[str, Tensor]]
    seeds: Tensor


@dataclass(frozen=True)
class Detection:
    """The sum of a detector's losses."""

    def prepare(self, batch: DetectionBatch, now: StepPlan, device: torch.device) -> Objects:
        """The batch on the device. Dropout, which few networks of timm have, is seeded as in `Classification`."""
        torch.manual_seed(int(batch.seeds[0]))
        batch = batch.to(device)
        return Objects(batch.images, batch.sizes, batch.targets(), batch.seeds)

    def loss(self, network: nn.Module, inputs: Objects, now: StepPlan) -> Tensor:
        """Of the heads that the detector has, each with weight 1."""
        losses = network(inputs.images, inputs.sizes, inputs.targets, inputs.seeds)
        return torch.stack(list(losses.values())).sum()


class Scenes(NamedTuple):
    """Images uint8 [N, C, H, W], their classes uint8 [N, H, W], and their seeds int64 [N]."""

    images: Tensor
    masks: Tensor
    seeds: Tensor


@dataclass(frozen=True)
class Segmentation:
    """Cross-entropy of every pixel that has a class.

    Attributes:
        auxiliary: weight of the second head's, where there is one.
    """

    auxiliary: float = 0.0

    def prepare(self, batch: SceneBatch, now: StepPlan, device: torch.device) -> Scenes:
        """The batch on the device. Dropout in networks of timm is seeded as in `Classification`."""
        torch.manual_seed(int(batch.seeds[0]))
        batch = batch.to(device)
        return Scenes(batch.images, batch.masks, batch.seeds)

    def loss(self, network: nn.Module, inputs: Scenes, now: StepPlan) -> Tensor:
        """Mean over images, each with the mean of its pixels."""
        return segmentation_loss(network(inputs.images, inputs.seeds), inputs.masks, self.auxiliary)
