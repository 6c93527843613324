"""Scores of a frozen encoder: kNN and a logistic probe, during pretraining or after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from mae_et.config import EvaluationConfig
from mae_et.curriculum.plan import Plan
from mae_et.data.sources import Source
from mae_et.engine.loop import Observation
from mae_et.engine.precision import Precision
from mae_et.evaluation.features import extract_features, pool, subset_indices
from mae_et.evaluation.knn import knn_accuracy
from mae_et.evaluation.probe import logistic_probe
from mae_et.models.mae import MaskedAutoencoder

Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LabelledSets:
    """Labelled images to learn a score's classifier from, and to test it on."""

    train: Source
    test: Source


def embed_with(model: MaskedAutoencoder, precision: Precision, pooling: str, images: Tensor) -> Tensor:
    """uint8 [N, C, H, W] to pooled features [N, D] of the model's encoder."""
    images = images.to(model.mean.device, non_blocking=True)
    with precision.autocast():
        return pool(model.encoder(model.normalise(images)), pooling)


def embed_pixels(images: Tensor) -> Tensor:
    """uint8 [N, C, H, W] to the pixels themselves, [N, C * H * W] in [0, 1]: what a score is without a model."""
    return images.flatten(1).float() / 255


def score(
    embed: Embed, sets: LabelledSets, config: EvaluationConfig, size: tuple[int, int], workers: int = 0
) -> dict[str, float]:
    """`{"knn20": accuracy, ..., "probe": accuracy}` of an embedding, in [0, 1].

    The probe's strength is chosen on held-out training images; test images are scored once and choose nothing.
    """
    extract = partial(extract_features, embed, size=size, crop_fraction=config.crop_fraction, workers=workers)
    train = extract(sets.train, subset_indices(len(sets.train), config.train_images))
    test = extract(sets.test, subset_indices(len(sets.test), config.test_images))
    scores = {f"knn{k}": accuracy for k, accuracy in knn_accuracy(train, test, config.knn).items()}
    if config.probe:
        scores["probe"] = logistic_probe(train, test).accuracy
    return scores


class ScoreObserver:
    """Scores the encoder whenever another `config.every` of the compute is spent, and at the end."""

    def __init__(
        self,
        model: MaskedAutoencoder,
        precision: Precision,
        sets: LabelledSets,
        config: EvaluationConfig,
        size: tuple[int, int],
        workers: int = 0,
    ):
        self.embed = partial(embed_with, model, precision, config.pooling)
        self.sets, self.config, self.size, self.workers = sets, config, size, workers

    def due(self, plan: Plan, done: int) -> bool:
        """Whether a multiple of `every` lies within the last step."""
        every = self.config.every
        if every is None:
            return False
        before, after = plan.compute_fraction(done - 1), plan.compute_fraction(done)
        return done == plan.total_steps or int(after / every) > int(before / every)

    def observe(self, plan: Plan, done: int) -> Observation:
        """Score at the final size, or at that of the stage just seen."""
        size = plan.at(done - 1).bandwidth if self.config.follow_stage else self.size
        scores = score(self.embed, self.sets, self.config, size, self.workers)
        return Observation(metrics={f"eval/{name}": value for name, value in scores.items()})
