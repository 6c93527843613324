"""Which anchors and proposals count: how many, which, and that only the image's own seed and labels decide."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mae_et.models.sampling import ANCHOR_STREAM, PROPOSAL_STREAM, SeededSampler


def draw(labels, seeds, count=8, share=0.5, stream=ANCHOR_STREAM):
    sampler = SeededSampler(count, share, stream)
    sampler.seeds = torch.tensor(seeds)
    return sampler([torch.as_tensor(of_image) for of_image in labels])


def mix64(value: int) -> int:
    """SplitMix64's finaliser, in Python's integers."""
    mask = (1 << 64) - 1
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & mask
    return value ^ value >> 31


def signed_key(seed: int, position: int) -> int:
    key = mix64((seed + (position + 1) * 0x9E3779B97F4A7C15) % 2**64)
    return key - 2**64 if key >= 2**63 else key


@pytest.mark.parametrize("count", [1, 8, 40, 1000])
@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize(
    ("objects", "background", "neither"), [(0, 30, 4), (3, 30, 0), (30, 3, 9), (30, 0, 2), (0, 0, 5)]
)
def test_takes_the_lowest_keys_of_either_kind(count, share, objects, background, neither):
    labels = torch.tensor([2.0] * objects + [0.0] * background + [-1.0] * neither)
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(count))]
    seed = 2**62 + 999
    (positive,), (negative,) = draw([labels], [seed], count, share)

    order = sorted(range(len(labels)), key=lambda position: signed_key(seed ^ ANCHOR_STREAM, position))
    positives = [position for position in order if labels[position] == 2][: int(count * share)]
    negatives = [position for position in order if labels[position] == 0][: count - len(positives)]
    assert sorted(positives) == torch.where(positive)[0].tolist()
    assert sorted(negatives) == torch.where(negative)[0].tolist()


def test_an_image_has_its_own_draw_in_every_batch():
    generator = torch.Generator().manual_seed(0)
    labels = [torch.randint(-1, 2, (length,), generator=generator) for length in (60, 100, 60, 7)]
    seeds = [11, 12, 13, 2**63 - 1]
    together = draw(labels, seeds)
    for order in ([3, 1, 0, 2], [2], [0, 3]):
        apart = draw([labels[i] for i in order], [seeds[i] for i in order])
        for kind in (0, 1):
            for place, image in enumerate(order):
                torch.testing.assert_close(apart[kind][place], together[kind][image])


def test_every_one_is_as_likely_and_the_two_samplers_are_independent():
    images, length, count = 800, 12, 6
    labels = [[0] * length] * images
    of_anchors, of_proposals = (
        torch.stack(draw(labels, list(range(images)), count, 0.5, stream)[1]).double().numpy()
        for stream in (ANCHOR_STREAM, PROPOSAL_STREAM)
    )
    # Five deviations of a share of half of them: one in a million leaves them.
    assert np.abs(of_anchors.mean(0) - 0.5).max() < 5 * 0.5 / images**0.5
    together = (of_anchors - 0.5).T @ (of_proposals - 0.5) / images / 0.25
    assert np.abs(together).max() < 5 / images**0.5


def test_torch_generator_is_left_alone():
    before = torch.get_rng_state()
    draw([[0, 1, 1]], [5])
    assert torch.equal(torch.get_rng_state(), before)


def test_training_without_seeds_is_refused():
    with pytest.raises(AssertionError, match="seeds"):
        SeededSampler(4, 0.5, ANCHOR_STREAM)([torch.zeros(3)])
