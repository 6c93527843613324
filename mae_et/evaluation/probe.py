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


class FittedProbe:
    """A logistic probe that has seen its training images.

    Args:
        train: features and labels.
        strengths, choose_on, seed: as of `logistic_probe`.

    Attributes:
        strength: C.
    """

    def __init__(
        self, train: Features, strengths: Sequence[float] = STRENGTHS, choose_on: int = 10_000, seed: int = 0
    ) -> None:
        self._mean, self._std = train.features.mean(axis=0), train.features.std(axis=0) + 1e-6
        x, y = (train.features - self._mean) / self._std, train.labels
        self.strength = _choose(x, y, strengths, choose_on, seed)
        self._classifier = _fit(x, y, self.strength)

    def accuracy(self, test: Features) -> float:
        """Top-1 in [0, 1]."""
        return float(self._classifier.score((test.features - self._mean) / self._std, test.labels))


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
    probe = FittedProbe(train, strengths, choose_on, seed)
    return ProbeResult(probe.accuracy(test), probe.strength)


def _choose(x: np.ndarray, y: np.ndarray, strengths: Sequence[float], choose_on: int, seed: int) -> float:
    """The strength of the highest accuracy on images held out of (x, y)."""
    order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(x))[:choose_on]
    if np.bincount(y[order]).max() < 2:
        return MILD
    fit, held = (order[rows] for rows in stratified_split(y[order], 0.2, seed))
    scores = [_fit(x[fit], y[fit], strength).score(x[held], y[held]) for strength in strengths]
    return strengths[int(np.argmax(scores))]


def _fit(x: Any, y: Any, strength: float) -> LogisticRegression:
    """A fitted classifier; one that stops at the iteration limit is good enough for a score, and says nothing."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, max_iter=300, tol=1e-3).fit(x, y)
