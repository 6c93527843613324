"""Masks against splitmix64 on Python integers, and the statistics of which patches stay visible."""

from __future__ import annotations

import math
import random

import pytest
import torch

from mae_et.models.masking import gather_tokens, mask_noise, split_by_noise

SEEDS = [0, 1, 2, 1234567, -1, -2, 2**62 + 12345, 2**63 - 1, -(2**63), -(2**63) + 7]
WORD = (1 << 64) - 1


def splitmix64(seed: int, count: int) -> list[int]:
    """The generator as its authors state it, on unsigned Python integers."""
    state, numbers = seed & WORD, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & WORD
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
        numbers.append(z ^ (z >> 31))
    return numbers


def signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def random_seeds(count: int) -> torch.Tensor:
    generator = random.Random(5)
    return torch.tensor([generator.getrandbits(63) for _ in range(count)])


def test_reference_gives_the_published_numbers():
    # The first outputs for the seed 1234567 that implementations of splitmix64 are checked with.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert splitmix64(1234567, 4) == published


@pytest.mark.parametrize("tokens", [1, 2, 49, 196, 1025])
def test_noise_is_splitmix64(tokens):
    noise = mask_noise(torch.tensor(SEEDS), tokens)
    assert noise.dtype == torch.int64
    assert noise.tolist() == [[signed(number) for number in splitmix64(seed, tokens)] for seed in SEEDS]


def test_noise_of_a_sample_ignores_its_batch():
    seeds = random_seeds(16)
    noise = mask_noise(seeds, 100)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mask_noise(seeds[order], 100), noise[order])
    for i, seed in enumerate(seeds):
        assert torch.equal(mask_noise(seed[None], 100)[0], noise[i])
        strangers = random_seeds(3 + i) ^ 12345
        assert torch.equal(mask_noise(torch.cat([strangers, seed[None], strangers]), 100)[3 + i], noise[i])


def test_every_bit_is_fair():
    noise = mask_noise(torch.arange(1000), 100).flatten()
    ones = torch.stack([(noise >> bit) & 1 for bit in range(64)]).double().mean(dim=1)
    # 64 means of 1e5 coins, sigma 0.5 / sqrt(1e5); 5 sigma is passed by chance once in 1e6 / 64 sets of seeds.
    assert (ones - 0.5).abs().max() <= 5 * 0.5 / math.sqrt(1e5)


def pearson(counts: torch.Tensor, trials: int, share: float) -> float:
    """How uneven counts are, in standard deviations of the chi-square distribution they follow if all is random.

    A sample shows exactly V of L patches, so that the deviations of its L counts add up to 0: with the factor
    (L - 1) / L the sum of squares has L - 1 degrees of freedom, mean L - 1 and variance 2 (L - 1).
    """
    cells = counts.numel()
    squares = (counts.double() - trials * share).square().sum() / (trials * share * (1 - share))
    return float((squares * (cells - 1) / cells - (cells - 1)) / math.sqrt(2 * (cells - 1)))


@pytest.mark.parametrize(("tokens", "visible"), [(36, 9), (100, 25), (196, 49), (37, 9)])
@pytest.mark.parametrize("kind", ["consecutive", "random"])
def test_every_patch_is_visible_as_often_as_any_other(tokens, visible, kind):
    samples = 5000
    # Consecutive seeds are what a weak mixer would fail on.
    seeds = torch.arange(samples) if kind == "consecutive" else random_seeds(samples)
    shown, _ = split_by_noise(mask_noise(seeds, tokens), visible)
    counts = torch.bincount(shown.flatten(), minlength=tokens)
    # Seeds are fixed, so this passes or fails for good; among random seeds 5 sigma up would come once in 1e4 or
    # less (a chi-square's upper tail is heavier than the normal one), and too even a count is as suspect.
    assert -5 < pearson(counts, samples, visible / tokens) < 5


def test_the_statistic_sees_a_small_bias():
    # One patch of 36 that every tenth sample shows for certain.
    noise = mask_noise(torch.arange(5000), 36)
    noise[::10, 0] = -(2**63)
    counts = torch.bincount(split_by_noise(noise, 9)[0].flatten(), minlength=36)
    assert pearson(counts, 5000, 0.25) > 5


def test_masks_of_neighbouring_seeds_share_no_more_than_chance():
    tokens, visible, samples = 196, 49, 4000
    shown, _ = split_by_noise(mask_noise(torch.arange(samples), tokens), visible)
    mask = torch.zeros(samples, tokens).scatter_(1, shown, 1.0)
    overlap = (mask[:-1] * mask[1:]).sum(dim=1).mean()
    # Hypergeometric: mean V^2 / L, variance V p q (L - V) / (L - 1).
    share = visible / tokens
    sigma = math.sqrt(visible * share * (1 - share) * (tokens - visible) / (tokens - 1) / (samples - 1))
    assert abs(overlap - visible * share) <= 5 * sigma


@pytest.mark.parametrize(("tokens", "visible"), [(36, 9), (35, 8), (7, 1), (7, 6), (4, 4), (4, 0)])
def test_split_counts(tokens, visible):
    noise = mask_noise(torch.tensor(SEEDS), tokens)
    shown, masked = split_by_noise(noise, visible)
    assert shown.shape == (len(SEEDS), visible)
    assert masked.shape == (len(SEEDS), tokens - visible)
    assert shown.dtype == masked.dtype == torch.int64
    together = torch.cat([shown, masked], dim=1)
    assert torch.equal(together.sort(dim=1).values, torch.arange(tokens).expand(len(SEEDS), -1))
    # The lowest stay, each part rises: the two together are all the noise in order.
    assert torch.equal(noise.gather(1, together), noise.sort(dim=1).values)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float32])
def test_ties_go_to_the_earlier_patch(dtype):
    noise = torch.randint(0, 4, (20, 300), generator=torch.Generator().manual_seed(1)).to(dtype)
    shown, masked = split_by_noise(noise, 120)
    for row, ids in zip(noise.tolist(), torch.cat([shown, masked], dim=1).tolist()):
        assert ids == sorted(range(300), key=lambda i: (row[i], i))


@pytest.mark.parametrize("batch", [4, 1])
def test_gather_tokens(batch):
    tokens = torch.arange(batch * 6 * 3, dtype=torch.float32).view(batch, 6, 3)
    ids = torch.tensor([[5, 0], [1, 1], [2, 4], [0, 3]])
    gathered = gather_tokens(tokens, ids)
    expected = [[tokens[n if batch == 4 else 0, i].tolist() for i in row] for n, row in enumerate(ids.tolist())]
    assert gathered.tolist() == expected
