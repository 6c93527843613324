"""Weighted nearest neighbours on frozen features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mae_et.evaluation.features import Features

NEIGHBOURS = (10, 20, 100, 200)  # DINO and DINOv2's (released code, eval_knn.py)


def knn_accuracy(
    train: Features,
    test: Features | Iterable[Features],
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = 0.07,
    chunk: int = 1024,
    bank_chunk: int = 65_536,
    device: torch.device | str = "cpu",
) -> dict[int, float]:
    """Top-1 accuracy of weighted kNN (Wu et al. 2018, arXiv 1805.01978, section 3.4) per number of neighbours.

    Cosine similarity s; each of the k nearest votes for its class with exp(s / temperature). Equal similarities go to
    the training image that comes first, equal votes to the lower class id. At no time are there more similarities
    than `chunk` x `bank_chunk`, and test features may be made while they are used.

    Args:
        train, test: features and labels; class ids from 0. `test` may come in parts of any size.
        neighbours: values of k; those above the number of training images are cut to it.
        temperature: of the votes.
        chunk: test images at a time.
        bank_chunk: training images at a time.
        device: where similarities are computed; all of `train` is held there.

    Returns:
        {k: accuracy in [0, 1]}.

    Raises:
        ValueError: `test` has no images.
    """
    bank = F.normalize(torch.from_numpy(train.features).float().to(device), dim=1)
    labels = torch.from_numpy(train.labels)
    classes = int(train.labels.max()) + 1
    largest = min(max(neighbours), len(bank))
    correct, images = dict.fromkeys(neighbours, 0), 0
    for queries, truth in _chunks(test, chunk):
        queries = F.normalize(queries.to(device), dim=1)
        similarity, nearest = (found.cpu() for found in _search(queries, bank, largest, bank_chunk))
        # float64: sums of votes up to exp(1 / 0.07) must not round two classes together.
        votes, voted = (similarity.double() / temperature).exp(), labels[nearest]
        for k in neighbours:
            scores = votes.new_zeros(len(votes), classes).scatter_add_(1, voted[:, :k], votes[:, :k])
            correct[k] += int((scores.argmax(dim=1) == truth).sum())
        images += len(truth)
    if not images:
        raise ValueError("kNN got no test images; is the test split empty?")
    return {k: hits / images for k, hits in correct.items()}


def _chunks(test: Features | Iterable[Features], chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and labels of at most `chunk` images at a time."""
    for part in [test] if isinstance(test, Features) else test:
        for start in range(0, len(part.labels), chunk):
            features = np.ascontiguousarray(part.features[start : start + chunk])
            yield torch.from_numpy(features).float(), torch.from_numpy(part.labels[start : start + chunk])


def _search(queries: Tensor, bank: Tensor, count: int, bank_chunk: int) -> tuple[Tensor, Tensor]:
    """The `count` most similar rows of the bank for each query: similarities, falling, and rows, both [N, count]."""
    best: tuple[Tensor, Tensor] | None = None
    for start in range(0, len(bank), bank_chunk):
        similarity, rows = _largest(queries @ bank[start : start + bank_chunk].T, count)
        rows = rows + start
        if best is not None:
            # What was found before stands first, and a stable order leaves it there: ties go to the lower row.
            similarity, rows = torch.cat([best[0], similarity], dim=1), torch.cat([best[1], rows], dim=1)
            order = similarity.argsort(dim=1, descending=True, stable=True)[:, :count]
            similarity, rows = similarity.gather(1, order), rows.gather(1, order)
        best = similarity, rows
    assert best is not None, "an empty bank"
    return best


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of each row and their columns, falling; of equal ones the lower column is first, and is taken first.

    `topk` alone may take any of equal values, and the choice would differ between devices.
    """
    count = min(count, values.shape[1])
    top, columns = values.topk(count, dim=1)
    crowded = (values >= top[:, -1:]).sum(dim=1) > count
    if crowded.any():
        columns[crowded] = values[crowded].argsort(dim=1, descending=True, stable=True)[:, :count]
    columns = columns.sort(dim=1).values
    top = values.gather(1, columns)
    order = top.argsort(dim=1, descending=True, stable=True)
    return top.gather(1, order), columns.gather(1, order)
