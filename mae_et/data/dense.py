"""Batches of images with objects, and with a class for every pixel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mae_et.data.instances import Instances
from mae_et.data.replacing import BadImage, Readable, Reader
from mae_et.data.requests import SampleRequest

Size = tuple[int, int]


class ObjectImages(Readable, Protocol):
    """Images with objects; see `mae_et.data.detection`."""

    has_masks: bool

    def image(self, i: int) -> Tensor:
        """Return image `i`, uint8 [C, H, W]; raise ImageError if it cannot be used."""
        ...

    def instances(self, i: int, masks: bool = True) -> Instances:
        """Return the objects of image `i`, with masks where they are wanted and there; raise ImageError likewise."""
        ...


class DetectionBatch(NamedTuple):
    """What a worker hands over of images with objects.

    Attributes:
        images: uint8 [N, C, H, W], padded at the right and at the bottom.
        boxes: float32 [K, 4] of the objects of all images, one image after the other, in px of the padded image.
        labels: int64 [K].
        masks: uint8 [K, H, W]; [0, H, W] where nobody asked for any.
        sizes: (height, width) of each image inside its padding; on the host for good, as `counts` is.
        counts: objects of each image.
        seeds, indices, bad: as of `loader.Batch`.
    """

    images: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor
    sizes: tuple[Size, ...]
    counts: tuple[int, ...]
    seeds: Tensor
    indices: Tensor
    bad: tuple[BadImage, ...] = ()

    def to(self, device: torch.device) -> DetectionBatch:
        """The batch on a device; the copies do not wait for each other or for the host."""
        return moved(self, device)

    def targets(self) -> list[dict[str, Tensor]]:
        """Boxes, labels and masks, if there are, by image."""
        boxes, labels = self.boxes.split(self.counts), self.labels.split(self.counts)
        targets = [{"boxes": b, "labels": k} for b, k in zip(boxes, labels)]
        if len(self.masks) == len(self.boxes):
            for target, masks in zip(targets, self.masks.split(self.counts)):
                target["masks"] = masks
        return targets


class SceneBatch(NamedTuple):
    """What a worker hands over of images with a class for every pixel.

    Attributes:
        images: uint8 [N, C, H, W].
        masks: uint8 [N, H, W], class numbers, 255 where there is none.
        seeds, indices, bad: as of `loader.Batch`.
    """

    images: Tensor
    masks: Tensor
    seeds: Tensor
    indices: Tensor
    bad: tuple[BadImage, ...] = ()

    def to(self, device: torch.device) -> SceneBatch:
        """The batch on a device; the copies do not wait for each other or for the host."""
        return moved(self, device)


def moved(batch: Any, device: torch.device) -> Any:
    """A batch whose tensors are copied to a device; `bad` and what else is no tensor stays as it is."""
    fields = (f.to(device, non_blocking=True) if isinstance(f, Tensor) else f for f in batch)
    return type(batch)(*fields)


class DetectionDataset(Dataset[DetectionBatch]):
    """Turns lists of requests into batches of images with objects.

    Args:
        source: images and objects by index.
        transform: (image, objects, request) to (image uint8 [C, *request.size], objects in it, its size inside the
            padding).
        masks: whether to read masks.
        replace: as of `Reader`.
    """

    def __init__(
        self,
        source: ObjectImages,
        transform: Callable[[Tensor, Instances, SampleRequest], tuple[Tensor, Instances, Size]],
        masks: bool = False,
        replace: bool = False,
    ):
        self.source, self.transform, self.masks = source, transform, masks
        self.reader = Reader(source, replace)

    def __getitems__(self, requests: Sequence[SampleRequest]) -> DetectionBatch:
        bad: list[BadImage] = []
        shown = [self.transform(*self.reader.read(request, self._take, bad)[0], request) for request in requests]
        objects = [found for _, found, _ in shown]
        masks = [found.masks for found in objects if found.masks is not None] if self.masks else []
        return DetectionBatch(
            images=torch.stack([image for image, _, _ in shown]),
            boxes=torch.cat([found.boxes for found in objects]),
            labels=torch.cat([found.labels for found in objects]),
            masks=torch.cat(masks) if masks else torch.zeros(0, *requests[0].size, dtype=torch.uint8),
            sizes=tuple(size for _, _, size in shown),
            counts=tuple(len(found) for found in objects),
            **places(requests),
            bad=tuple(bad),
        )

    def _take(self, i: int) -> tuple[Tensor, Instances]:
        return self.source.image(i), self.source.instances(i, self.masks)


class SceneImages(Readable, Protocol):
    """Images with a class for every pixel; see `mae_et.data.segmentation`."""

    def image(self, i: int) -> Tensor:
        """Return image `i`, uint8 [C, H, W]; raise ImageError if it cannot be used."""
        ...

    def mask(self, i: int) -> Tensor:
        """Return its classes, uint8 [H, W], 255 where there is none; raise ImageError likewise."""
        ...


class SceneDataset(Dataset[SceneBatch]):
    """Turns lists of requests into batches of images with a class for every pixel.

    Args:
        source: images and masks by index.
        transform: (image, mask, request) to (image uint8 [C, *request.size], mask uint8 [*request.size]).
        replace: as of `Reader`.
    """

    def __init__(
        self,
        source: SceneImages,
        transform: Callable[[Tensor, Tensor, SampleRequest], tuple[Tensor, Tensor]],
        replace: bool = False,
    ):
        self.source, self.transform = source, transform
        self.reader = Reader(source, replace)

    def __getitems__(self, requests: Sequence[SampleRequest]) -> SceneBatch:
        bad: list[BadImage] = []
        shown = [self.transform(*self.reader.read(request, self._take, bad)[0], request) for request in requests]
        return SceneBatch(
            images=torch.stack([image for image, _ in shown]),
            masks=torch.stack([mask for _, mask in shown]),
            **places(requests),
            bad=tuple(bad),
        )

    def _take(self, i: int) -> tuple[Tensor, Tensor]:
        return self.source.image(i), self.source.mask(i)


def places(requests: Sequence[SampleRequest]) -> dict[str, Tensor]:
    """Seeds and indices of a batch."""
    return {
        "seeds": torch.tensor([request.seed for request in requests]),
        "indices": torch.tensor([request.image for request in requests]),
    }
