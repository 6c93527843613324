"""Images of a search: those that train, those that a score's classifier learns from, and those held out for scores."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mae_et.config import ConfigError, FinetuneConfig, PretrainConfig, SearchConfig
from mae_et.data.sources import Source
from mae_et.data.splits import check_labels, choose, hold_out
from mae_et.evaluation.features import subset_indices
from mae_et.labelled import LabelledImages, open_labelled
from mae_et.pretraining import build_source
from mae_et.supervised import settle_start


@dataclass(frozen=True)
class SearchImages:
    """Images by what they are for; no test image is among them.

    Attributes:
        train: what trainings learn from.
        fit: labelled images that a classifier on features learns from; they do not score.
        held: what scores.
    """

    train: Source
    fit: Source
    held: Source

    def labelled(self) -> LabelledImages:
        """For training on labels; nothing is there to test on."""
        return LabelledImages(self.train, self.held, None)

    def describe(self) -> str:
        """One line for people."""
        return f"{self.train.name}: {len(self.train):,} images train, {len(self.held):,} held-out ones score"


def open_images_of(search: SearchConfig, recipe: PretrainConfig | FinetuneConfig) -> SearchImages:
    """Open train and hold a share of it out; where a set has "val" besides "test", that scores training on labels.

    Raises:
        ConfigError: there are no such images, or no labels where the score needs some.
    """
    if isinstance(recipe, FinetuneConfig):
        channels = settle_start(recipe).backbone.channels
        images = open_labelled(replace(recipe.data, holdout=search.holdout), channels)
        assert images.val is not None
        return SearchImages(drawn(images.train, search), images.train, images.val)
    evaluation, data = recipe.evaluation, recipe.data
    source = build_source(recipe)
    try:
        if search.score == "loss":
            kept, held = hold_out_any(source, search.holdout, search.seed)
            return SearchImages(drawn(kept, search), kept, held)
        if (evaluation.source or data.source, evaluation.root or data.root) == (data.source, data.root):
            # The trainings have seen no image that scores, not even without its label.
            kept, held = hold_out(source, search.holdout, search.seed)
            return SearchImages(drawn(kept, search), kept, held)
        other = build_source(recipe, evaluation.train_split, evaluation=True)
        return SearchImages(drawn(source, search), *hold_out(other, search.holdout, search.seed))
    except ValueError as error:
        raise ConfigError(
            f"score={search.score} needs labels: {error}; or set score=loss objective=loss_time, which needs none"
        ) from None


def drawn(source: Source, search: SearchConfig) -> Source:
    """`search.images` of a source, or all."""
    if search.images is None or search.images >= len(source):
        return source
    indices = subset_indices(len(source), search.images, search.seed)
    return choose(source, np.array(indices), f"{source.name}, {len(indices):,} drawn")


def hold_out_any(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """(kept, held out) of images with labels or without: of each class the share, or of all."""
    try:
        check_labels(source, every_class=False)
    except ValueError:
        count = min(max(1, round(share * len(source))), len(source) - 1)
        held = np.array(subset_indices(len(source), count, seed))
        kept = np.setdiff1d(np.arange(len(source)), held)
        names = (f"{source.name}, {1 - share:.3g} kept", f"{source.name}, {share:.3g} held out")
        return choose(source, kept, names[0]), choose(source, held, names[1])
    return hold_out(source, share, seed)
