"""What the sampler asks of a worker: one sample, described completely."""

from __future__ import annotations

from typing import NamedTuple


class SampleRequest(NamedTuple):
    """One sample to produce.

    A worker turns a request into pixels without any state of its own, so that what it produces depends neither on
    the number of workers or ranks nor on how often the run was interrupted.

    Attributes:
        image: which image of the source.
        size: (height, width) in px that the current stage feeds to the model.
        magnitude: augmentation magnitude m of the current step (EfficientTrain++ section 4.3; 0 for MAE).
        seed: 63-bit seed, a function of the run's seed and the sample's global position.
    """

    image: int
    size: tuple[int, int]
    magnitude: float
    seed: int
