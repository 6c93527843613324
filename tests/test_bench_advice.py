"""From measurements to settings: pure functions over cases whose answer is plain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from mae_et.bench.advice import (
    advise,
    advise_accumulation,
    advise_batch,
    advise_compile,
    advise_threads,
    advise_workers,
    bind,
)
from mae_et.bench.report import CompileTrial, DataPath, MicroBatch, Setting, StageReport

GPU = Setting(
    workers=4,
    accumulation=2,
    batch=64,
    downsample="lanczos",
    replay=0,
    most_replay=3,
    compiles=True,
    threads=4,
    cores=8,
    on_cpu=False,
    processes=1,
)


def micro(images: int, accumulation: int | None, rate: float | None) -> MicroBatch:
    """A micro-batch by its rate; None does not fit."""
    seconds = None if rate is None else images / rate
    return MicroBatch(images, accumulation, seconds, rate, rate, rate, 1)


def stage(rates: Mapping[Any, float | None], size: int = 96, share: float = 0.5, **changes) -> StageReport:
    """A stage of batch 64 by the rates of its accumulations, None being twice the batch; of them 2 is chosen."""
    sizes = sorted((128 if count is None else 64 // count, count, rate) for count, rate in rates.items())
    micros = tuple(micro(*values) for values in sizes)
    chosen = next((place for place, found in enumerate(micros) if found.accumulation == 2), 0)
    given = StageReport((size, size), 9, False, 64, 1000, share, 1.0, (3, size, size), micros, chosen)
    return replace(given, **changes)


FLAT = {4: 100.0, 2: 101.0, 1: 102.0}


@pytest.mark.parametrize(
    ("first", "last", "wanted"),
    [
        (FLAT, FLAT, None),  # nothing to gain
        ({4: 60, 2: 80, 1: 100}, {4: 60, 2: 80, 1: 100}, "1"),
        ({4: 100, 2: 80, 1: 60}, {4: 100, 2: 80, 1: 60}, "4"),  # e.g. out of a CPU's cache
        ({4: 60, 2: 80, 1: 100}, {4: 60, 2: 80, 1: None}, None),  # the best at one stage does not fit at the other
        ({4: 60, 2: 80, 1: 100}, {4: 60, 2: None}, "4"),  # the configured one does not fit
        ({4: 60, 2: 80, 1: 100}, {4: 60}, None),  # it took too long: nothing is known
        ({4: 60}, {2: 60}, None),
    ],
)
def test_accumulation(first, last, wanted):
    found = advise_accumulation([stage(first), stage(last, 224)], GPU)
    assert found.overrides == ({} if wanted is None else {"optim.accumulation": wanted})
    assert not found.options


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ({4: 60, 2: None}, "the 32 images of accumulation=2 do not fit at B=96"),
        ({2: None}, "memory does not suffice at B=96; lower optim.batch"),
        ({4: 60}, "took too long to measure"),
        ({4: 60, 2: 80, 1: 100}, "optim.accumulation=1: 1.25x as fast as accumulation=2"),
    ],
)
def test_accumulation_says_why(rates, said):
    assert said in advise_accumulation([stage(rates)], GPU).notes[0]


def test_stages_weigh_by_their_images():
    """Twice as fast on nine tenths of the images beats half as fast on the rest, and the other way round."""
    rates = {2: 100.0, 1: 200.0}, {2: 100.0, 1: 50.0}
    for shares, wanted in (((0.9, 0.1), {"optim.accumulation": "1"}), ((0.1, 0.9), {})):
        stages = [stage(found, share=share) for found, share in zip(rates, shares)]
        assert advise_accumulation(stages, GPU).overrides == wanted


@pytest.mark.parametrize(("larger", "said"), [(105.0, False), (130.0, True), (None, False)])
def test_larger_batches_get_a_word(larger, said):
    found = advise_batch([stage({**FLAT, None: larger})], GPU)
    assert not found.overrides
    assert not found.options
    assert [("128" in note, "changes what is learned" in note) for note in found.notes] == [(True, True)] * said


def fed(worker: float, rate: float = 100.0, together: tuple[int, float] | None = None, **changes) -> StageReport:
    """A stage whose step takes `rate` images a second, and one worker's images."""
    return stage({2: rate}, data=DataPath(worker, *(together or (None, None))), **changes)


@pytest.mark.parametrize(
    ("worker", "workers", "replay", "what", "factor"),
    [
        (50, 4, 0, "step", 2.0),
        (50, 1, 0, "data", 2.0),
        (50, 0, 0, "data", 2.0),  # the process itself reads
        (50, 1, 3, "step", 2.0),  # each image is trained on four times
        (25, 4, 0, "step", 1.0),
    ],
)
def test_what_binds(worker, workers, replay, what, factor):
    found = bind(fed(worker), replace(GPU, workers=workers, replay=replay))
    assert (found.what, found.factor) == (what, pytest.approx(factor))
    assert found.device_bytes_per_second == pytest.approx(100 * 3 * 96 * 96)


@pytest.mark.parametrize(
    ("stages", "setting", "overrides", "options"),
    [
        # The most demanding stage counts, with a quarter more than it asks for: ceil(1.25 * 100 / 20) = 7 of 8 cores.
        ([fed(20), fed(80)], GPU, {"data.workers": "7"}, {}),
        ([fed(50), fed(80)], GPU, {}, {}),  # 4 as configured suffice for the 3 that it takes
        ([fed(50)], replace(GPU, workers=15), {"data.workers": "3"}, {}),  # more than cores
        # Too few cores: another resize, and replay. 7 workers deliver 70 of 100.
        ([fed(10)], GPU, {"data.workers": "7"}, {"data.downsample": "resize", "replay.ratio": "1"}),
        ([fed(10)], replace(GPU, downsample="resize"), {"data.workers": "7"}, {"replay.ratio": "1"}),
        # 70 at the first stage, 35 at the second: each needs a number of its own.
        ([fed(10), fed(5)], GPU, {"data.workers": "7"}, {"data.downsample": "resize", "replay.ratio": "auto"}),
        ([fed(0.1)], GPU, {"data.workers": "7"}, {"data.downsample": "resize", "replay.ratio": "3"}),  # at most 3
        # Side by side each is half as fast: ceil(1.25 * 100 / 25) = 5.
        ([fed(50, together=(4, 100.0))], GPU, {"data.workers": "5"}, {}),
        # On a CPU a worker takes a core from the step.
        ([fed(2000)], replace(GPU, on_cpu=True, workers=1, cores=2), {}, {}),
        ([fed(2000)], replace(GPU, on_cpu=True, workers=0, cores=2), {"data.workers": "1"}, {}),
        # Already replayed four times: 50 images a second are enough.
        ([fed(50)], replace(GPU, replay=3, workers=1), {}, {}),
    ],
)
def test_workers(stages, setting, overrides, options):
    found = advise_workers(stages, setting)
    assert (found.overrides, found.options) == (overrides, options)
    assert any("mae_et pack" in note for note in found.notes) == bool(options)


def compiled(ratio: float, seconds: float = 100.0) -> CompileTrial:
    return CompileTrial(32, 0.32, 0.32 * ratio, seconds)


@pytest.mark.parametrize(
    ("ratios", "steps", "compiles", "wanted", "said"),
    [
        # Plain steps of 64 images at 100 / s take 0.64 s; 0.16 s are saved of each, 200 s are spent.
        ((0.75, 0.75), 2000, False, "always", "pays after 1,250 steps; the plan has 4,000"),
        ((0.75, 0.75), 300, False, None, "pays after 1,250 steps; the plan has 600"),
        ((0.75, 0.75), 300, True, "never", "pays after 1,250 steps; the plan has 600"),
        ((0.99, 0.98), 10**9, False, None, "engine.compile=never"),  # within what measurements err
        ((1.2, 1.1), 10**9, True, "never", "0.83x, 0.91x"),
        ((0.75, 0.75), None, False, None, "pays after 1,250 steps"),
    ],
)
def test_compile(ratios, steps, compiles, wanted, said):
    # What is configured is what the rates were measured with.
    stages = [
        stage({2: 100.0 / ratio if compiles else 100.0}, steps=steps, compile=compiled(ratio)) for ratio in ratios
    ]
    found = advise_compile(stages, replace(GPU, compiles=compiles))
    assert found.overrides == ({} if wanted is None else {"engine.compile": wanted})
    assert said in found.notes[0]


def test_stages_between_take_the_mean_of_the_compiled_ones():
    ends = [stage({2: 100.0}, compile=compiled(ratio)) for ratio in (0.5, 0.5)]
    found = advise_compile([ends[0], stage({2: 100.0}), ends[1]], replace(GPU, compiles=False))
    assert "pays after 625 steps; the plan has 3,000" in found.notes[0]  # 200 s / (0.5 * 0.64 s)


@pytest.mark.parametrize(
    ("threads", "own", "wanted"),
    [
        ({1: 100.0, 2: 190.0, 4: 300.0}, 1, "4"),
        ({1: 100.0, 2: 190.0, 4: 192.0}, 4, "2"),
        ({1: 100.0, 2: 101.0}, 1, None),
        ({1: 100.0, 2: 80.0}, 2, "1"),
    ],
)
def test_threads(threads, own, wanted):
    found = advise_threads([stage(FLAT, threads=threads)], replace(GPU, threads=own))
    assert found.overrides == ({} if wanted is None else {"engine.threads": wanted})


def test_nothing_is_advised_within_what_repeats_differ_by():
    rates, threads = {4: 60.0, 2: 80.0, 1: 100.0}, {1: 100.0, 4: 120.0}
    given = [stage({**rates, None: 125.0}, compile=compiled(0.8), steps=10**9, threads=threads)]
    for noise, keys in ((0.0, {"optim.accumulation", "engine.compile", "engine.threads"}), (0.3, set())):
        setting = replace(GPU, compiles=False, threads=1, noise=noise)
        found = advise(given, setting)
        assert set(found.overrides) == keys
        assert any("batch of 128" in note for note in found.notes) == (not noise)


def test_what_was_not_measured_is_not_advised():
    found = advise([stage(FLAT)], GPU)
    assert (found.overrides, found.options) == ({}, {})
    everything = stage({4: 100.0, 2: 60.0}, data=DataPath(10.0), compile=compiled(1.5), threads={1: 50.0, 4: 90.0})
    assert set(advise([everything], replace(GPU, threads=1)).overrides) == {
        *("optim.accumulation", "data.workers", "engine.compile", "engine.threads")
    }
