"""What a step asks of the network: reconstruction of masked patches, or classification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_et.curriculum.plan import StepPlan
from mae_et.data.loader import Batch
from mae_et.models.masking import mask_noise
from mae_et.ops.filters import low_pass
from mae_et.ops.mixing import draw_mix, mix, smooth_targets

Prepare = Callable[[Tensor, tuple[int, int]], Tensor]
"""(images uint8 [N, C, H, W], B) to the images that the model sees; where the exact low-frequency crop happens."""


def filtered(images: Tensor, now: StepPlan) -> Tensor:
    """The images without what the stage's low-pass filter takes away; untouched where there is none."""
    return images if now.stage.low_pass is None else low_pass(images, now.stage.low_pass)


class Task(Protocol):
    """Turns batches into losses. Stateless: a step depends on its batch and its place in the plan alone."""

    def prepare(self, batch: Any, now: StepPlan, device: torch.device) -> Any:
        """Inputs on the device, made in fp32; nothing here may wait for the device."""
        ...

    def loss(self, network: nn.Module, inputs: Any, now: StepPlan) -> Tensor:
        """Mean loss over the inputs, a float32 scalar on the device; called under autocast."""
        ...


class MaskedImages(NamedTuple):
    """Images as the model sees them, and the noise that masks are drawn from."""

    images: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Reconstruction:
    """Masked autoencoding."""

    downsample: Prepare

    def prepare(self, batch: Batch, now: StepPlan, device: torch.device) -> MaskedImages:
        """Images at B, and one sort key a patch from each sample's seed."""
        batch = batch.to(device)
        noise = mask_noise(batch.seeds, now.stage.visible + now.stage.masked)
        return MaskedImages(filtered(self.downsample(batch.images, now.bandwidth), now), noise)

    def loss(self, network: nn.Module, inputs: MaskedImages, now: StepPlan) -> Tensor:
        """Mean squared error of the predicted patches."""
        return network(inputs.images, inputs.noise, now.stage.visible).loss

    def losses(self, network: nn.Module, inputs: MaskedImages, now: StepPlan) -> Tensor:
        """The same by image, float32 [N]: each has as many predicted patches, so that their mean is `loss`."""
        output = network(inputs.images, inputs.noise, now.stage.visible)
        return (output.prediction - output.target).square().mean(dim=(1, 2))


class MixedImages(NamedTuple):
    """Images in [0, 1], targets [N, classes] that sum to 1, and the seeds int64 [N] of their places in the batch."""

    images: Tensor
    targets: Tensor
    seeds: Tensor


@dataclass(frozen=True)
class Classification:
    """Cross-entropy to mixed and smoothed labels.

    Attributes:
        classes: how many.
        downsample: as of `Reconstruction`.
        seed: of the run; mixing is drawn from it and the step's number.
        mixup, cutmix: alphas; 0 is off.
        probability, switch: of mixing a step at all, and of cutmix where both are on.
        smoothing: of labels.
    """

    classes: int
    downsample: Prepare
    seed: int
    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0
    switch: float = 0.5
    smoothing: float = 0.0

    def prepare(self, batch: Batch, now: StepPlan, device: torch.device) -> MixedImages:
        """Images at B, mixed with their neighbours.

        All is a function of the step and the samples' seeds but for plain dropout, which few networks of timm have
        unless `model.arguments` ask for it: torch's generator draws that for a micro-batch as a whole. It is seeded
        here, so that a resumed run repeats it to the bit; other ranks or another accumulation drop other units.
        """
        # Of the micro-batch's first sample, so that it is another one for every step, rank and micro-batch. It lies
        # on the host still.
        torch.manual_seed(int(batch.seeds[0]))
        batch = batch.to(device)
        images = filtered(self.downsample(batch.images, now.bandwidth), now)
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        if self.mixup or self.cutmix:
            size = (images.shape[2], images.shape[3])
            draw = draw_mix(self.seed, now.step, size, self.mixup, self.cutmix, self.probability, self.switch)
            images, targets = mix(images, batch.labels, self.classes, draw, self.smoothing)
        else:
            targets = smooth_targets(batch.labels, self.classes, self.smoothing)
        return MixedImages(images, targets, batch.seeds)

    def loss(self, network: nn.Module, inputs: MixedImages, now: StepPlan) -> Tensor:
        """Cross-entropy of fp32 logits."""
        return F.cross_entropy(network(inputs.images, inputs.seeds).float(), inputs.targets)

    def losses(self, network: nn.Module, inputs: MixedImages, now: StepPlan) -> Tensor:
        """The same by image, float32 [N]."""
        return F.cross_entropy(network(inputs.images, inputs.seeds).float(), inputs.targets, reduction="none")
