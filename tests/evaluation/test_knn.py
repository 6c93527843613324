"""Weighted kNN against a fp64 reference that looks at all neighbours at once; ties; any chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mae_et.evaluation import knn
from mae_et.evaluation.features import Features
from mae_et.evaluation.knn import knn_accuracy


def reference(train: Features, test: Features, k: int, temperature: float = 0.07) -> float:
    """fp64; of equal similarities the first image, of equal votes the lowest class."""
    bank, queries = (part.features.astype(np.float64) for part in (train, test))
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    right = 0
    for query, label in zip(queries, test.labels):
        similarity = bank @ query
        nearest = sorted(range(len(bank)), key=lambda i: (-similarity[i], i))[:k]
        votes = np.zeros(max(train.labels.max(), test.labels.max()) + 1)
        for i in nearest:
            votes[train.labels[i]] += np.exp(similarity[i] / temperature)
        right += votes.argmax() == label
    return right / len(test.labels)


def blobs(images: int, seed: int, classes: int = 5, width: int = 12) -> Features:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((classes, width))
    labels = rng.integers(0, classes, images)
    return Features((centres[labels] + 1.2 * rng.standard_normal((images, width))).astype(np.float32), labels)


def signs(images: int, seed: int) -> Features:
    """Features of +-1 in 4 dimensions: 16 different ones, whose similarities fp32 has exactly (quarters)."""
    rng = np.random.default_rng(seed)
    return Features(rng.choice([-1.0, 1.0], (images, 4)).astype(np.float32), rng.integers(0, 4, images))


@pytest.mark.parametrize(("chunk", "bank_chunk"), [(1024, 65_536), (7, 50), (64, 3), (1, 120), (60, 299)])
@pytest.mark.parametrize("make", [blobs, signs], ids=["no ties", "ties"])
def test_accuracy_is_the_references_whatever_the_chunks(make, chunk, bank_chunk):
    train, test = make(300, seed=1), make(60, seed=2)
    scores = knn_accuracy(train, test, (1, 10, 20, 100, 200), chunk=chunk, bank_chunk=bank_chunk)
    assert scores == {k: reference(train, test, k) for k in (1, 10, 20, 100, 200)}
    assert len(set(scores.values())) > 1


def test_equal_similarities_go_to_the_first_image():
    """Ten equal training images of ten classes: one neighbour is the first, whatever the bank's chunks."""
    train = Features(np.ones((10, 4), np.float32), np.array([3, 0, 1, 2, 4, 5, 6, 7, 8, 9]))
    test = Features(np.ones((10, 4), np.float32), np.arange(10))
    for bank_chunk in (1, 3, 10):
        assert knn_accuracy(train, test, (1, 2, 10), bank_chunk=bank_chunk) == {1: 0.1, 2: 0.1, 10: 0.1}
        only_three = Features(test.features[:1], np.array([3]))
        # One neighbour is of class 3; the votes of 3 and 0 are equal, and 0 is lower.
        assert knn_accuracy(train, only_three, (1, 2), bank_chunk=bank_chunk) == {1: 1.0, 2: 0.0}


def test_more_neighbours_than_images_are_cut():
    train, test = blobs(30, seed=1), blobs(40, seed=2)
    scores = knn_accuracy(train, test, (30, 100), bank_chunk=8)
    assert scores[30] == scores[100] == reference(train, test, 30)


def test_the_default_neighbours_are_dinos():
    assert list(knn_accuracy(blobs(300, 1), blobs(20, 2))) == [10, 20, 100, 200]


@pytest.mark.parametrize("part", [1, 13, 60])
def test_test_features_may_come_in_parts(part):
    train, test = blobs(200, seed=1), blobs(60, seed=2)
    parts = (
        Features(test.features[start : start + part], test.labels[start : start + part]) for start in range(0, 60, part)
    )
    assert knn_accuracy(train, parts, (10,), chunk=16) == {10: reference(train, test, 10)}


def test_no_part_is_made_before_it_is_needed(monkeypatch):
    """Features of a stream are dropped one by one, and no product is larger than chunk x bank_chunk."""
    train, test = blobs(100, seed=1), blobs(40, seed=2)
    events: list[str | tuple[int, ...]] = []
    largest = knn._largest

    def watched(values: torch.Tensor, count: int):
        events.append(tuple(values.shape))
        return largest(values, count)

    def stream():
        for start in (0, 20):
            events.append("made")
            yield Features(test.features[start : start + 20], test.labels[start : start + 20])

    monkeypatch.setattr(knn, "_largest", watched)
    knn_accuracy(train, stream(), (5,), chunk=15, bank_chunk=60)
    once = ["made", (15, 60), (15, 40), (5, 60), (5, 40)]
    assert events == once + once


def test_a_class_that_is_not_trained_on_is_never_found():
    train, test = blobs(100, seed=1), blobs(40, seed=2)
    unknown = Features(test.features, test.labels + 50)
    assert knn_accuracy(train, unknown, (10,)) == {10: 0.0}


def test_no_test_images_are_an_error():
    with pytest.raises(ValueError, match="is the test split empty"):
        knn_accuracy(blobs(10, 1), [], (5,))
