"""Logistic regression on frozen features."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mae_et.evaluation.features import Features

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

STRENGTHS = (0.01, 0.1, 1.0, 10.0)


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
    from sklearn.model_selection import train_test_split  # a second of imports, which training does without

    mean, std = train.features.mean(axis=0), train.features.std(axis=0) + 1e-6
    x, x_test = (train.features - mean) / std, (test.features - mean) / std
    y = train.labels
    order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(x))[:choose_on]
    smallest = np.unique(y[order], return_counts=True)[1].min()
    x_fit, x_held, y_fit, y_held = train_test_split(
        x[order], y[order], test_size=0.2, random_state=seed, stratify=y[order] if smallest > 1 else None
    )
    scores = [_fit(x_fit, y_fit, c).score(x_held, y_held) for c in strengths]
    best = strengths[int(np.argmax(scores))]
    return ProbeResult(float(_fit(x, y, best).score(x_test, test.labels)), best)


def _fit(x: Any, y: Any, strength: float) -> LogisticRegression:
    """A fitted classifier; one that stops at the iteration limit is good enough for a score, and says nothing."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, max_iter=300, tol=1e-3).fit(x, y)
