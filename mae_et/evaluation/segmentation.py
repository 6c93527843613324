"""Classes of whole scenes from a segmenter, and how well they agree with the truth."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mae_et.curriculum.stage import format_size
from mae_et.curriculum.table import text_table
from mae_et.data.segmentation_transforms import IGNORE, pad_to_multiple, resize_short_side
from mae_et.engine.precision import Precision
from mae_et.evaluation.classification import shorten
from mae_et.models.segmentation import Segmenter

Size = tuple[int, int]


@dataclass(frozen=True)
class SegmentationResult:
    """Agreement of predictions with the truth over all labelled pixels of a set.

    IoU of a class is TP / (TP + FP + FN) of one confusion matrix of all images together. A class that is neither in
    the truth nor predicted has none and is left out of the mean; one that is predicted and never true has 0. Accuracy
    of a class is TP / (TP + FN); classes that are not in the truth have none.

    Attributes:
        miou: mean of `iou`, in [0, 1].
        mean_accuracy: mean of `accuracy`, in [0, 1].
        pixel_accuracy: share of the labelled pixels that are right.
        iou, accuracy: by class, in [0, 1]; None where there is none.
        pixels: labelled ones.
        confusion: int64 [C, C], pixels by (class, predicted class).
    """

    miou: float
    mean_accuracy: float
    pixel_accuracy: float
    iou: tuple[float | None, ...]
    accuracy: tuple[float | None, ...]
    pixels: int
    confusion: np.ndarray


class ConfusionTally:
    """Counts pixels by class and predicted class, exactly, in any order and grouping of images.

    Args:
        classes: C, at most 255.
        device: where predictions and masks will be.
    """

    def __init__(self, classes: int, device: torch.device | str):
        self.classes = classes
        self._counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        self._reduced = False

    @torch.no_grad()
    def add(self, predictions: Tensor, masks: Tensor) -> None:
        """Count pixels: predicted classes and true ones, both uint8 of one shape; where the truth is 255, none."""
        assert predictions.shape == masks.shape, f"{list(predictions.shape)} px predicted of {list(masks.shape)}"
        assert not self._reduced, "counts of all ranks are together already"
        # Ignored pixels go to a row of their own.
        truth = torch.where(masks == IGNORE, self.classes, masks.long())
        cells = (truth * self.classes + predictions).flatten()
        counts = torch.bincount(cells, minlength=self.classes * (self.classes + 1))
        assert len(counts) == self.classes * (self.classes + 1), f"classes beyond the {self.classes} that are counted"
        self._counts += counts.view(-1, self.classes)[:-1]

    def reduce(self) -> ConfusionTally:
        """Add up the counts of all ranks, once and at the end; every rank then has the same."""
        assert not self._reduced, "counts of all ranks are together already"
        if dist.is_initialized():
            dist.all_reduce(self._counts)
        self._reduced = True
        return self

    def result(self) -> SegmentationResult:
        """What was counted so far.

        Raises:
            ValueError: no pixel had a label.
        """
        confusion = self._counts.cpu().numpy()
        pixels = int(confusion.sum())
        if not pixels:
            raise ValueError("no pixel has a label: there is nothing to score; look at the masks and at data.ignore")
        hits, true, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
        iou, accuracy = _shares(hits, true + predicted - hits), _shares(hits, true)
        return SegmentationResult(
            miou=_mean(iou),
            mean_accuracy=_mean(accuracy),
            pixel_accuracy=int(hits.sum()) / pixels,
            iou=iou,
            accuracy=accuracy,
            pixels=pixels,
            confusion=confusion.copy(),
        )


def _shares(parts: np.ndarray, wholes: np.ndarray) -> tuple[float | None, ...]:
    return tuple(part / whole if whole else None for part, whole in zip(parts.tolist(), wholes.tolist()))


def _mean(values: Sequence[float | None]) -> float:
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there)


@dataclass(frozen=True)
class SceneExamination:
    """How scenes are shown to a segmenter.

    Attributes:
        short: px of the image's short side, the ratio kept.
        longest: px that the long side may have at most, before `scales`; the short side is then less. None for any.
        window: (height, width) in px of a window that slides over images larger than it; None shows them whole.
        stride: (rows, columns) in px by which it slides; None takes two thirds of the window.
        scales: factors of `short` and `longest`; probabilities of all are averaged.
        flip: also show each mirrored.

    Raises:
        ValueError: a number is out of range, or the window would leave gaps.
    """

    short: int
    longest: int | None = None
    window: Size | None = None
    stride: Size | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        if self.short < 1 or not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"short={self.short}, scales={self.scales}: choose a side of 1 px or more, scales above 0")
        if self.longest is not None and self.longest < self.short:
            raise ValueError(f"longest={self.longest} is less than short={self.short}: choose as much or more")
        if self.stride is not None:
            if self.window is None:
                raise ValueError(f"stride={self.stride} is of a sliding window: give the window as well")
            if not all(1 <= step <= side for step, side in zip(self.stride, self.window)):
                raise ValueError(f"stride={self.stride}: choose 1 px or more, and at most the window, {self.window}")

    def steps(self) -> Size | None:
        """(rows, columns) in px by which the window slides; None without window."""
        if self.window is None or self.stride is not None:
            return self.stride
        return max(1, self.window[0] * 2 // 3), max(1, self.window[1] * 2 // 3)


@torch.no_grad()
def predict_scene(
    model: Segmenter,
    image: Tensor,
    how: SceneExamination,
    device: torch.device | str,
    precision: Precision | None = None,
) -> Tensor:
    """The class of every pixel of an image, at its own size.

    Logits are enlarged to that size before the largest is taken; of several scales, and mirrored, it is the
    probabilities that are averaged (as mmsegmentation tests).

    Args:
        model: in evaluation mode.
        image: uint8 [C, H, W].
        how: sizes, window, scales.
        device: of the model.
        precision: of the forward pass; None for the model's own.

    Returns:
        uint8 [H, W], on the device.

    Raises:
        ValueError: the window is no multiple of the trunk's grain.
    """
    assert not model.training, "the model is in training mode"
    own, total = (image.shape[1], image.shape[2]), None
    for scale in how.scales:
        longest = None if how.longest is None else max(1, round(how.longest * scale))
        resized = resize_short_side(image, max(1, round(how.short * scale)), longest=longest)[None].to(device)
        for mirrored in (False, True) if how.flip else (False,):
            with precision.autocast() if precision else nullcontext():
                logits = _logits(model, resized.flip(3) if mirrored else resized, how)
            logits = _resize(logits.flip(3) if mirrored else logits, own)
            if len(how.scales) == 1 and not how.flip:
                return logits[0].argmax(0).byte()
            # In place: those of 150 classes on a large photo are gigabytes.
            total = logits.softmax(1) if total is None else total.add_(logits.softmax(1))
    assert total is not None
    return total[0].argmax(0).byte()


def _logits(model: Segmenter, image: Tensor, how: SceneExamination) -> Tensor:
    """float32 [1, classes, h, w] of uint8 [1, C, h, w]: from the whole, or averaged over windows that overlap."""
    height, width = image.shape[2:]
    padded = pad_to_multiple(image, model.trunk.grain)
    steps = how.steps()
    if how.window is None or steps is None:
        return model(padded)[:, :, :height, :width].float()
    if any(side % model.trunk.grain for side in how.window):
        size = format_size(how.window)
        raise ValueError(f"a window of {size} px does not fit the model: choose multiples of {model.trunk.grain} px")
    rows, columns = min(how.window[0], padded.shape[2]), min(how.window[1], padded.shape[3])
    total, times = None, torch.zeros(padded.shape[2:], device=padded.device)
    for top in _starts(padded.shape[2], rows, steps[0]):
        for left in _starts(padded.shape[3], columns, steps[1]):
            place = (slice(top, top + rows), slice(left, left + columns))
            logits = model(padded[:, :, place[0], place[1]]).float()
            if total is None:
                total = logits.new_zeros(1, logits.shape[1], *padded.shape[2:])
            total[:, :, place[0], place[1]] += logits
            times[place] += 1
    assert total is not None
    return (total / times)[:, :, :height, :width]


def _starts(extent: int, window: int, step: int) -> list[int]:
    """Where windows begin: every `step` px, the last one moved back to end with the image."""
    return [min(start, extent - window) for start in range(0, extent - window + step, step)]


def _resize(logits: Tensor, size: Size) -> Tensor:
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def write_iou_csv(path: Path | str, result: SegmentationResult, names: Sequence[str]) -> None:
    """Write one row a class: number, name, pixels, IoU, accuracy, and the class that most of its pixels are taken for.

    IoU and accuracy are in [0, 1] and empty where a class has none (see `SegmentationResult`).

    Raises:
        ValueError: there is not one name a class.
    """
    _check_names(result, names)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "name", "pixels", "iou", "accuracy", "mistaken_for", "mistaken_pixels"])
        for index, name in enumerate(names):
            other, count = _mistaken_for(result, index)
            shares = ["" if share is None else f"{share:.6f}" for share in (result.iou[index], result.accuracy[index])]
            mistaken = [names[other], count] if count else ["", ""]
            writer.writerow([index, name, int(result.confusion[index].sum()), *shares, *mistaken])


def worst_iou_table(result: SegmentationResult, names: Sequence[str], count: int = 10) -> str:
    """The `count` classes of lowest IoU as text, the worst first; of equal ones that with more pixels.

    Raises:
        ValueError: there is not one name a class.
    """
    _check_names(result, names)
    pixels = result.confusion.sum(axis=1).tolist()
    scored = [(share, -pixels[index], index) for index, share in enumerate(result.iou) if share is not None]
    rows = []
    for share, _, index in sorted(scored)[:count]:
        other, mistaken = _mistaken_for(result, index)
        accuracy = result.accuracy[index]
        rows.append(
            [
                shorten(names[index]),
                f"{100 * pixels[index] / result.pixels:.2f} %",
                f"{100 * share:.1f} %",
                "-" if accuracy is None else f"{100 * accuracy:.1f} %",
                f"{shorten(names[other])} ({100 * mistaken / pixels[index]:.0f} %)" if mistaken else "-",
            ]
        )
    return text_table(["class", "of all pixels", "IoU", "accuracy", "most often taken for"], rows)


def _mistaken_for(result: SegmentationResult, index: int) -> tuple[int, int]:
    """The wrong class that most pixels of a class are put in, and how many are."""
    row = result.confusion[index].copy()
    row[index] = 0
    other = int(row.argmax())
    return other, int(row[other])


def _check_names(result: SegmentationResult, names: Sequence[str]) -> None:
    if len(names) != len(result.iou):
        raise ValueError(f"{len(names)} names for {len(result.iou)} classes; pass one name a class, in order")
