"""Reading samples, and what is shown in place of one that cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

from mae_et.data.decode import ImageError
from mae_et.data.randomness import REPLACEMENT_STREAM, uniform_stream
from mae_et.data.requests import SampleRequest

T = TypeVar("T")

TRIES = 10  # images in a row; a folder that is gone looks like that, a folder with damaged images in it does not


class BadImage(NamedTuple):
    """An image that could not be read: its index in the source, and what is wrong with it."""

    image: int
    error: str


class Readable(Protocol):
    """A numbered set of anything, with a name for messages."""

    name: str

    def __len__(self) -> int: ...

    def describe(self, i: int) -> str:
        """Return what tells a reader of a message which one it is: its path, or its number."""
        ...


class Reader:
    """Reads what requests ask for.

    Args:
        source: what is read.
        replace: take another sample in place of one that cannot be read. Which one follows from the request's seed, so
            that workers, ranks and interruptions change nothing. Otherwise ImageError is raised.
    """

    def __init__(self, source: Readable, replace: bool):
        self.source, self.replace = source, replace

    def read(self, request: SampleRequest, take: Callable[[int], T], bad: list[BadImage]) -> tuple[T, int]:
        """What `take` makes of the request's image, or of one in its place, and which one it is.

        Args:
            request: its image and its seed are used.
            take: reads the sample of an index; raises ImageError where it cannot.
            bad: gets those that failed.

        Raises:
            ImageError: the image cannot be read; with replacement, so many in a row that more is wrong than an image.
        """
        failed: list[BadImage] = []
        for candidate in self._candidates(request):
            try:
                taken = take(candidate)
            except ImageError as error:
                if not self.replace:
                    raise
                failed.append(BadImage(candidate, str(error)))
            else:
                bad += failed
                return taken, candidate
        raise ImageError(_all_failed(failed, len(self.source), self.source.name))

    def _candidates(self, request: SampleRequest) -> Iterator[int]:
        """The image that is asked for, then others drawn from the request's seed, none of them twice."""
        yield request.image
        count, tried = len(self.source), {request.image}
        draws = uniform_stream(request.seed, REPLACEMENT_STREAM)
        while len(tried) < min(TRIES, count):
            drawn = int(next(draws) * count)
            while drawn in tried:
                drawn = (drawn + 1) % count
            tried.add(drawn)
            yield drawn


def _all_failed(failed: Sequence[BadImage], images: int, name: str) -> str:
    if images == 1:
        return f"the only image of {name} cannot be read: {failed[0].error}; mend it, or check data.root"
    what = f"{len(failed)} images in a row" if images > len(failed) else f"all {images} images"
    return (
        f"{what} of {name} could not be read, the first of them {failed[0].error}; is the disk or the network share "
        "with the images still there? When it is back, the same command continues a run from its last checkpoint"
    )
