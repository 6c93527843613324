"""Labelled images for a run: which train, which choose, which test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from mae_et.config import ConfigError, LabelledDataConfig
from mae_et.data.sources import Source, available_splits
from mae_et.data.splits import Images, check_labels, check_same_classes, few_shot, hold_out
from mae_et.running import open_images

S = TypeVar("S", bound=Images)


@dataclass(frozen=True)
class AnnotatedImages(Generic[S]):
    """Images by what they are for.

    Attributes:
        train: to learn from.
        val: to choose settings by, and to watch; None where nothing is held out.
        test: for one number at the end; None where the set has no such images.
    """

    train: S
    val: S | None
    test: S | None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, by class number."""
        return self.train.classes

    def describe(self) -> str:
        """One line for people."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        counts = ", ".join(f"{len(source):,} {name}" for name, source in parts.items() if source is not None)
        return f"{self.train.name}: {counts} images of {len(self.classes)} classes"


class LabelledImages(AnnotatedImages[Source]):
    """Labelled images by what they are for."""


def open_labelled(data: LabelledDataConfig, channels: int, training: bool = True) -> LabelledImages:
    """Open the splits.

    Images that choose anything never come from the test split: they are the set's own "val" where it has a "test"
    besides, else a share of each class of train, which then does not train (`data.holdout`). Where a set has but train
    and "val", as ImageNet-1K, "val" is for testing.

    Args:
        data: of the configuration.
        channels: of the network.
        training: whether `data.shots` cuts the training images.

    Raises:
        ConfigError: splits that are not there, images without labels, classes without images, classes that differ
            between splits, or too few images of a class.
    """
    val_split, test_split = choose_splits(data)

    def open_split(split: str) -> Source:
        return open_images("data", data.source, data.root, split, data, channels)

    try:
        train = open_split(data.train_split)
        check_labels(train)
        val = None if val_split is None else open_split(val_split)
        test = None if test_split is None else open_split(test_split)
        for other in (val, test):
            if other is not None:
                check_labels(other, every_class=False)
                check_same_classes(train, other)
        if val is None and data.holdout > 0:
            train, val = hold_out(train, data.holdout, data.subset_seed)
        if training and data.shots is not None:
            train = few_shot(train, data.shots, data.subset_seed)
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"data: {error}") from None
    return LabelledImages(train, val, test)


def choose_splits(data: LabelledDataConfig) -> tuple[str | None, str | None]:
    """(val, test) splits: as configured, else as `open_labelled` says."""
    there = available_splits(data.source, data.root)
    others = [split for split in there if split != data.train_split]
    test = data.test_split or ("test" if "test" in others else "val" if "val" in others else None)
    val = data.val_split or ("val" if "val" in others and test != "val" else None)
    return val, test
