"""The replay buffer: what a replayed sample is, and that the plan and the seed alone decide it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_et.curriculum import Curriculum, Plan, Replay, Stage
from mae_et.data.loader import Batch
from mae_et.data.randomness import REPLAY_STREAM, sample_seed, uniforms
from mae_et.data.replay import ReplayBuffer, replayed
from mae_et.data.sampler import PlanSampler

SEED = 7


def make_plan(replay=(2, 1), held=2, batch=8, epochs=6.0, images=50, **terms: Any) -> Plan:
    """Stages of 4 and 6 px; the buffer holds `held` batches of the second, and 36 / 16 times as many of the first."""
    stages = tuple(Stage(end, size, replay=n) for end, size, n in zip((0.4, 1.0), (4, 6), replay))
    buffer = Replay(bytes=held * batch * 36, channels=1)
    return Curriculum(stages, axis="epoch").plan(
        epochs=epochs, images=images, batch=batch, patch_size=2, replay=buffer, **terms
    )


def delivered(sampler: PlanSampler) -> Iterator[Batch]:
    """What a loader makes of the requests; a sample's first eight pixels are its seed, so that all differ."""
    for requests in sampler:
        height, width = requests[0].size
        seeds = torch.tensor([request.seed for request in requests])
        images = torch.zeros(len(requests), height * width, dtype=torch.uint8)
        images[:, :8] = torch.from_numpy(seeds.numpy()[:, None].view(np.uint8).copy())
        indices = torch.tensor([request.image for request in requests])
        yield Batch(images.view(-1, 1, height, width), indices % 10, seeds, indices)


def stream(plan: Plan, first_step=0, rank=0, ranks=1, accumulation=1, repeats=1) -> list[Batch]:
    sampler = PlanSampler(plan, SEED, first_step, rank, ranks, accumulation, repeats)
    return list(replayed(delivered(sampler), sampler))


def same(one: list[Batch], other: list[Batch]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) for mine, yours in pairs for a, b in zip(mine.tensors, yours.tensors))


def origins(batch: Batch) -> list[int]:
    """The seeds with which a batch's images were made."""
    return batch.images.flatten(1)[:, :8].numpy().copy().view(np.int64)[:, 0].tolist()


def test_every_place_replays_what_it_saw_in_one_of_the_last_fresh_batches():
    """Against the definition, written out: a list of fresh batches per stage, and one draw per place."""
    plan = make_plan()
    assert [(stage.replay, stage.replay_batches) for stage in plan.stages] == [(2, 4), (1, 2)]
    assert [stage.fresh_steps > stage.replay_batches for stage in plan.stages] == [True, True]
    fresh: list[Batch] = []
    for step, batch in enumerate(stream(plan)):
        now, first = plan.at(step), plan.images_before(step)
        within = step - plan.boundaries[now.stage.index]
        seeds = [sample_seed(SEED, first + place) for place in range(8)]
        assert batch.seeds.tolist() == seeds  # new ones, for masks, mixing and drop path
        if within % (now.stage.replay + 1) == 0:
            fresh = [*(fresh if within else []), batch][-now.stage.replay_batches :]
            assert origins(batch) == seeds
            continue
        for place, seed in enumerate(seeds):
            source = fresh[-1 - int(uniforms(seed, 1, REPLAY_STREAM)[0] * len(fresh))]
            assert torch.equal(batch.images[place], source.images[place])
            assert batch.labels[place] == source.labels[place]
            assert batch.indices[place] == source.indices[place]


def test_without_replay_the_loader_itself_is_what_comes():
    plan = make_plan(replay=(0, 0))
    sampler = PlanSampler(plan, SEED)
    batches = delivered(sampler)
    assert replayed(batches, sampler) is batches


def test_the_data_path_delivers_fresh_steps_alone_and_passes_stay_whole():
    plan = make_plan(epochs=20.0)
    requests = list(PlanSampler(plan, SEED))
    assert len(requests) == len(PlanSampler(plan, SEED)) == sum(stage.fresh_steps for stage in plan.stages)
    images = [request.image for micro in requests for request in micro]
    assert len(images) == plan.total_fresh < plan.total_images / 2
    for start in range(0, len(images) - 48, 48):
        assert set(Counter(images[start : start + 48]).values()) == {1}
    assert len({request.seed for micro in requests for request in micro}) == len(images)


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 2), (2, 1), (2, 2), (4, 2)])
def test_ranks_and_micro_batches_replay_what_one_process_replays(ranks, accumulation, repeats):
    plan = make_plan()
    whole = stream(plan, repeats=repeats)
    shares = [stream(plan, 0, rank, ranks, accumulation, repeats) for rank in range(ranks)]
    for step, batch in enumerate(whole):
        parts = [shares[rank][step * accumulation + micro] for micro in range(accumulation) for rank in range(ranks)]
        images, labels, seeds, indices = map(torch.cat, zip(*(part.tensors for part in parts)))
        assert same([Batch(images, labels, seeds, indices)], [batch])


@settings(deadline=None, max_examples=60)
@given(
    replay=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    held=st.integers(1, 5),
    accumulation=st.sampled_from([1, 2]),
    data=st.data(),
)
def test_a_run_that_goes_on_sees_what_it_would_have_seen(replay, held, accumulation, data):
    plan = make_plan(replay, held, epochs=4.0)
    first = data.draw(st.integers(0, plan.total_steps), label="first step")
    whole = stream(plan, accumulation=accumulation)
    assert same(stream(plan, first, accumulation=accumulation), whole[first * accumulation :])


def test_to_go_on_asks_again_for_no_more_than_the_buffer_held():
    plan = make_plan()
    everything = {tuple(requests) for requests in PlanSampler(plan, SEED)}
    for first in range(plan.total_steps):
        sampler = PlanSampler(plan, SEED, first)
        asked, now = [tuple(requests) for requests in sampler], plan.at(first)
        ahead = sum(plan.at(step).fresh for step in range(first, plan.total_steps))
        before = sum(plan.at(step).fresh for step in range(plan.boundaries[now.stage.index], first))
        again = min(before, now.stage.replay_batches - now.fresh)  # a fresh step pushes the oldest out
        assert len(asked) == len(sampler) == ahead + again, first
        assert everything.issuperset(asked)
    assert list(PlanSampler(plan, SEED, plan.total_steps)) == []


def test_ages_are_uniform_over_what_is_held():
    plan = make_plan(replay=(0, 1), held=5, batch=64, epochs=40.0, images=640)
    sampler = PlanSampler(plan, SEED)
    buffer, ages, places = ReplayBuffer(plan.stages[1], sampler), Counter(), Counter()
    for step, batch in enumerate(stream(plan)):
        now = plan.at(step)
        if now.stage.index == 1 and now.fresh:
            buffer.put(batch, 0)
        elif now.stage.index == 1 and buffer.held == 5:
            drawn = [buffer.age(now, place) for place in range(64)]
            ages.update(drawn)
            places.update(place for place, age in enumerate(drawn) if age == 0)
    count = sum(ages.values())
    assert count > 5_000
    # Five standard deviations of a binomial count; the draws are fixed, so that this fails always or never.
    assert all(abs(ages[age] - count / 5) < 5 * np.sqrt(count * 0.2 * 0.8) for age in range(5))
    assert set(ages) == set(range(5))
    each = count / 64
    assert all(abs(places[place] - each / 5) < 5 * np.sqrt(each * 0.2 * 0.8) for place in range(64))


def test_views_of_an_image_stay_together():
    """Repeated augmentation: a replayed batch has as many views of each of its images as a fresh one."""
    plan = make_plan(replay=(2, 2), held=3)
    batches = stream(plan, repeats=4)
    mixed = 0
    for step, batch in enumerate(batches):
        indices = batch.indices.tolist()
        assert indices == indices[:2] * 4
        assert len(set(origins(batch))) == 8
        mixed += not plan.at(step).fresh and indices[:2] not in [
            other.indices.tolist()[:2] for other in batches[:step:3]
        ]
    assert mixed  # the two images of some replayed batch come from two fresh ones


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (2, 2)])
def test_the_buffer_takes_no_more_than_it_is_granted(ranks, accumulation):
    plan = make_plan(held=3, epochs=12.0)
    granted = 3 * 8 * 36
    for stage in plan.stages:
        assert stage.fresh_steps > stage.replay_batches
        assert stage.replay_batches * 8 * stage.bandwidth[0] ** 2 <= granted
        taken = 0
        for rank in range(ranks):
            sampler = PlanSampler(plan, SEED, 0, rank, ranks, accumulation)
            buffer, batches = ReplayBuffer(stage, sampler), delivered(sampler)
            for number, batch in enumerate(batches):
                if batch.images.shape[2:] == stage.bandwidth:
                    buffer.put(batch, number % accumulation)
            taken += buffer.bytes
        assert 0 < taken <= granted


def test_the_buffer_keeps_copies_and_a_short_stage_takes_less():
    plan = make_plan(replay=(1, 0), held=100)
    stage, sampler = plan.stages[0], PlanSampler(plan, SEED)
    buffer = ReplayBuffer(stage, sampler)
    batch = next(delivered(sampler))
    kept = origins(batch)
    buffer.put(batch, 0)
    batch.images.zero_()
    assert origins(buffer.draw(plan.at(1), 0)) == kept
    assert stage.replay_batches > stage.fresh_steps
    assert buffer.bytes == stage.fresh_steps * 8 * 16
