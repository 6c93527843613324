"""AP against pycocotools, COCO's own code; the counts, the rules for what is not there, the files."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("faster_coco_eval")
pytest.importorskip("torchmetrics")

from mae_et.data.instances import Instances
from mae_et.evaluation import detection
from mae_et.evaluation.detection import (
    DetectionTally,
    worst_classes_table,
    write_coco_results,
    write_per_class_csv,
)

HEIGHT, WIDTH = 120, 150
CLASSES = 4


def random_boxes(generator: np.random.Generator, count: int) -> np.ndarray:
    """Whole numbers, so that IoUs lie on the thresholds now and then."""
    left, top = generator.integers(0, WIDTH - 20, count), generator.integers(0, HEIGHT - 20, count)
    right = np.minimum(left + generator.integers(4, 120, count), WIDTH)
    bottom = np.minimum(top + generator.integers(4, 100, count), HEIGHT)
    return np.stack([left, top, right, bottom], axis=1).astype(np.float32).reshape(-1, 4)


def masks_of(boxes: np.ndarray) -> torch.Tensor:
    """A box without its upper left quarter, so that masks and boxes overlap differently."""
    masks = torch.zeros(len(boxes), HEIGHT, WIDTH, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.round().astype(int)):
        mask[top:bottom, left:right] = 1
        mask[top : (top + bottom) // 2, left : (left + right) // 2] = 0
    return masks


def scene(seed: int, masks: bool):
    """Truth and predictions of 12 images; some of either kind without any, class 3 never to be found."""
    generator = np.random.default_rng(seed)
    images = []
    for number in range(12):
        count = 0 if number % 5 == 4 else int(generator.integers(1, 7))
        boxes = random_boxes(generator, count)
        crowd = generator.random(count) < 0.2
        areas = generator.choice([500.0, 1024.0, 3000.0, 9216.0, 20000.0], count)
        labels = generator.integers(0, CLASSES - 1, count)
        truth = Instances(
            torch.from_numpy(boxes),
            torch.from_numpy(labels),
            torch.from_numpy(areas.astype(np.float32)),
            torch.from_numpy(crowd),
            masks_of(boxes) if masks else None,
        )
        again = np.repeat(boxes, 2, axis=0)
        near = np.clip(again + generator.integers(-6, 7, again.shape), 0, [WIDTH, HEIGHT] * 2)
        near = np.concatenate([near[(near[:, 2:] - near[:, :2] > 1).all(1)], random_boxes(generator, 3)])
        near = near[:0] if number % 5 == 3 else near.astype(np.float32)
        guessed = np.concatenate([np.repeat(labels, 2), generator.integers(0, CLASSES, 3)])[-len(near) :][: len(near)]
        scores = generator.integers(1, 12, len(near)) / np.float32(12)  # with ties, within images and between them
        images.append((near, scores.astype(np.float32), guessed, truth))
    return images


def tally_of(images, masks: bool, order=None) -> DetectionTally:
    tally = DetectionTally(CLASSES, masks)
    for number in order if order is not None else range(len(images)):
        boxes, scores, labels, truth = images[number]
        tally.add(
            number,
            torch.from_numpy(boxes),
            torch.from_numpy(scores),
            torch.from_numpy(labels),
            truth,
            masks_of(boxes) if masks else None,
        )
    return tally


def by_pycocotools(images, kind: str):
    """COCO's twelve numbers, and AP, AP50, AP75 of each class; -1 where there is nothing to find."""
    from pycocotools import mask as tools
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def entry(number, box, label, mask):
        left, top, right, bottom = map(float, box)
        row = {"image_id": number, "category_id": int(label) + 1, "bbox": [left, top, right - left, bottom - top]}
        if mask is not None:
            row["segmentation"] = tools.encode(np.asfortranarray(mask.numpy()))
        return row

    truths, found = [], []
    for number, (boxes, scores, labels, truth) in enumerate(images):
        for k in range(len(truth)):
            mask = None if truth.masks is None else truth.masks[k]
            row = entry(number, truth.boxes[k], truth.labels[k], mask)
            row |= {"id": len(truths) + 1, "area": float(truth.areas[k]), "iscrowd": int(truth.crowd[k])}
            truths.append(row)
        drawn = masks_of(boxes) if kind == "segm" else [None] * len(boxes)
        for k in range(len(boxes)):
            row = entry(number, boxes[k], labels[k], drawn[k]) | {"score": float(scores[k])}
            if kind == "segm":
                del row["bbox"]  # or the size of a prediction would be that of its box
            found.append(row)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in range(len(images))],
            "annotations": truths,
            "categories": [{"id": i + 1, "name": str(i)} for i in range(CLASSES)],
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    table = evaluation.eval["precision"][:, :, :, 0, 2]
    parts = table.reshape(-1, CLASSES), table[0], table[5]
    per_class = [[float(part[:, number].mean()) for part in parts] for number in range(CLASSES)]
    return evaluation.stats, per_class


def assert_equal(summary, reference) -> None:
    stats, per_class = reference
    ours = [summary.ap, summary.ap50, summary.ap75, summary.small, summary.medium, summary.large, summary.ar100]
    # torchmetrics gives float32: 6e-8 at 1.
    assert [-1 if value is None else value for value in ours] == pytest.approx([*stats[:6], stats[8]], abs=1e-6)
    for score, expected in zip(summary.per_class, per_class, strict=True):
        values = [-1 if value is None else value for value in (score.ap, score.ap50, score.ap75)]
        assert values == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_boxes_and_masks_are_scored_as_by_pycocotools(seed):
    images = scene(seed, masks=True)
    result = tally_of(images, masks=True).result()
    assert_equal(result.boxes, by_pycocotools(images, "bbox"))
    assert result.masks is not None
    assert_equal(result.masks, by_pycocotools(images, "segm"))
    assert result.boxes.ap is not None
    assert 0.05 < result.boxes.ap < 0.9  # the sweep is neither of misses nor of hits alone
    assert result.masks.ap != result.boxes.ap


@pytest.mark.parametrize("seed", range(4, 8))
def test_boxes_alone_are_scored_as_by_pycocotools(seed):
    images = scene(seed, masks=False)
    result = tally_of(images, masks=False).result()
    assert_equal(result.boxes, by_pycocotools(images, "bbox"))
    assert result.masks is None


def test_an_iou_on_the_threshold_is_a_hit():
    # 60 of 100 px: in float32, 0.6 is 0.60000002, which 60/100 does not reach.
    truth = Instances(torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([0]), torch.tensor([100.0]), torch.tensor([False]))
    tally = DetectionTally(1)
    tally.add(0, torch.tensor([[0.0, 0, 10, 6]]), torch.tensor([0.5]), torch.tensor([0]), truth)
    assert tally.result().boxes.ap == pytest.approx(0.3)  # of 0.50, 0.55, 0.60 among ten thresholds


def test_a_class_without_objects_is_in_no_mean():
    images = scene(0, masks=False)
    assert any((labels == 3).any() for _, _, labels, _ in images)  # it is predicted
    result = tally_of(images, masks=False).result()
    last = result.boxes.per_class[3]
    assert (last.objects, last.ap, last.ap50, last.ap75) == (0, None, None, None)
    others = [score.ap for score in result.boxes.per_class[:3]]
    assert result.boxes.ap == pytest.approx(np.mean(others), abs=1e-6)
    assert result.objects == sum(int((~truth.crowd).sum()) for *_, truth in images)


def test_a_set_without_objects_has_no_ap_and_an_empty_one_no_result():
    tally = DetectionTally(2)
    with pytest.raises(ValueError, match="there is no image to score"):
        tally.result()
    tally.add(0, torch.tensor([[0.0, 0, 5, 5]]), torch.tensor([0.5]), torch.tensor([1]), Instances.none())
    result = tally.result()
    assert (result.boxes.ap, result.objects, result.predictions) == (None, 0, 1)
    assert result.metrics() == {}


def test_objects_without_any_prediction_score_zero():
    truth = scene(0, masks=True)[0][3]
    tally = DetectionTally(CLASSES, masks=True)
    nothing = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    tally.add(0, *nothing, truth, torch.zeros(0, HEIGHT, WIDTH, dtype=torch.uint8))
    result = tally.result()
    assert result.masks is not None
    assert (result.boxes.ap, result.masks.ap, result.boxes.ar100) == (0, 0, 0)
    assert result.metrics("val/")["val/mask_ap50"] == 0


def test_predictions_that_are_not_finite_are_left_out_and_counted():
    images = scene(1, masks=True)
    clean = tally_of(images, masks=True).result()
    boxes, scores, labels, truth = images[0]
    bad = np.full((2, 4), 5, np.float32)
    bad[0, 2] = np.nan
    images[0] = (
        np.concatenate([boxes, bad]),
        np.concatenate([scores, np.array([1, np.inf], np.float32)]),
        np.concatenate([labels, [0, 0]]),
        truth,
    )
    drawn = torch.cat([masks_of(boxes), torch.ones(2, HEIGHT, WIDTH, dtype=torch.uint8)])
    tally = DetectionTally(CLASSES, masks=True)
    tally.add(0, *map(torch.from_numpy, images[0][:3]), truth, drawn)
    for number in range(1, len(images)):
        tally.add(number, *map(torch.from_numpy, images[number][:3]), images[number][3], masks_of(images[number][0]))
    assert tally.result() == replace(clean, not_finite=2)


def test_ranks_together_have_the_result_of_one(monkeypatch):
    images = scene(2, masks=True)
    alone = tally_of(images, masks=True)
    # Image 0 pads the second rank's share, as samplers do.
    parts = [tally_of(images, True, order) for order in ([10, 0, 2, 4, 6, 8], [1, 3, 5, 7, 11, 9, 0])]
    monkeypatch.setattr(detection, "gather_objects", lambda mine: [part._images for part in parts])
    for part in parts:
        assert part.gather().result() == alone.result()
        assert len(part) == len(images)
        assert part.coco_results(range(12), range(4)) == alone.coco_results(range(12), range(4))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools 2.0.11 on NumPy 2
@pytest.mark.parametrize("masks", [False, True])
def test_written_results_are_the_predictions_by_the_sets_own_ids(tmp_path, masks):
    from pycocotools import mask as tools

    images = scene(3, masks=True)
    tally = tally_of(images, masks=True)
    write_coco_results(tmp_path / "new" / "results.json", tally, range(100, 112), [7, 9, -1, 12], masks)
    rows = json.loads((tmp_path / "new" / "results.json").read_text())
    assert len(rows) == sum(int((labels != 2).sum()) for _, _, labels, _ in images)
    assert {row["category_id"] for row in rows} == {7, 9, 12}
    for number, (boxes, scores, labels, _) in enumerate(images):
        mine = [row for row in rows if row["image_id"] == 100 + number]
        order = [k for k in np.argsort(-scores, kind="stable") if labels[k] != 2]
        assert [row["score"] for row in mine] == pytest.approx(scores[order].tolist())
        for row, k in zip(mine, order, strict=True):
            if masks:
                assert "bbox" not in row
                np.testing.assert_array_equal(tools.decode(row["segmentation"]), masks_of(boxes)[k].numpy())
            else:
                left, top, right, bottom = boxes[k].tolist()
                assert row["bbox"] == pytest.approx([left, top, right - left, bottom - top])


def test_tables_name_classes_and_leave_out_what_is_unknown(tmp_path):
    result = tally_of(scene(4, masks=True), masks=True).result()
    names = ["ant", "bee", "x" * 40, "never there"]
    write_per_class_csv(tmp_path / "per_class.csv", result, names)
    lines = (tmp_path / "per_class.csv").read_text().splitlines()
    assert lines[0] == "class,name,objects,ap,ap50,ap75,mask_ap,mask_ap50,mask_ap75"
    assert lines[4] == "3,never there,0,,,,,,"
    first = result.boxes.per_class[0]
    assert lines[1].startswith(f"0,ant,{first.objects},{first.ap:.6f},{first.ap50:.6f},")
    table = worst_classes_table(result, names, count=2).splitlines()
    worst = min(result.boxes.per_class[:3], key=lambda score: score.ap or 0)
    assert len(table) == 4
    assert f"{100 * (worst.ap or 0):.1f}" in table[2]
    assert "never there" not in worst_classes_table(result, names)
    with pytest.raises(ValueError, match="2 names for 4 classes"):
        write_per_class_csv(tmp_path / "x.csv", result, names[:2])


@pytest.mark.parametrize("absent", ["faster_coco_eval", "torchmetrics"])
def test_what_is_not_installed_is_named(monkeypatch, absent):
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(ValueError, match=r"pip install 'mae_et\[dense\]'"):
        DetectionTally(CLASSES)
