"""A linear probe over a grid of learning rates and kinds of features, all heads trained together as DINOv2 does."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mae_et.curriculum.table import text_table
from mae_et.evaluation.features import Features

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
MOMENTUM = 0.9

# Who draws from the seed: equal numbers for two of them would make their draws equal.
_SPLIT, _WEIGHTS, _ORDER = 1, 2, 3


@dataclass(frozen=True)
class GridResult:
    """A probe's score on test data, and how it was chosen.

    Attributes:
        accuracy: top-1 on test data in [0, 1], of the chosen setting trained again on all training images.
        kind, rate: the chosen features, and the learning rate per 256 images.
        held_out: accuracy on held-out training images of every (kind, rate); the choice saw nothing else.
        edge: whether the chosen rate is the grid's least or largest, so that one beyond it may be better.
        protocol: what was done, for people and logs.
    """

    accuracy: float
    kind: str
    rate: float
    held_out: dict[tuple[str, float], float]
    edge: bool
    protocol: str


@dataclass(frozen=True)
class _Settings:
    """What all heads of a probe share."""

    classes: int
    batch: int
    epochs: int
    least_steps: int
    standardise: bool
    seed: int
    device: torch.device


@dataclass
class _Heads:
    """The linear heads of one kind of features, one a learning rate: weight [D, R, K], bias [R, K]."""

    pieces: tuple[str, ...]
    rates: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor | float = 0.0
    deviation: Tensor | float = 1.0

    def inputs(self, features: Mapping[str, Features], rows: np.ndarray) -> Tensor:
        """Features [N, D] of some rows."""
        parts = [torch.from_numpy(features[piece].features[rows]) for piece in self.pieces]
        return (torch.cat(parts, dim=1).to(self.bias.device) - self.mean) / self.deviation

    def logits(self, inputs: Tensor) -> Tensor:
        """[N, R, K], in one product for all heads."""
        return (inputs @ self.weight.flatten(1)).unflatten(1, self.bias.shape) + self.bias


def grid_probe(
    train: Mapping[str, Features],
    test: Mapping[str, Features],
    *,
    kinds: Mapping[str, Sequence[str]] | None = None,
    rates: Sequence[float] = RATES,
    batch: int = 256,
    epochs: int = 50,
    least_steps: int = 1000,
    hold_out: float = 0.2,
    standardise: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> GridResult:
    """Train a linear classifier for every learning rate and kind of features; choose one, and test it once.

    SGD with momentum 0.9, no weight decay, rate x batch / 256 falling to 0 as a cosine, normal weights of deviation
    0.01, biases 0: DINOv2's linear evaluation (arXiv 2304.07193; `eval/linear.py` of the released code), which trains
    12,500 steps of 128 images on each GPU. Other than there, heads are chosen on held-out training images, by accuracy
    and then by loss, and not on the data that are reported; and features do not change from epoch to epoch.

    Args:
        train, test: features by name, with the same images and labels under each name; class ids from 0.
        kinds: what heads see, as the names of features that are put side by side (see `linear_kinds`); by default
            each name is a kind.
        rates: learning rates per 256 images.
        batch: images a step, at most all that a head is trained on while it is chosen. Each epoch has another order
            and leaves out what does not fill a batch.
        epochs: passes over the training images, and more if these are fewer than `least_steps` steps.
        least_steps: of a head's training, so that a few-shot set does not stop it short.
        hold_out: share of each class's training images that the choice is made on.
        standardise: scale features to mean 0 and deviation 1 over the images trained on. Off, as in DINOv2, whose
            features have passed a LayerNorm; on for others, such as pooled activations of a ConvNet.
        seed: of the split, the weights and the orders. The same seed and number of threads give the same result.
        device: where heads are trained; features stay in main memory.

    Raises:
        ValueError: no class has two training images, so that none can be held out.
    """
    chosen_from = {name: tuple(parts) for name, parts in (kinds or {name: [name] for name in train}).items()}
    labels = next(iter(train.values())).labels
    fit, held = stratified_split(labels, hold_out, seed)
    settings = _Settings(
        classes=int(labels.max()) + 1,  # test data decide nothing: a class that is not trained on is not predicted
        batch=min(batch, len(fit)),
        epochs=epochs,
        least_steps=least_steps,
        standardise=standardise,
        seed=seed,
        device=torch.device(device),
    )
    scores: dict[tuple[str, float], tuple[float, float]] = {}
    for kind, heads in _train(train, fit, chosen_from, rates, settings).items():
        for rate, score in zip(rates, _score(heads, train, held)):
            scores[kind, rate] = score
    kind, rate = max(scores, key=lambda head: (scores[head][0], -scores[head][1]))
    winner = _train(train, np.arange(len(labels)), {kind: chosen_from[kind]}, [rate], settings)[kind]
    tested = np.arange(len(next(iter(test.values())).labels))
    return GridResult(
        accuracy=_score(winner, test, tested)[0][0],
        kind=kind,
        rate=rate,
        held_out={head: accuracy for head, (accuracy, _) in scores.items()},
        edge=len(rates) > 1 and rate in (min(rates), max(rates)),
        protocol=(
            f"linear probe on cached features, {len(chosen_from)} kinds x {len(rates)} rates (grid of DINOv2), "
            f"chosen on {len(held)} held-out training images; SGD {_epochs(len(labels), settings)} epochs, "
            f"batch {settings.batch}{', standardised' if standardise else ''}, seed {seed}"
        ),
    )


def held_out_table(result: GridResult) -> str:
    """Held-out accuracy in per cent, one row a learning rate and one column a kind; the choice has a star."""
    kinds = list(dict.fromkeys(kind for kind, _ in result.held_out))
    rates = list(dict.fromkeys(rate for _, rate in result.held_out))
    rows = []
    for rate in rates:
        cells = [f"{100 * result.held_out[kind, rate]:.1f}" for kind in kinds]
        stars = ["*" if (kind, rate) == (result.kind, result.rate) else " " for kind in kinds]
        rows.append([f"{rate:g}", *(cell + star for cell, star in zip(cells, stars))])
    return text_table(["rate", *(f"{kind} " for kind in kinds)], rows)


def stratified_split(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit on and rows held out, both rising; of a class of n images, round(share x n), 1 to n - 1, are held.

    A class of one image is not held out.

    Raises:
        ValueError: no class has two images.
    """
    rng = _generator(seed, _SPLIT)
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        held[rows[: min(max(1, round(share * len(rows))), len(rows) - 1)]] = True
    if not held.any():
        raise ValueError(
            "no class has two training images, so that none can be held out to choose a head on; "
            "use more images a class, or the logistic probe with one strength"
        )
    return np.flatnonzero(~held), np.flatnonzero(held)


def _train(
    features: Mapping[str, Features],
    rows: np.ndarray,
    kinds: Mapping[str, tuple[str, ...]],
    rates: Sequence[float],
    settings: _Settings,
) -> dict[str, _Heads]:
    """Heads of each kind, trained on the same batches of the given rows."""
    labels = torch.from_numpy(next(iter(features.values())).labels)
    heads = {kind: _new_heads(features, rows, kind, pieces, rates, settings) for kind, pieces in kinds.items()}
    speeds = {kind: (torch.zeros_like(own.weight), torch.zeros_like(own.bias)) for kind, own in heads.items()}
    total = len(rows) // settings.batch * _epochs(len(rows), settings)
    for step, chosen in enumerate(_batches(rows, settings)):
        truth = F.one_hot(labels[chosen], settings.classes)[:, None].to(settings.device)
        decay = settings.batch / 256 * (1 + math.cos(math.pi * step / total)) / 2
        for kind, own in heads.items():
            inputs = own.inputs(features, chosen)
            # Derivative of each head's mean cross entropy by its logits; heads share nothing but their inputs.
            error = (own.logits(inputs).softmax(dim=2) - truth) / settings.batch
            gradients = (inputs.T @ error.flatten(1)).view_as(own.weight), error.sum(dim=0)
            for parameter, speed, gradient in zip((own.weight, own.bias), speeds[kind], gradients):
                parameter -= speed.mul_(MOMENTUM).add_(gradient) * (decay * own.rates)
    return heads


def _batches(rows: np.ndarray, settings: _Settings) -> Iterator[np.ndarray]:
    """Rows of every step; what does not fill a batch is left out, in each epoch something else."""
    for epoch in range(_epochs(len(rows), settings)):
        order = _generator(settings.seed, _ORDER, epoch).permutation(rows)
        for start in range(0, len(rows) - settings.batch + 1, settings.batch):
            yield order[start : start + settings.batch]


def _epochs(images: int, settings: _Settings) -> int:
    return max(settings.epochs, math.ceil(settings.least_steps / (images // settings.batch)))


def _new_heads(
    features: Mapping[str, Features],
    rows: np.ndarray,
    kind: str,
    pieces: tuple[str, ...],
    rates: Sequence[float],
    settings: _Settings,
) -> _Heads:
    """Untrained heads; those of a kind start from the same weights, whatever other kinds and rates there are."""
    width = sum(features[piece].features.shape[1] for piece in pieces)
    draws = _generator(settings.seed, _WEIGHTS, zlib.crc32(kind.encode()))
    weight = 0.01 * torch.from_numpy(draws.standard_normal((width, 1, settings.classes), np.float32))
    heads = _Heads(
        pieces,
        rates=torch.tensor(rates, dtype=torch.float32, device=settings.device)[:, None],
        weight=weight.repeat(1, len(rates), 1).to(settings.device),
        bias=torch.zeros(len(rates), settings.classes, device=settings.device),
    )
    if settings.standardise:
        heads.mean, heads.deviation = _moments(heads, features, rows)
    return heads


def _moments(heads: _Heads, features: Mapping[str, Features], rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D] of the given rows; a constant feature gets 1, which leaves it at 0."""
    chunks = np.array_split(rows, math.ceil(len(rows) / 8192))
    mean = torch.stack([heads.inputs(features, chunk).cpu().double().sum(dim=0) for chunk in chunks]).sum(0) / len(rows)
    squares = [(heads.inputs(features, chunk).cpu().double() - mean).square().sum(dim=0) for chunk in chunks]
    deviation = (torch.stack(squares).sum(dim=0) / len(rows)).sqrt()
    deviation[deviation < 1e-6 * (1 + mean.abs())] = 1.0
    return mean.float().to(heads.bias.device), deviation.float().to(heads.bias.device)


def _score(heads: _Heads, features: Mapping[str, Features], rows: np.ndarray) -> list[tuple[float, float]]:
    """(accuracy, mean cross entropy) of each head on the given rows; a diverged head has (0, infinity)."""
    labels = torch.from_numpy(next(iter(features.values())).labels)
    hits, loss = (torch.zeros(len(heads.bias), dtype=torch.float64) for _ in range(2))
    for chunk in np.array_split(rows, math.ceil(len(rows) / 1024)):
        logits, truth = heads.logits(heads.inputs(features, chunk)).cpu(), labels[chunk][:, None]
        hits += (logits.argmax(dim=2) == truth).sum(dim=0)
        known = truth.clamp(max=logits.shape[2] - 1)  # a class that was not trained on: wrong, and its loss unused
        loss -= (
            logits.double().log_softmax(dim=2).gather(2, known[..., None].expand(-1, logits.shape[1], 1)).sum((0, 2))
        )
    sound = (heads.weight.isfinite().all(dim=2).all(dim=0) & heads.bias.isfinite().all(dim=1)).tolist()
    means = zip(sound, (hits / len(rows)).tolist(), (loss / len(rows)).tolist())
    return [(accuracy, mean) if finite else (0.0, math.inf) for finite, accuracy, mean in means]


def _generator(seed: int, purpose: int, part: int = 0) -> np.random.Generator:
    """Draws that depend on who draws and for what; `part` below 2^32."""
    return np.random.Generator(np.random.Philox(key=[seed, (purpose << 32) | part]))
