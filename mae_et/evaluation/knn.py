"""Weighted nearest neighbours on frozen features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from mae_et.evaluation.features import Features


def knn_accuracy(
    train: Features, test: Features, neighbours: Sequence[int] = (20,), temperature: float = 0.07, chunk: int = 1024
) -> dict[int, float]:
    """Top-1 accuracy of weighted kNN (Wu et al. 2018, arXiv 1805.01978, section 3.4) per number of neighbours.

    Cosine similarity s; each of the k nearest votes for its class with exp(s / temperature). Test images go through
    in chunks, so that memory is chunk x train images.

    Args:
        train, test: features and labels; class ids from 0.
        neighbours: values of k; those above the number of training images are cut to it.
        temperature: of the votes.
        chunk: test images at a time.

    Returns:
        {k: accuracy in [0, 1]}.
    """
    bank = F.normalize(torch.from_numpy(train.features).float(), dim=1)
    labels = torch.from_numpy(train.labels)
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    largest = min(max(neighbours), len(bank))
    correct = dict.fromkeys(neighbours, 0)
    for start in range(0, len(test.features), chunk):
        queries = F.normalize(torch.from_numpy(test.features[start : start + chunk]).float(), dim=1)
        truth = torch.from_numpy(test.labels[start : start + chunk])
        similarity, nearest = (queries @ bank.T).topk(largest, dim=1)
        votes, voted = (similarity / temperature).exp(), labels[nearest]
        for k in neighbours:
            scores = torch.zeros(len(queries), classes).scatter_add_(1, voted[:, :k], votes[:, :k])
            correct[k] += int((scores.argmax(dim=1) == truth).sum())
    return {k: hits / len(test.features) for k, hits in correct.items()}
