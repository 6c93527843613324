"""Pictures of what the model sees and answers, at the end of every stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mae_et.curriculum.plan import Plan, PlannedStage
from mae_et.curriculum.stage import format_size
from mae_et.data.decode import ImageError
from mae_et.data.randomness import sample_seed
from mae_et.data.replacing import TRIES
from mae_et.data.requests import SampleRequest
from mae_et.data.sources import Source
from mae_et.data.transforms import CropTransform
from mae_et.engine.bad_images import printable
from mae_et.engine.loop import Observation
from mae_et.engine.precision import Precision
from mae_et.engine.tasks import Prepare
from mae_et.models.mae import MAEOutput, MaskedAutoencoder
from mae_et.models.masking import mask_noise
from mae_et.ops.patches import patchify, unpatchify
from mae_et.tracking.panels import HogSample, PixelSample, hog_cells, pixel_panel, stage_panel
from mae_et.tracking.tracker import warn


class PictureObserver:
    """Draws the same images at the end of each stage, as that stage sees them; of unreadable ones, the next.

    Args:
        model, precision: in training.
        source, transform, prepare: the run's own data path, so that a picture shows what the model gets.
        folder: where pictures go, as `stage-<n>-B<size>.png`.
        samples: how many images.
        seed: of the run.
    """

    def __init__(
        self,
        model: MaskedAutoencoder,
        precision: Precision,
        source: Source,
        transform: CropTransform,
        prepare: Prepare,
        folder: Path,
        samples: int,
        seed: int,
    ):
        self.model, self.precision, self.source = model, precision, source
        self.transform, self.prepare, self.folder, self.seed = transform, prepare, folder, seed
        self.indices = [int(index) for index in np.linspace(0, len(source) - 1, min(samples, len(source)))]

    def due(self, plan: Plan, done: int) -> bool:
        """At the end of every stage."""
        return done in plan.boundaries or done == plan.total_steps

    def observe(self, plan: Plan, done: int) -> Observation:
        """Draw the stage that has just ended."""
        stage = plan.at(done - 1).stage
        path = self.folder / f"stage-{stage.index + 1}-B{format_size(stage.bandwidth)}.png"
        samples = [sample for index in self.indices if (sample := self.readable(index)) is not None]
        if not samples:
            warn(f"{path} is left out: none of the images that it would show can be read")
            return Observation()
        self.draw(stage, path, samples)
        return Observation(pictures={f"pictures/{path.stem}": path})

    def readable(self, index: int) -> tuple[int, Tensor] | None:
        """An image by its index, uint8 [C, H, W], or the next one that can be read; None where several cannot."""
        for candidate in range(index, index + TRIES):
            candidate %= len(self.source)
            try:
                return candidate, self.source.image(candidate)
            except (ImageError, OSError):  # training meets it as well, counts it, and knows what to do
                continue
        return None

    @torch.no_grad()
    def draw(self, stage: PlannedStage, path: Path, samples: list[tuple[int, Tensor]]) -> None:
        """Write the panel of one stage, of images by their indices."""
        model, device = self.model, self.model.mean.device
        # The same seeds at every stage: the same crops, at another bandwidth.
        requests = [SampleRequest(index, stage.bandwidth, 0.0, sample_seed(self.seed, index)) for index, _ in samples]
        views = [self.transform(image, request) for request, (_, image) in zip(requests, samples)]
        images = self.prepare(torch.stack(views).to(device), stage.bandwidth)
        seeds = torch.tensor([request.seed for request in requests], device=device)
        with self.precision.autocast():
            noise = mask_noise(seeds, stage.visible + stage.masked)
            output = model(images, noise, stage.visible, predict_all=True)
        names = [printable(self.source.describe(index)) for index, _ in samples]
        title = f"{stage.name}, {stage.visible} of {stage.visible + stage.masked} patches visible"
        if model.target == "hog":
            stage_panel(path, hog_samples(model, images, output, stage.grid, names), title)
        else:
            pixel_panel(path, pixel_samples(model, images, output, stage.grid, names), title)


def shown(images: Tensor) -> np.ndarray:
    """uint8 [N, H, W, 1 or 3] of uint8 or [0, 1] images; of other numbers of channels the first is shown."""
    if images.dtype != torch.uint8:
        images = (images * 255).round().clamp(0, 255).to(torch.uint8)
    if images.shape[1] not in (1, 3):
        images = images[:, :1]
    return images.permute(0, 2, 3, 1).cpu().numpy()


def in_place(values: Tensor, ids: Tensor, tokens: int) -> Tensor:
    """Values [N, P, D] of patches at ids [N, P], put where they belong among [N, tokens, D]; the rest is 0."""
    whole = values.new_zeros(len(values), tokens, values.shape[2])
    return whole.scatter_(1, ids[:, :, None].expand_as(values), values)


def masks(output: MAEOutput, grid: tuple[int, int]) -> np.ndarray:
    """bool [N, rows, columns], True where a patch is masked."""
    mask = torch.zeros(len(output.masked_ids), grid[0] * grid[1], dtype=torch.bool, device=output.masked_ids.device)
    return mask.scatter_(1, output.masked_ids, True).view(-1, *grid).cpu().numpy()


def hog_samples(
    model: MaskedAutoencoder, images: Tensor, output: MAEOutput, grid: tuple[int, int], names: list[str]
) -> list[HogSample]:
    """What a HOG panel shows, one sample an image."""
    tokens = grid[0] * grid[1]
    target = model.targets(images).cpu().numpy()
    prediction = in_place(output.prediction, output.predicted_ids, tokens).cpu().numpy()
    mask, pixels = masks(output, grid), shown(images)

    def cells(values: np.ndarray) -> np.ndarray:
        return hog_cells(values, grid, model.channels, model.bins)

    return [HogSample(pixels[i], mask[i], cells(target[i]), cells(prediction[i]), name) for i, name in enumerate(names)]


def pixel_samples(
    model: MaskedAutoencoder, images: Tensor, output: MAEOutput, grid: tuple[int, int], names: list[str]
) -> list[PixelSample]:
    """What a pixel panel shows; normalised patches get the mean and deviation of the true ones back."""
    patches = in_place(output.prediction, output.predicted_ids, grid[0] * grid[1])
    normalised = model.normalise(images)
    if model.target == "norm_pixel":
        truth = patchify(normalised, model.patch_size)
        spread = (truth.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        patches = patches * spread + truth.mean(dim=-1, keepdim=True)
    pixels = unpatchify(patches, grid, model.patch_size, model.channels) * model.std + model.mean
    reconstruction, mask, inputs = shown(pixels), masks(output, grid), shown(images)
    return [PixelSample(inputs[i], mask[i], reconstruction[i], name) for i, name in enumerate(names)]
