"""Logistic regression on frozen features."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mae_et.evaluation.features import Features
from mae_et.evaluation.grid_probe import stratified_split

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

STRENGTHS = (0.01, 0.1, 1.0, 10.0)
MILD = 1.0  # where one image a class leaves nothing to choose on


@dataclass(frozen=True)
class ProbeResult:
    """Accuracy in [0, 1] on test data, and the inverse regularisation C that held-out training data chose."""

    accuracy: float
    strength: float


def logistic_probe(
    train: Features, test: Features, strengths: Sequence[float] = STRENGTHS, choose_on: int = 10_000, seed: int = 0
) -> ProbeResult:
    """Multinomial logistic regression on standardised features (scikit-learn, L-BFGS).

    C is chosen by accuracy on a fifth of (at most `choose_on`) training images that the candidates have not seen;
    the winner is fitted on all training images and tested once.

    Args:
        train, test: features and labels.
        strengths: candidates for C.
        choose_on: training images used for the choice.
        seed: of the split.
    """
    mean, std = train.features.mean(axis=0), train.features.std(axis=0) + 1e-6
    x, x_test = (train.features - mean) / std, (test.features - mean) / std
    y = train.labels
    order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(x))[:choose_on]
    if np.bincount(y[order]).max() < 2:
        return ProbeResult(float(_fit(x, y, MILD).score(x_test, test.labels)), MILD)
    fit, held = (order[rows] for rows in stratified_split(y[order], 0.2, seed))
    scores = [_fit(x[fit], y[fit], strength).score(x[held], y[held]) for strength in strengths]
    best = strengths[int(np.argmax(scores))]
    return ProbeResult(float(_fit(x, y, best).score(x_test, test.labels)), best)


def _fit(x: Any, y: Any, strength: float) -> LogisticRegression:
    """A fitted classifier; one that stops at the iteration limit is good enough for a score, and says nothing."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, max_iter=300, tol=1e-3).fit(x, y)
