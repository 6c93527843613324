"""The sampler is a pure function of the position: ranks, micro-batches and restarts change nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mae_et.curriculum import Curriculum
from mae_et.data.randomness import sample_seed
from mae_et.data.sampler import PlanSampler, pass_order


def make_plan(images=50, batch=8, epochs=4.0, drop_last=True):
    curriculum = Curriculum.preset("efficienttrain_pp", 28, 2)
    return curriculum.plan(
        epochs=epochs, images=images, batch=batch, patch_size=2, mask_ratio=0.75, drop_last=drop_last
    )


def test_every_pass_sees_every_image_once_up_to_the_last_batch():
    plan = make_plan()
    samples = [request.image for micro in PlanSampler(plan, seed=1) for request in micro]
    assert len(samples) == plan.total_images
    for start in range(0, len(samples) - plan.epoch_images, plan.epoch_images):
        counts = Counter(samples[start : start + plan.epoch_images])
        assert len(counts) == 48
        assert set(counts.values()) == {1}


def test_without_dropping_passes_run_into_each_other():
    plan = make_plan(drop_last=False)
    samples = [request.image for micro in PlanSampler(plan, seed=1) for request in micro]
    assert sorted(samples[:50]) == list(range(50))
    assert sorted(samples[50:100]) == list(range(50))


def test_passes_are_shuffled_differently_and_by_the_seed():
    plan = make_plan()
    orders = [[r.image for micro in PlanSampler(plan, seed) for r in micro] for seed in (1, 2)]
    assert orders[0][:48] != orders[1][:48]
    assert orders[0][:48] != orders[0][48:96]
    assert orders[0][:48] != sorted(orders[0][:48])


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 2), (2, 1), (2, 2), (4, 2), (8, 1)])
def test_ranks_and_micro_batches_share_the_same_samples(ranks, accumulation):
    plan = make_plan()
    whole = PlanSampler(plan, seed=3)
    shares = [PlanSampler(plan, 3, 0, rank, ranks, accumulation) for rank in range(ranks)]
    for step in range(plan.total_steps):
        parts = [shares[rank].requests(step, micro) for micro in range(accumulation) for rank in range(ranks)]
        assert [request for part in parts for request in part] == whole.requests(step)


def test_a_restart_continues_where_the_run_was():
    plan = make_plan()
    whole = list(PlanSampler(plan, seed=5))
    for first in (0, 1, plan.boundaries[1] - 1, plan.boundaries[1], plan.boundaries[1] + 1, plan.total_steps - 1):
        assert list(PlanSampler(plan, 5, first)) == whole[first:]
        assert len(PlanSampler(plan, 5, first)) == len(whole) - first


def test_requests_carry_the_stage_and_a_seed_of_their_own():
    plan = make_plan()
    sampler = PlanSampler(plan, seed=7)
    requests = [request for micro in sampler for request in micro]
    assert len({request.seed for request in requests}) == len(requests)
    assert all(0 <= request.seed < 2**63 for request in requests)
    for stage, first in zip(plan.stages, plan.boundaries):
        assert {request.size for request in sampler.requests(first)} == {stage.bandwidth}


def test_without_repeats_a_pass_is_a_philox_permutation():
    plan = make_plan()
    samples = [request.image for micro in PlanSampler(plan, seed=9) for request in micro]
    for epoch in range(len(samples) // 48):
        order = np.random.Generator(np.random.Philox(key=[9, epoch])).permutation(50)[:48]
        assert samples[48 * epoch : 48 * (epoch + 1)] == order.tolist()


@pytest.mark.parametrize(("images", "batch"), [(50, 8), (50, 12), (20, 12), (5, 12)])
def test_requests_are_those_of_the_definition(images, batch):
    """One position after the other; small sets are passed through more than once in a batch."""
    sampler = PlanSampler(make_plan(images, batch, epochs=8.0, drop_last=False), seed=4)
    position = 0
    for step, requests in enumerate(sampler):
        now = sampler.plan.at(step)
        for request in requests:
            number, within = divmod(position, images)
            assert request.image == pass_order(images, 4, number)[within]
            assert request.seed == sample_seed(4, position)
            assert (request.size, request.magnitude) == (now.bandwidth, now.magnitude)
            position += 1
    assert position == sampler.plan.total_images


# Repeated augmentation


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("repeats", [2, 4, 8])
def test_views_of_an_image_are_spread_over_the_batch(repeats, drop_last):
    plan = make_plan(drop_last=drop_last)
    sampler = PlanSampler(plan, seed=1, repeats=repeats)
    distinct = 8 // repeats
    for step in range(plan.total_steps):
        requests = sampler.requests(step)
        images = [request.image for request in requests]
        assert images == images[:distinct] * repeats
        assert len({request.seed for request in requests}) == 8
        if drop_last:  # else a batch can end one pass and begin the next, with the same image in both
            assert len(set(images)) == distinct
            assert distinct == 1 or all(images[k] != images[k + 1] for k in range(0, 8, 2))


@pytest.mark.parametrize("repeats", [2, 4])
def test_a_pass_with_repeats_is_as_long_and_shows_fewer_images(repeats):
    plan = make_plan()
    samples = [request.image for micro in PlanSampler(plan, seed=1, repeats=repeats) for request in micro]
    assert len(samples) == plan.total_images
    passes = [samples[start : start + 48] for start in range(0, len(samples) - 48, 48)]
    for epoch, images in enumerate(passes):
        order = np.random.Generator(np.random.Philox(key=[1, epoch])).permutation(50)
        assert Counter(images) == dict.fromkeys(order[: 48 // repeats].tolist(), repeats)
    assert len(set().union(*passes)) > 48 // repeats  # each pass has its own share of the images


def test_no_image_is_shown_more_often_where_passes_run_into_each_other():
    plan = make_plan(drop_last=False, batch=12)
    samples = [request.image for micro in PlanSampler(plan, seed=1, repeats=4) for request in micro]
    # 50 positions are not a multiple of 4: a pass begins 12 or 13 images, none of them twice.
    distinct = [image for start in range(0, len(samples), 12) for image in samples[start : start + 3]]
    assert len(set(distinct[:13])) == 13
    assert len(set(distinct[13:25])) == 12


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 2), (2, 1), (2, 2), (4, 2)])
def test_repeats_depend_neither_on_ranks_nor_on_restarts(ranks, accumulation):
    plan = make_plan()
    whole = PlanSampler(plan, seed=3, repeats=2)
    shares = [PlanSampler(plan, 3, 5, rank, ranks, accumulation, repeats=2) for rank in range(ranks)]
    for step in reversed(range(plan.total_steps)):
        parts = [shares[rank].requests(step, micro) for micro in range(accumulation) for rank in range(ranks)]
        assert [request for part in parts for request in part] == whole.requests(step)
    assert list(PlanSampler(plan, 3, 5, repeats=2)) == list(whole)[5:]


def test_seeds_are_those_of_a_run_without_repeats():
    plan = make_plan()
    once, twice = ([r.seed for micro in PlanSampler(plan, 3, repeats=n) for r in micro] for n in (1, 2))
    assert once == twice


@pytest.mark.parametrize("repeats", [0, 3, 16])
def test_views_that_do_not_divide_the_batch_are_refused(repeats):
    with pytest.raises(ValueError, match=rf"stage 1 .*: {repeats} views .* batch of 8"):
        PlanSampler(make_plan(), seed=1, repeats=repeats)
