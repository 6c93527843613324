"""Parts of a source: a held-out share of train, n images a class; and whether labels are fit to train on."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from mae_et.data.files import listed
from mae_et.data.loader import InMemory
from mae_et.data.scaled import EncodedSource
from mae_et.data.sources import Source

# Second words of Philox keys, the first being the seed. As text they are far above every counter used elsewhere.
_HOLD_OUT = int.from_bytes(b"hold out", "big")
_FEW_SHOT = int.from_bytes(b"few shot", "big")


class Images(Protocol):
    """What all kinds of sets have; see `mae_et.data.sources.Source`."""

    name: str
    channels: int
    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def image(self, i: int) -> torch.Tensor: ...

    def describe(self, i: int) -> str: ...


S = TypeVar("S", bound=Images)


class Chosen(Generic[S]):
    """Chosen images of a set of any kind, numbered anew, with the set's classes.

    Args:
        source: where the images are.
        indices: their numbers there, in the order that they get here.
        name: what it is called in messages and logs; the source's name by default.
    """

    def __init__(self, source: S, indices: np.ndarray, name: str | None = None) -> None:
        self.source = source
        self.indices = np.array(indices, np.int64)
        self.name = source.name if name is None else name
        self.channels = source.channels
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, i: int) -> torch.Tensor:
        """Return image `i`, uint8 [channels, H, W]; raise ImageError if it cannot be used."""
        return self.source.image(self._index(i))

    def describe(self, i: int) -> str:
        """Return what the source says of image `i`: its path, or the number that it has there."""
        return self.source.describe(self._index(i))

    def _index(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        return int(self.indices[i])


class Subset(Chosen[Source]):
    """Chosen images of a labelled source."""

    def __init__(self, source: Source, indices: np.ndarray, name: str | None = None) -> None:
        super().__init__(source, indices, name)
        self.labels = source.labels[self.indices]

    def label(self, i: int) -> int:
        """Return the class number of image `i`, -1 for none."""
        return self.source.label(self._index(i))


class InMemorySubset(Subset):
    """Chosen images of a source in memory; many are taken at once."""

    source: InMemory

    def take(self, indices: np.ndarray) -> torch.Tensor:
        """Return many images at once, uint8 [N, channels, H, W]."""
        return self.source.take(self.indices[indices])


class EncodedSubset(Subset):
    """Chosen images of a source of image files; their crops can be decoded alone."""

    source: EncodedSource

    def __init__(self, source: EncodedSource, indices: np.ndarray, name: str | None = None) -> None:
        super().__init__(source, indices, name)
        self.max_pixels = source.max_pixels

    def read(self, i: int) -> bytes:
        """Return the bytes of image `i`; raise ImageError if it cannot be read."""
        return self.source.read(self._index(i))


def choose(source: Source, indices: np.ndarray, name: str | None = None) -> Subset:
    """Return chosen images of a source, read in the fast ways that it has; arguments as of `Chosen`."""
    if isinstance(source, InMemory):
        return InMemorySubset(source, indices, name)
    if isinstance(source, EncodedSource):
        return EncodedSubset(source, indices, name)
    return Subset(source, indices, name)


def draw_held_out(source: Images, share: float, seed: int, purpose: int) -> np.ndarray:
    """Choose a share of images to hold out, whatever is on them: bool [N].

    The share is rounded to the nearest number of images, at least one and never all. What is drawn depends on the
    number of images, the share, the seed and the purpose, on nothing else; a larger share holds out the same images
    and more.

    Args:
        source: of two images or more.
        share: between 0 and 1.
        seed: a non-negative integer below 2^64.
        purpose: second word of the Philox key, the first being the seed.

    Raises:
        ValueError: the share is not between 0 and 1, or there are fewer than two images.
    """
    if not 0 < share < 1:
        raise ValueError(f"held-out share {share} is not between 0 and 1; 0.1 holds out one image in ten")
    count = len(source)
    if count < 2:
        raise ValueError(f"{source.name} has one image, nothing to hold out; give it a validation split")
    # The raw bits of Philox, which NumPy promises to keep (NEP 19), unlike its permutations.
    bits = np.random.Philox(key=np.array([seed, purpose], np.uint64)).random_raw(count)
    held = np.zeros(count, bool)
    held[np.argsort(bits, kind="stable")[: min(max(int(count * share + 0.5), 1), count - 1)]] = True
    return held


def hold_out(source: Source, share: float, seed: int) -> tuple[Subset, Subset]:
    """Split a train set into (kept, held out), for choosing what test data must not choose.

    Of each class the share is held out, rounded to the nearest number of images, but at least one image and never
    all: a class with a single image keeps it. Both parts are in the source's order. What is drawn depends on the
    labels, the share and the seed, on nothing else; a larger share holds out the same images and more.

    Args:
        source: images that all have labels.
        share: the fraction to hold out, between 0 and 1.
        seed: chooses the images, a non-negative integer below 2^64.

    Raises:
        ValueError: if share is not between 0 and 1, an image has no usable label, or no class has two images.
    """
    if not 0 < share < 1:
        raise ValueError(f"held-out share {share} is not between 0 and 1; 0.1 holds out one image in ten")
    check_labels(source, every_class=False)
    counts = np.bincount(source.labels, minlength=len(source.classes))
    given = np.minimum(np.maximum(np.floor(counts * share + 0.5), 1), counts - 1)
    held = _ranks(source.labels, seed, _HOLD_OUT) < given[source.labels]
    if not held.any():
        raise ValueError(f"{source.name} has one image a class, nothing to hold out; give it a validation split")
    return (
        choose(source, np.flatnonzero(~held), f"{source.name}, {1 - share:.3g} kept"),
        choose(source, np.flatnonzero(held), f"{source.name}, {share:.3g} held out"),
    )


def few_shot(source: Source, shots: int, seed: int) -> Subset:
    """Choose exactly `shots` images of each class, in the source's order.

    What is drawn depends on the labels and the seed, on nothing else. The images for one number of shots are among
    those for a larger one with the same seed.

    Raises:
        ValueError: if shots is below 1, an image has no usable label, or a class has fewer images, naming it.
    """
    if shots < 1:
        raise ValueError(f"{shots} images a class leave nothing to train on; take 1 or more")
    check_labels(source, every_class=False)
    counts = np.bincount(source.labels, minlength=len(source.classes))
    short = [source.classes[number] for number in np.flatnonzero(counts < shots)]
    if short:
        raise ValueError(
            f"{source.name} has fewer than {shots} images of {listed(short)} (the fewest: {counts.min()}); take fewer "
            f"shots or leave those classes out"
        )
    chosen = _ranks(source.labels, seed, _FEW_SHOT) < shots
    return choose(source, np.flatnonzero(chosen), f"{source.name}, {shots} a class")


def _ranks(labels: np.ndarray, seed: int, purpose: int) -> np.ndarray:
    """Return each image's place, from 0, among those of its label in random order; int64 [N].

    The raw bits of Philox are used: NumPy promises to keep them (NEP 19), unlike its permutations.
    """
    bits = np.random.Philox(key=np.array([seed, purpose], np.uint64)).random_raw(len(labels))
    order = np.lexsort((bits, labels))  # by label, then at random
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - np.repeat(starts, counts)
    return ranks


def check_labels(source: Source, every_class: bool = True) -> None:
    """Refuse a source whose labels cannot be trained or tested on.

    Args:
        source: the images; none is opened.
        every_class: also refuse a class without images; test data may lack one.

    Raises:
        ValueError: naming the image without a label or with one out of range, or the class without images.
    """
    classes = len(source.classes)
    if not classes:
        raise ValueError(
            f"{source.name} has no labels; put every image into a folder named after its class, one level deep, or "
            f"write labels into the list (data.source=list)"
        )
    wrong = np.flatnonzero((source.labels < 0) | (source.labels >= classes))
    if len(wrong):
        first = int(wrong[0])
        label = source.label(first)
        fault = "has no label" if label == -1 else f"has label {label}, out of the range 0 to {classes - 1}"
        raise ValueError(
            f"{source.describe(first)} {fault} ({len(wrong)} of the {len(source)} images of {source.name} are such); "
            f"label it with one of the {classes} classes, or remove it"
        )
    empty = np.setdiff1d(np.arange(classes), source.labels) if every_class else ()
    if len(empty):
        raise ValueError(
            f"{source.name} has no images of {listed([source.classes[number] for number in empty])}, of its {classes} "
            f"classes; add images or remove the class from every split"
        )


def check_same_classes(train: Source, other: Source) -> None:
    """Refuse two splits whose class numbers do not mean the same.

    Raises:
        ValueError: naming up to three classes that only one of them has.
    """
    if train.classes == other.classes:
        return
    known, found = set(train.classes), set(other.classes)
    gone = [name for name in train.classes if name not in found]
    new = [name for name in other.classes if name not in known]
    faults = [f"{other.name} lacks {listed(gone)}"] * bool(gone) + [f"{train.name} lacks {listed(new)}"] * bool(new)
    raise ValueError(
        f"the classes of {train.name} and {other.name} differ: "
        f"{'; '.join(faults) or 'the same names have other numbers'}; give both the same classes, such as the same "
        f"class folders in one root's train/ and val/"
    )
