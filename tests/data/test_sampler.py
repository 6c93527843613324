"""The sampler is a pure function of the position: ranks, micro-batches and restarts change nothing."""

from __future__ import annotations

from collections import Counter

import pytest

from mae_et.curriculum import Curriculum
from mae_et.data.sampler import PlanSampler


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
