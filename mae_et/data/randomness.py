"""Random numbers as a function of a seed and a counter: no generator object, no state, the same on every machine.

SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) on Python integers.
A sample needs about six numbers: 2 us, less than a `torch.Generator` seeded anew takes, and no library's version can
change them. `sample_seeds` and `uniform_table` give the same numbers for the samples of a batch at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import islice

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: the counter's increment in SplitMix64

# One number for each consumer of a sample's seed: two consumers with the same number would see the same randomness.
CROP_STREAM = 1
REPLACEMENT_STREAM = 2
AUGMENT_STREAM = 3
ERASE_STREAM = 4
REPLAY_STREAM = 5
JITTER_STREAM = 6
SCENE_STREAM = 7
PHOTOMETRIC_STREAM = 8


def mix64(value: int) -> int:
    """Scramble a 64-bit integer (SplitMix64's finaliser, a bijection: every input bit moves half the output bits)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def sample_seed(run_seed: int, position: int) -> int:
    """Return the 63-bit seed of the sample at a global position of a run.

    Args:
        run_seed: the run's seed, any non-negative integer below 2^64.
        position: how many samples of the run come before this one, over all ranks.
    """
    state = mix64((run_seed + _GAMMA) & _MASK)
    return mix64((state + (position + 1) * _GAMMA) & _MASK) >> 1


def sample_seeds(run_seed: int, first: int, count: int) -> npt.NDArray[np.int64]:
    """Return `sample_seed` of so many positions from `first` on: [count]."""
    state = mix64((run_seed + _GAMMA) & _MASK)
    positions = np.arange(first + 1, first + count + 1, dtype=np.uint64)
    return (_mix64_in_place(np.uint64(state) + positions * np.uint64(_GAMMA)) >> np.uint64(1)).astype(np.int64)


@lru_cache(maxsize=64)
def _stream_key(stream: int) -> int:
    return mix64(((stream + 1) * _GAMMA) & _MASK)


def uniform_stream(seed: int, stream: int = 0) -> Iterator[float]:
    """Yield floats in [0, 1), multiples of 2^-53, without end.

    Args:
        seed: a sample's seed, see `sample_seed`.
        stream: which consumer draws; streams of one seed are independent of each other.
    """
    state = (seed ^ _stream_key(stream)) & _MASK
    while True:
        state = (state + _GAMMA) & _MASK
        value = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        yield ((value ^ (value >> 31)) >> 11) * 2.0**-53


def uniforms(seed: int, n: int, stream: int = 0) -> list[float]:
    """Return the first `n` numbers of `uniform_stream(seed, stream)`."""
    return list(islice(uniform_stream(seed, stream), n))


def uniform_table(seeds: npt.NDArray[np.int64], n: int, stream: int = 0) -> npt.NDArray[np.float64]:
    """Return `uniforms(seed, n, stream)` of each seed: [N, n]."""
    keys = seeds.astype(np.uint64) ^ np.uint64(_stream_key(stream))
    values = _mix64_in_place(keys[:, None] + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GAMMA))
    return (values >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix64_in_place(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """`mix64` of each; NumPy's arrays wrap around as 64-bit words do."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values
