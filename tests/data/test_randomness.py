from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mae_et.data.randomness import (
    CROP_STREAM,
    _stream_key,
    mix64,
    sample_seed,
    sample_seeds,
    uniform_stream,
    uniform_table,
    uniforms,
)


def test_the_stream_is_splitmix64():
    # The first outputs of SplitMix64 from state 1234567, as published with many implementations of it.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    drawn = uniforms(1234567 ^ _stream_key(3), 4, stream=3)
    assert drawn == [(value >> 11) / 2**53 for value in published]


def test_mix64_is_a_bijection_on_a_sample():
    values = [mix64(i) for i in range(20_000)]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 2**64 for value in values)


def test_sample_seeds_fit_int64_and_do_not_repeat_over_runs_and_positions():
    seeds = {sample_seed(run, position) for run in range(50) for position in range(1000)}
    assert len(seeds) == 50_000
    assert max(seeds) < 2**63
    assert min(seeds) >= 0


def test_seeds_of_neighbouring_positions_differ_in_half_their_bits():
    flips = [bin(sample_seed(7, i) ^ sample_seed(7, i + 1)).count("1") for i in range(4000)]
    # 63 fair coins: mean 31.5, standard error sqrt(63)/2/sqrt(4000) = 0.063; 5 of those.
    assert np.mean(flips) == pytest.approx(31.5, abs=0.32)


@pytest.mark.parametrize("stream", [0, CROP_STREAM, 17])
def test_first_draws_over_samples_are_uniform(stream):
    for draw in range(3):
        values = [uniforms(sample_seed(0, i), 3, stream)[draw] for i in range(5000)]
        assert 0 <= min(values) <= max(values) < 1
        # Fixed seeds: the p-value is a constant, and below 1e-3 it would mean a bad generator.
        assert stats.kstest(values, "uniform").pvalue > 1e-3


def test_streams_and_draws_are_uncorrelated():
    drawn = np.array([uniforms(seed, 2, 0) + uniforms(seed, 2, 1) for seed in range(10_000)])
    correlation = np.corrcoef(drawn.T) - np.eye(4)
    # Standard error of a correlation of 10,000 pairs: 0.01.
    assert np.abs(correlation).max() < 0.045


def test_uniforms_are_the_head_of_the_stream():
    stream = uniform_stream(42, 5)
    assert uniforms(42, 6, 5) == [next(stream) for _ in range(6)]
    assert uniforms(42, 6, 5) != uniforms(42, 6, 4)


@pytest.mark.parametrize("run_seed", [0, 1, 2**32, 2**63, 2**64 - 1])
@pytest.mark.parametrize("first", [0, 1, 10**6, 2**53 + 1])
def test_the_seeds_of_a_batch_are_those_of_its_samples(run_seed, first):
    seeds = sample_seeds(run_seed, first, 50)
    assert seeds.dtype == np.int64
    assert seeds.tolist() == [sample_seed(run_seed, position) for position in range(first, first + 50)]


@pytest.mark.parametrize("stream", [0, CROP_STREAM, 17])
def test_the_numbers_of_a_batch_are_those_of_its_samples(stream):
    seeds = np.array([0, 1, 2**63 - 1, *sample_seeds(3, 0, 100)])
    table = uniform_table(seeds, 9, stream)
    assert table.tolist() == [uniforms(seed, 9, stream) for seed in seeds.tolist()]
