"""Accuracies and confusion against scikit-learn; ties, broken logits, wrong labels, several ranks."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, top_k_accuracy_score

from mae_et.evaluation.classification import Tally, worst_classes_table, write_per_class_csv


def sample(images: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    logits = rng.standard_normal((images, classes)) + 1.5 * np.eye(classes)[labels]
    return torch.from_numpy(logits).float(), torch.from_numpy(labels)


def count(logits, labels, classes, batch=64):
    tally = Tally(classes, "cpu")
    for start in range(0, len(logits), batch):
        tally.add(logits[start : start + batch], labels[start : start + batch])
    return tally.result()


@pytest.mark.parametrize("classes", [2, 5, 6, 100])
@pytest.mark.parametrize("batch", [1, 64, 1000])
def test_counts_are_those_of_scikit_learn(classes, batch):
    logits, labels = sample(300, classes)
    result = count(logits, labels, classes, batch)
    scores, truth, every = logits.numpy(), labels.numpy(), np.arange(classes)
    expected = confusion_matrix(truth, scores.argmax(axis=1), labels=every)
    np.testing.assert_array_equal(result.confusion, expected)
    assert result.images == 300
    assert result.not_finite == 0
    assert result.top1 == (scores.argmax(axis=1) == truth).mean()
    if classes > 5:
        assert result.top5 == top_k_accuracy_score(truth, scores, k=5, labels=every)
    else:
        assert result.top5 == 1.0
    means = []
    for score in result.per_class:
        own = truth == score.index
        assert score.images == own.sum()
        if own.any():
            means.append((scores[own].argmax(axis=1) == score.index).mean())
            assert score.top1 == means[-1]
            among = (np.argsort(-scores[own], axis=1)[:, :5] == score.index).any(axis=1)
            assert score.top5 == among.mean()
        else:
            assert math.isnan(score.top1)
    assert result.mean_class_accuracy == pytest.approx(np.mean(means), rel=1e-14)


def test_of_equal_logits_the_lower_class_ranks_first():
    logits = torch.zeros(8, 8, dtype=torch.bfloat16)
    result = count(logits, torch.arange(8), 8)
    assert [score.top1 for score in result.per_class] == [1, 0, 0, 0, 0, 0, 0, 0]
    assert [score.top5 for score in result.per_class] == [1, 1, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_image_without_finite_logits_is_wrong(value):
    logits, labels = sample(50, 7)
    logits = logits + 10 * torch.eye(7)[labels]
    logits[4, labels[4]] = value
    logits[9] = value
    result = count(logits, labels, 7)
    assert result.not_finite == 2
    assert result.images == 50
    assert result.top1 == result.top5 == 48 / 50
    assert result.confusion.sum() == 48


@pytest.mark.parametrize("wrong", [-1, 4, 100])
def test_labels_that_are_no_classes_are_an_error(wrong):
    logits, labels = sample(20, 4)
    labels[[3, 5]] = wrong
    with pytest.raises(ValueError, match=r"2 labels lie outside 0 \.\. 3"):
        count(logits, labels, 4)


def test_an_empty_set_has_no_accuracy():
    with pytest.raises(ValueError, match="is the test split empty"):
        Tally(3, "cpu").result()


def test_nothing_waits_for_the_device():
    """On the meta device every question for a value is an error, as in `Tally.add` it would be a wait on a GPU."""
    tally = Tally(10, "meta")
    tally.add(torch.zeros(4, 10, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta"))
    with pytest.raises(NotImplementedError):
        tally.result()


RANK = """
import sys, torch, torch.distributed as dist
from mae_et.evaluation.classification import Tally
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
data = torch.load(sys.argv[3])
tally = Tally(6, "cpu")
for part in range(rank, 3, 2):  # two batches on rank 0, one on rank 1
    tally.add(data["logits"][part * 20 : (part + 1) * 20], data["labels"][part * 20 : (part + 1) * 20])
result = tally.reduce().result()
dist.barrier()
dist.destroy_process_group()
print(result.images, result.top1, result.top5, result.confusion.ravel().tolist())
"""


def test_ranks_add_up_their_counts(repository, tmp_path):
    logits, labels = sample(60, 6)
    torch.save({"logits": logits, "labels": labels}, tmp_path / "data.pt")
    line = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen(
            [*line, str(rank), str(tmp_path / "store"), str(tmp_path / "data.pt")],
            cwd=repository,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in ranks]
    whole = count(logits, labels, 6)
    expected = f"{whole.images} {whole.top1} {whole.top5} {whole.confusion.ravel().tolist()}"
    assert said == [expected, expected]


def test_without_other_ranks_reducing_changes_nothing():
    logits, labels = sample(60, 6)
    tally = Tally(6, "cpu")
    tally.add(logits, labels)
    np.testing.assert_array_equal(tally.reduce().result().confusion, count(logits, labels, 6).confusion)


@pytest.fixture
def uneven():
    """Four classes: all right, half taken for the last one, no images, all taken for the first."""
    labels = torch.tensor([0] * 4 + [1] * 4 + [3] * 2)
    predicted = torch.tensor([0] * 4 + [1, 1, 3, 3] + [0, 0])
    return count(torch.eye(4)[predicted], labels, 4)


def test_results_per_class_are_a_table_for_other_programs(uneven, tmp_path):
    path = tmp_path / "results" / "per_class.csv"
    write_per_class_csv(path, uneven, ["T-shirt, top", "übrig", "none", 'a "bag"'])
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["T-shirt, top", "übrig", "none", 'a "bag"']
    assert [row["images"] for row in rows] == ["4", "4", "0", "2"]
    assert [row["top1"] for row in rows] == ["1.000000", "0.500000", "", "0.000000"]
    assert [row["mistaken_for"] for row in rows] == ["", 'a "bag"', "", "T-shirt, top"]
    assert [row["mistaken_images"] for row in rows] == ["", "2", "", "2"]


def test_the_worst_classes_come_first(uneven):
    lines = worst_classes_table(uneven, ["shirt", "shoe", "none", "b" * 40], count=2).splitlines()
    assert lines[0].split("  ")[-1].strip() == "most often taken for"
    assert len(lines) == 4
    assert lines[2].split() == ["b" * 31 + "…", "2", "0.0", "%", "100.0", "%", "shirt", "(100", "%)"]
    assert lines[3].split()[:4] == ["shoe", "4", "50.0", "%"]


def test_names_must_fit_the_classes(uneven, tmp_path):
    with pytest.raises(ValueError, match="3 names for 4 classes"):
        write_per_class_csv(tmp_path / "x.csv", uneven, ["a", "b", "c"])
    with pytest.raises(ValueError, match="3 names for 4 classes"):
        worst_classes_table(uneven, ["a", "b", "c"])
