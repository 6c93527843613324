"""Average precision of boxes and masks by COCO's rules (cocodataset.org/#detection-eval), through torchmetrics.

A prediction of the right class is a hit if its IoU with an object that has no better prediction reaches a threshold;
AP is the mean precision over 101 recalls and the thresholds 0.50, 0.55, ..., 0.95, of each class, averaged over the
classes. At most 100 predictions a class and image count. What is found in a crowd counts neither for nor against.

Where there is no object to find there is nothing to measure: a class without any (crowds are none) has no AP, and is
left out of every mean, although what is predicted of it is wrong; a size without any has none either. Such values are
None here and -1 in COCO's own tools.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mae_et.curriculum.table import text_table
from mae_et.data.instances import Instances
from mae_et.data.outlines import mask_tools
from mae_et.engine.distributed import gather_objects
from mae_et.evaluation.classification import shorten

_THRESHOLDS = np.linspace(0.5, 0.95, 10).tolist()
_RECALLS = np.linspace(0, 1, 101).tolist()


@dataclass(frozen=True)
class ClassPrecision:
    """AP of one class.

    Attributes:
        index: the class number.
        objects: how many there are to find, crowds not counted.
        ap, ap50, ap75: in [0, 1]; None where there is no object.
    """

    index: int
    objects: int
    ap: float | None
    ap50: float | None
    ap75: float | None


@dataclass(frozen=True)
class PrecisionSummary:
    """COCO's numbers of the boxes, or of the masks; each in [0, 1], None where there is no object to find.

    Attributes:
        ap: over the IoU thresholds 0.50, 0.55, ..., 0.95.
        ap50, ap75: at one threshold.
        small, medium, large: AP of the objects of an area up to 32², 96² and above, in px as the set states them.
        ar100: the largest recall with 100 predictions an image, over the thresholds.
        per_class: one entry a class, in order.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    small: float | None
    medium: float | None
    large: float | None
    ar100: float | None
    per_class: tuple[ClassPrecision, ...]


@dataclass(frozen=True)
class DetectionResult:
    """What was found in a set of images.

    Attributes:
        boxes: by the IoU of boxes.
        masks: by the IoU of masks; None where there were none.
        images: how many.
        objects: to find; crowds are not counted.
        predictions: how many there were.
        not_finite: predictions with a coordinate or score that is NaN or infinite; they are left out.
    """

    boxes: PrecisionSummary
    masks: PrecisionSummary | None
    images: int
    objects: int
    predictions: int
    not_finite: int = 0

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """The numbers by name, for a tracker: "ap", "ap50", ..., of masks "mask_ap", ...; those that are None left out.

        Args:
            prefix: put before every name, such as "val/".
        """
        named: dict[str, float] = {}
        for start, summary in (("", self.boxes), ("mask_", self.masks)):
            for field in fields(PrecisionSummary):
                value = None if summary is None else getattr(summary, field.name)
                if isinstance(value, float):
                    named[f"{prefix}{start}{field.name}"] = value
        return named


class _Image(NamedTuple):
    """What is kept of an image: boxes are float64 [K, 4], masks COCO's run lengths or None."""

    size: tuple[int, int]  # (height, width), (0, 0) without masks
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: list[bytes] | None
    true_boxes: np.ndarray
    true_labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    true_masks: list[bytes] | None
    not_finite: int


def check_installed() -> None:
    """Raise ValueError where torchmetrics or faster-coco-eval is not installed; importing them would take seconds."""
    lacking = [name for name in ("torchmetrics", "faster_coco_eval") if find_spec(name) is None]
    if lacking:
        raise ValueError(f"AP needs optional packages ({', '.join(lacking)}): pip install 'mae_et[dense]'")


class DetectionTally:
    """Collects predictions beside the truth; masks as run lengths, a few hundred bytes each.

    Args:
        classes: how many there are.
        masks: whether masks are scored as well as boxes.

    Raises:
        ValueError: torchmetrics or faster-coco-eval is not installed.
    """

    def __init__(self, classes: int, masks: bool = False) -> None:
        self.classes = classes
        self.masks = masks
        self._images: dict[int, _Image] = {}
        check_installed()

    def __len__(self) -> int:
        return len(self._images)

    def add(
        self,
        image: int,
        boxes: Tensor,
        scores: Tensor,
        labels: Tensor,
        truth: Instances,
        masks: Tensor | None = None,
    ) -> None:
        """Take what was predicted for an image; of one that was taken before, nothing changes.

        Args:
            image: its number in the set. Ranks that share a set unevenly see an image twice, and it counts once.
            boxes: float [K, 4], (left, top, right, bottom) in px of the original image.
            scores: float [K]; the higher, the surer.
            labels: int64 [K], class numbers from 0.
            truth: of the same image; with masks if the tally is of masks.
            masks: uint8 or bool [K, H, W] at the original size.
        """
        if image in self._images:
            return
        assert not len(labels) or int(labels.max()) < self.classes, f"class {labels.max()} of {self.classes}"
        finite = boxes.isfinite().all(dim=1).cpu() & scores.isfinite().cpu()
        size, found, true = (0, 0), None, None
        if self.masks:
            assert masks is not None, f"no masks were predicted for image {image}"
            assert truth.masks is not None, f"image {image} has no masks"
            assert masks.shape[1:] == truth.masks.shape[1:], f"{masks.shape} against {truth.masks.shape}"
            size = (int(masks.shape[1]), int(masks.shape[2]))
            masks = masks.cpu()
            found, true = _runs(masks if finite.all() else masks[finite]), _runs(truth.masks)
        self._images[image] = _Image(
            size=size,
            boxes=_array(boxes.detach().cpu()[finite]),
            scores=_array(scores.detach().cpu()[finite]),
            labels=labels.cpu()[finite].numpy(),
            masks=found,
            true_boxes=_array(truth.boxes),
            true_labels=truth.labels.numpy(),
            areas=_array(truth.areas),
            crowd=truth.crowd.numpy(),
            true_masks=true,
            not_finite=int((~finite).sum()),
        )

    def gather(self) -> DetectionTally:
        """Bring the images of all ranks together, at the end; every rank then has the same."""
        for images in gather_objects(self._images):
            self._images.update(images)
        return self

    def result(self) -> DetectionResult:
        """Compute AP of what was taken so far.

        Raises:
            ValueError: there were no images.
        """
        if not self._images:
            raise ValueError("there is no image to score; is the test split empty?")
        # By number, so that equal scores are ranked alike for any number of ranks.
        images = [self._images[number] for number in sorted(self._images)]
        true_labels = np.concatenate([image.true_labels[~image.crowd] for image in images])
        objects = np.bincount(true_labels, minlength=self.classes)
        measured = _measure(images, self.masks) if objects.any() else {}
        return DetectionResult(
            boxes=_summary(measured, "bbox_" if self.masks else "", objects),
            masks=_summary(measured, "segm_", objects) if self.masks else None,
            images=len(images),
            objects=int(objects.sum()),
            predictions=sum(len(image.scores) for image in images),
            not_finite=sum(image.not_finite for image in images),
        )

    def coco_results(
        self, image_ids: Sequence[int] | np.ndarray, category_ids: Sequence[int] | np.ndarray, masks: bool = False
    ) -> list[dict[str, Any]]:
        """The predictions in COCO's format of results, the surest of each image first.

        Args:
            image_ids: the set's own number of each image.
            category_ids: and of each class; predictions of a class that has -1 are left out.
            masks: give masks and no boxes, as COCO wants of results in segmentation.
        """
        rows = []
        for number in sorted(self._images):
            image = self._images[number]
            for k in np.argsort(-image.scores, kind="stable").tolist():
                category = int(category_ids[int(image.labels[k])])
                if category < 0:
                    continue
                row: dict[str, Any] = {"image_id": int(image_ids[number]), "category_id": category}
                if masks:
                    assert image.masks is not None, "the tally has no masks"
                    row["segmentation"] = {"size": list(image.size), "counts": image.masks[k].decode("ascii")}
                else:
                    left, top, right, bottom = image.boxes[k].tolist()
                    row["bbox"] = [left, top, right - left, bottom - top]
                rows.append({**row, "score": float(image.scores[k])})
        return rows


def _array(values: Tensor) -> np.ndarray:
    """Float64, in which differences of float32 corners are exact."""
    return values.double().numpy()


def _runs(masks: Tensor) -> list[bytes]:
    """Masks [K, H, W] as COCO's run lengths."""
    found: list[bytes] = []
    for some in masks.split(8) if len(masks) else ():  # a photo's masks are large, and this copies them
        bitmaps = np.asfortranarray(some.to(torch.uint8).permute(1, 2, 0).numpy())
        found += [runs["counts"] for runs in mask_tools().encode(bitmaps)]
    return found


def _measure(images: Sequence[_Image], masks: bool) -> dict[str, Any]:
    """torchmetrics' numbers of all images, with COCO's table of precisions."""
    from torchmetrics.detection import MeanAveragePrecision

    metric: Any = MeanAveragePrecision(
        iou_type=("bbox", "segm") if masks else "bbox",
        # Its own lists are float32: an IoU of exactly 0.6 would not reach 0.6.
        iou_thresholds=_THRESHOLDS,
        rec_thresholds=_RECALLS,
        extended_summary=True,
        backend="faster_coco_eval",
        sync_on_compute=False,  # the images of all ranks are here already
    )
    metric.update([], [])
    # What update would put there. Masks are run lengths already, and drawing 500,000 of them again would take minutes.
    metric.detection_box = [torch.from_numpy(_as_corner_and_size(image.boxes)) for image in images]
    metric.detection_scores = [torch.from_numpy(image.scores) for image in images]
    metric.detection_labels = [torch.from_numpy(image.labels) for image in images]
    metric.groundtruth_box = [torch.from_numpy(_as_corner_and_size(image.true_boxes)) for image in images]
    metric.groundtruth_labels = [torch.from_numpy(image.true_labels) for image in images]
    metric.groundtruth_crowds = [torch.from_numpy(image.crowd.astype(np.int64)) for image in images]
    metric.groundtruth_area = [torch.from_numpy(image.areas) for image in images]
    if masks:
        metric.detection_mask = [tuple((image.size, runs) for runs in image.masks or ()) for image in images]
        metric.groundtruth_mask = [tuple((image.size, runs) for runs in image.true_masks or ()) for image in images]
    return metric.compute()


def _as_corner_and_size(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _summary(measured: dict[str, Any], prefix: str, objects: np.ndarray) -> PrecisionSummary:
    """Name torchmetrics' numbers; `measured` is empty where there is no object at all."""
    names = {"ap": "map", "ap50": "map_50", "ap75": "map_75", "small": "map_small", "medium": "map_medium",
             "large": "map_large", "ar100": "mar_100"}  # fmt: skip
    values = {ours: _known(float(measured.get(prefix + theirs, -1))) for ours, theirs in names.items()}
    per_class = [ClassPrecision(index, 0, None, None, None) for index in range(len(objects))]
    # [threshold, recall, class, size of area, most predictions]; the first size is all, the last number is 100.
    table = measured[prefix + "precision"][:, :, :, 0, -1].numpy() if measured else np.empty((10, 101, 0))
    for place, index in enumerate(measured["classes"].reshape(-1).tolist() if measured else ()):
        if objects[index]:
            by_threshold = table[:, :, place].mean(axis=1)
            ap, ap50, ap75 = float(by_threshold.mean()), float(by_threshold[0]), float(by_threshold[5])
            per_class[index] = ClassPrecision(index, int(objects[index]), ap, ap50, ap75)
    return PrecisionSummary(**values, per_class=tuple(per_class))


def _known(value: float) -> float | None:
    return None if value == -1 else value


def write_per_class_csv(path: Path | str, result: DetectionResult, names: Sequence[str]) -> None:
    """Write one row a class: number, name, objects, AP, AP50 and AP75 of boxes, and of masks where there are.

    Values are in [0, 1]; they are empty where a class has no objects.

    Raises:
        ValueError: there is not one name a class.
    """
    _check_names(result, names)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = ["ap", "ap50", "ap75", *(["mask_ap", "mask_ap50", "mask_ap75"] if result.masks else [])]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "name", "objects", *columns])
        for score in result.boxes.per_class:
            values = _values(result, score.index)
            cells = ["" if value is None else f"{value:.6f}" for value in values]
            writer.writerow([score.index, names[score.index], score.objects, *cells])


def worst_classes_table(result: DetectionResult, names: Sequence[str], count: int = 10) -> str:
    """The `count` classes of lowest AP of boxes as text, the worst first; of equal ones that with more objects.

    Raises:
        ValueError: there is not one name a class.
    """
    _check_names(result, names)
    scored = [score for score in result.boxes.per_class if score.ap is not None]
    scored.sort(key=lambda score: (score.ap, -score.objects, score.index))
    header = [
        "class",
        "objects",
        "AP",
        "AP50",
        "AP75",
        *(["mask AP", "mask AP50", "mask AP75"] if result.masks else []),
    ]
    rows = []
    for score in scored[:count]:
        cells = ["-" if value is None else f"{100 * value:.1f}" for value in _values(result, score.index)]
        rows.append([shorten(names[score.index]), str(score.objects), *cells])
    return text_table(header, rows)


def _values(result: DetectionResult, index: int) -> list[float | None]:
    scores = [summary.per_class[index] for summary in (result.boxes, result.masks) if summary is not None]
    return [value for score in scores for value in (score.ap, score.ap50, score.ap75)]


def _check_names(result: DetectionResult, names: Sequence[str]) -> None:
    count = len(result.boxes.per_class)
    if len(names) != count:
        raise ValueError(f"{len(names)} names for {count} classes; pass one name a class, in order")


def write_coco_results(
    path: Path | str,
    tally: DetectionTally,
    image_ids: Sequence[int] | np.ndarray,
    category_ids: Sequence[int] | np.ndarray,
    masks: bool = False,
) -> None:
    """Write predictions as COCO's results, a JSON list that its tools and servers read.

    Args:
        path: of the file.
        tally: holds the predictions, of all ranks.
        image_ids, category_ids: the set's own numbers, those of its source.
        masks: write masks and no boxes; COCO scores the two from two files.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        json.dump(tally.coco_results(image_ids, category_ids, masks), file)
