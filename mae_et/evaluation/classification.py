"""Top-1, top-5, per-class results and the confusion matrix of a classifier, counted where the logits are."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mae_et.curriculum.table import text_table


@dataclass(frozen=True)
class ClassScore:
    """What became of the images of one class; accuracies in [0, 1], NaN where there is no image."""

    index: int
    images: int
    top1: float
    top5: float


@dataclass(frozen=True)
class ClassificationResult:
    """Counts of a labelled set.

    Attributes:
        top1, top5: accuracy in [0, 1]; with fewer than 5 classes `top5` is top-K and thus 1.
        images: how many.
        per_class: one entry a class, in order.
        confusion: int64 [K, K], images by (class, predicted class); those without finite logits are in no cell.
        not_finite: images with a logit that is NaN or infinite; they count as wrong.
    """

    top1: float
    top5: float
    images: int
    per_class: list[ClassScore]
    confusion: np.ndarray
    not_finite: int = 0

    @property
    def mean_class_accuracy(self) -> float:
        """Top-1 averaged over the classes that have images, as transfer sets with uneven classes report it."""
        return float(np.nanmean([score.top1 for score in self.per_class]))


class Tally:
    """Counts predictions without making the host wait for the device.

    All counts are one int64 tensor, exact and equal for any order and grouping of the images. Of equal logits the
    lower class id ranks first.

    Args:
        classes: K, the number of logits.
        device: where logits and labels will be.
    """

    def __init__(self, classes: int, device: torch.device | str):
        self.classes = classes
        # Rows: classes, then labels outside of them. Columns: predicted classes, none (not finite), hits of the top 5.
        self._counts = torch.zeros(classes + 1, classes + 2, dtype=torch.int64, device=device)
        self._reduced = False

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits [N, K] of any float type, labels int64 [N] in 0 .. K-1."""
        assert logits.shape[1] == self.classes, f"{logits.shape[1]} logits for {self.classes} classes"
        assert not self._reduced, "counts of all ranks are together already"
        finite = logits.isfinite().all(dim=1)
        # A stable sort and not topk, which takes any of equal logits, and bf16 logits are often equal.
        ranked = logits.argsort(dim=1, descending=True, stable=True)[:, :5]
        hits = (ranked == labels[:, None]).any(dim=1) & finite
        truth = torch.where((labels >= 0) & (labels < self.classes), labels, self.classes)
        predicted = torch.where(finite, ranked[:, 0], self.classes)
        # index_add_ and not bincount, which asks the device for its largest value.
        cell = truth * (self.classes + 2) + predicted
        self._counts.view(-1).index_add_(0, cell, torch.ones_like(cell))
        self._counts[:, -1].index_add_(0, truth, hits.long())

    def reduce(self) -> Tally:
        """Add up the counts of all ranks, once and at the end; every rank then has the same."""
        assert not self._reduced, "counts of all ranks are together already"
        if dist.is_initialized():
            dist.all_reduce(self._counts)
        self._reduced = True
        return self

    def result(self) -> ClassificationResult:
        """What was counted so far; the host waits for the device here.

        Raises:
            ValueError: there were no images, or labels outside 0 .. K-1.
        """
        counts = self._counts.cpu().numpy()
        if outside := int(counts[-1, :-1].sum()):
            raise ValueError(
                f"{outside} labels lie outside 0 .. {self.classes - 1}: the classifier has {self.classes} outputs; "
                "give train and test the same classes"
            )
        per_class_images, confusion, hits = counts[:-1, :-1].sum(axis=1), counts[:-1, :-2], counts[:-1, -1]
        images = int(per_class_images.sum())
        if not images:
            raise ValueError("there is no image to score; is the test split empty?")
        per_class = [
            ClassScore(i, n, int(confusion[i, i]) / n, int(hits[i]) / n) if n else ClassScore(i, 0, math.nan, math.nan)
            for i, n in enumerate(per_class_images.tolist())
        ]
        return ClassificationResult(
            top1=int(np.trace(confusion)) / images,
            top5=int(hits.sum()) / images,
            images=images,
            per_class=per_class,
            confusion=confusion.copy(),
            not_finite=images - int(confusion.sum()),
        )


def write_per_class_csv(path: Path | str, result: ClassificationResult, names: Sequence[str]) -> None:
    """Write one row a class: number, name, images, top-1, top-5, and the class it is most often taken for.

    Accuracies are in [0, 1]; fields are empty where a class has no images or is taken for no other.

    Raises:
        ValueError: there is not one name a class.
    """
    _check_names(result, names)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "name", "images", "top1", "top5", "mistaken_for", "mistaken_images"])
        for score in result.per_class:
            other, count = _mistaken_for(result, score.index)
            accuracies = [f"{score.top1:.6f}", f"{score.top5:.6f}"] if score.images else ["", ""]
            mistaken = [names[other], count] if count else ["", ""]
            writer.writerow([score.index, names[score.index], score.images, *accuracies, *mistaken])


def worst_classes_table(result: ClassificationResult, names: Sequence[str], count: int = 10) -> str:
    """The `count` classes of lowest top-1 as text, the worst first; of equal ones that with more images.

    Raises:
        ValueError: there is not one name a class.
    """
    _check_names(result, names)
    scored = sorted((s for s in result.per_class if s.images), key=lambda s: (s.top1, -s.images, s.index))
    rows = []
    for score in scored[:count]:
        other, mistaken = _mistaken_for(result, score.index)
        rows.append(
            [
                shorten(names[score.index]),
                str(score.images),
                f"{100 * score.top1:.1f} %",
                f"{100 * score.top5:.1f} %",
                f"{shorten(names[other])} ({100 * mistaken / score.images:.0f} %)" if mistaken else "-",
            ]
        )
    return text_table(["class", "images", "top-1", "top-5", "most often taken for"], rows)


def _mistaken_for(result: ClassificationResult, index: int) -> tuple[int, int]:
    """The wrong class that most images of a class are put in, and how many are."""
    row = result.confusion[index].copy()
    row[index] = 0
    other = int(row.argmax())
    return other, int(row[other])


def _check_names(result: ClassificationResult, names: Sequence[str]) -> None:
    if len(names) != len(result.per_class):
        raise ValueError(f"{len(names)} names for {len(result.per_class)} classes; pass one name a class, in order")


def shorten(name: str, limit: int = 32) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"
