"""What the sampler asks of a worker: samples, described completely."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt


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


class SampleRequests(Sequence[SampleRequest]):
    """Requests of one size and magnitude, kept as two arrays: for small images a tuple each takes longer to make and
    to hand to a worker than the sample itself.

    Attributes:
        images, seeds: int64 [N].
        size, magnitude: of all of them.
    """

    def __init__(
        self, images: npt.NDArray[np.int64], size: tuple[int, int], magnitude: float, seeds: npt.NDArray[np.int64]
    ) -> None:
        self.images, self.size, self.magnitude, self.seeds = images, size, magnitude, seeds

    @classmethod
    def of(cls, requests: Sequence[SampleRequest]) -> SampleRequests:
        """The same as arrays; all of them have the size and the magnitude of the first."""
        if isinstance(requests, SampleRequests):
            return requests
        images, _, _, seeds = zip(*requests)
        return cls(np.array(images), requests[0].size, requests[0].magnitude, np.array(seeds))

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[SampleRequest]:
        for image, seed in zip(self.images.tolist(), self.seeds.tolist()):
            yield SampleRequest(image, self.size, self.magnitude, seed)

    @overload
    def __getitem__(self, i: int) -> SampleRequest: ...

    @overload
    def __getitem__(self, i: slice) -> SampleRequests: ...

    def __getitem__(self, i: int | slice) -> SampleRequest | SampleRequests:
        if isinstance(i, slice):
            return SampleRequests(self.images[i], self.size, self.magnitude, self.seeds[i])
        return SampleRequest(int(self.images[i]), self.size, self.magnitude, int(self.seeds[i]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)
