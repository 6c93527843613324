"""A detector looked at on annotated images, shared out over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mae_et.curriculum.plan import Plan
from mae_et.data.decode import ImageError
from mae_et.data.detection import DetectionSource
from mae_et.data.detection_transforms import FitTransform, paste_masks, unfit_boxes
from mae_et.data.instances import Instances
from mae_et.data.loader import batches_of, build_loader
from mae_et.data.replacing import BadImage
from mae_et.data.requests import SampleRequest
from mae_et.engine.distributed import Ranks, share_statistics
from mae_et.engine.loop import Observation
from mae_et.engine.precision import Precision
from mae_et.engine.state import TrainState
from mae_et.evaluation.detection import DetectionResult, DetectionTally
from mae_et.evaluation.features import InOrder
from mae_et.models.detection import Detector
from mae_et.tracking.dense_panels import DetectionSample, DrawnObjects, detection_panel

Size = tuple[int, int]


@dataclass(frozen=True)
class DetectionExamination:
    """How images are shown to a detector.

    Attributes:
        size: (height, width) in px that images are fitted into.
        masks: whether masks are looked for and scored.
        batch: images at a time on each rank.
        workers: of the loader.
        shown: least score of what is drawn.
        drawn: images on a picture.
    """

    size: Size
    masks: bool
    batch: int = 4
    workers: int = 0
    shown: float = 0.5
    drawn: int = 4


class FittedImages(NamedTuple):
    """Images uint8 [N, C, *size], their sizes inside the padding, their own sizes, their numbers; those left out."""

    images: Tensor
    inner: tuple[Size, ...]
    original: tuple[Size, ...]
    indices: tuple[int, ...]
    bad: tuple[BadImage, ...] = ()


class Photos(Protocol):
    """A numbered set of images, annotated or not."""

    name: str
    channels: int

    def __len__(self) -> int: ...

    def image(self, i: int) -> Tensor:
        """Return image `i`, uint8 [channels, H, W]; raise ImageError if it cannot be used."""
        ...

    def describe(self, i: int) -> str:
        """Return what tells a reader which image this is, such as its path."""
        ...


class FittedDataset:
    """Turns requests into images that fit into the requested size.

    Args:
        source: what is read.
        leave_out: go on without images that cannot be read, and name them; otherwise ImageError is raised.
    """

    def __init__(self, source: Photos, leave_out: bool = False):
        self.source, self.leave_out, self.fit = source, leave_out, FitTransform()

    def __getitems__(self, requests: Sequence[SampleRequest]) -> FittedImages:
        fitted, original, indices, bad = [], [], [], []
        for request in requests:
            try:
                image = self.source.image(request.image)
            except ImageError as error:
                if not self.leave_out:
                    raise
                bad.append(BadImage(request.image, str(error)))
                continue
            fitted.append(self.fit(image, request.size))
            original.append((image.shape[1], image.shape[2]))
            indices.append(request.image)
        nothing = torch.empty(0, self.source.channels, *requests[0].size, dtype=torch.uint8)
        return FittedImages(
            images=torch.stack([image for image, _ in fitted]) if fitted else nothing,
            inner=tuple(inner for _, inner in fitted),
            original=tuple(original),
            indices=tuple(indices),
            bad=tuple(bad),
        )


class Found(NamedTuple):
    """What was found on an image, in px of the original.

    Boxes [K, 4], scores [K] and labels [K], the best first, and masks uint8 [K, H, W] where there are.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None


def find_objects(
    state: TrainState, source: DetectionSource, indices: list[int], how: DetectionExamination
) -> Iterator[tuple[int, Found]]:
    """What the state's evaluated detector finds on some images, one after the other.

    The detector is left in evaluation mode.
    """
    model = state.evaluated.eval()
    assert isinstance(model, Detector)
    pinned = state.device.type == "cuda"
    loader = build_loader(FittedDataset(source), InOrder(indices, how.size, how.batch), how.workers, pinned)
    with batches_of(loader) as batches:
        for batch in batches:
            yield from find_in_batch(model, batch, how.masks, state.device, state.precision)


def find_in_batch(
    model: Detector, batch: FittedImages, masks: bool, device: torch.device, precision: Precision
) -> Iterator[tuple[int, Found]]:
    """What a detector finds on each image of a batch, by the image's number.

    Args:
        model: in evaluation mode.
        batch: on the host.
        masks: whether the detector's masks are wanted.
        device: of the model.
        precision: of the forward pass.
    """
    assert not model.training, "the model is in training mode"
    if not batch.indices:
        return
    with torch.no_grad(), precision.autocast():
        predictions = model(batch.images.to(device, non_blocking=True), batch.inner)
    for index, found, inner, original in zip(batch.indices, predictions, batch.inner, batch.original):
        boxes = unfit_boxes(found["boxes"].float().cpu(), inner, original)
        pasted = paste_masks(found["masks"].float().cpu(), boxes, original) if masks else None
        yield index, Found(boxes, found["scores"].float().cpu(), found["labels"].cpu(), pasted)


def examine_detector(
    state: TrainState, source: DetectionSource, how: DetectionExamination, ranks: Ranks
) -> DetectionTally:
    """What is found on all of a source, beside the truth; every rank takes a share of the images and gets all.

    Raises:
        ImageError: an image, or its annotations, cannot be read.
    """
    share_statistics(state.evaluated, ranks)
    tally = DetectionTally(len(source.classes), how.masks)
    for index, found in find_objects(state, source, list(range(ranks.rank, len(source), ranks.count)), how):
        truth = source.instances(index, how.masks)
        tally.add(index, found.boxes, found.scores, found.labels, truth, found.masks)
    return tally.gather()


def draw_detections(
    path: Path, state: TrainState, source: DetectionSource, how: DetectionExamination, title: str
) -> None:
    """Draw what is there and what is found, on images spread over a source."""
    count = min(how.drawn, len(source))
    indices = [k * len(source) // count for k in range(count)]
    samples = []
    for index, found in find_objects(state, source, indices, how):
        sure = found.scores >= how.shown
        drawn = DrawnObjects(
            boxes=found.boxes[sure].numpy(),
            labels=found.labels[sure].numpy(),
            scores=found.scores[sure].numpy(),
            masks=None if found.masks is None else found.masks[sure].numpy(),
        )
        image = source.image(index).permute(1, 2, 0).numpy()
        truth = _drawn(source.instances(index, how.masks))
        samples.append(DetectionSample(image, truth, drawn, Path(source.describe(index)).name))
    detection_panel(path, samples, source.classes, title)


def _drawn(truth: Instances) -> DrawnObjects:
    masks = None if truth.masks is None else truth.masks.numpy()
    return DrawnObjects(truth.boxes.numpy(), truth.labels.numpy(), None, masks)


class DetectionObserver:
    """AP on held-out images whenever another `every` of the compute is spent, and a picture of some of them.

    Not at the very end, where the whole examination comes.
    """

    def __init__(
        self,
        state: TrainState,
        source: DetectionSource,
        how: DetectionExamination,
        ranks: Ranks,
        every: float | None,
        pictures: Path | None,
    ):
        self.state, self.source, self.how, self.ranks = state, source, how, ranks
        self.every, self.pictures = every, pictures

    def due(self, plan: Plan, done: int) -> bool:
        """Whether a multiple of `every` lies within the last step."""
        return plan.passes(self.every, done)

    def observe(self, plan: Plan, done: int) -> Observation:
        """Look; the main rank draws."""
        result = examine_detector(self.state, self.source, self.how, self.ranks).result()
        pictures: dict[str, Path] = {}
        if self.pictures is not None and self.ranks.is_main:
            pictures["val/detections"] = self.pictures / f"detections-{done:08d}.png"
            draw_detections(pictures["val/detections"], self.state, self.source, self.how, f"step {done:,}")
        return Observation(metrics=metrics("val", result), pictures=pictures)


def metrics(name: str, result: DetectionResult) -> dict[str, float]:
    """COCO's numbers for the trackers, by the name of a split."""
    return result.metrics(f"{name}/")
