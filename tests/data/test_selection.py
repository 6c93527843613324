"""The rule against a NumPy reference, its mean against that of all samples, and passes against a plain walk."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from mae_et.curriculum import Curriculum, Stage
from mae_et.curriculum.making import Replay
from mae_et.data.sampler import PlanSampler
from mae_et.data.selection import InfoBatch, Pass, Passes, PassSampler

PRESET = Curriculum.preset("efficienttrain_pp", 28, 2)


def make_plan(images=50, batch=8, epochs=8.0, curriculum=PRESET, **terms):
    return curriculum.plan(epochs=epochs, images=images, batch=batch, patch_size=2, mask_ratio=0.75, **terms)


def make_scores(images, seed=0, unseen=0):
    scores = np.random.default_rng(seed).lognormal(size=images).astype(np.float32)
    scores[:unseen] = np.nan
    return scores


# The rule


def reference_weights(scores, ratio, draws):
    """One sample at a time, in Python's own floats."""
    known = [float(score) for score in scores if score == score]
    mean = sum(known) / len(known) if known else 0.0
    weights = []
    for score, draw in zip(scores, draws):
        below = score == score and float(score) < mean
        weights.append(0.0 if below and draw < ratio else 1 / (1 - ratio) if below else 1.0)
    return weights


@pytest.mark.parametrize("unseen", [0, 7, 50])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9])
def test_the_rule_is_the_references(ratio, unseen):
    scores = make_scores(50, seed=1, unseen=unseen)
    draws = np.random.Generator(np.random.Philox(key=[5, 3], counter=[0, 0, 0, 2])).random(50)
    weights = InfoBatch(ratio).weights(scores, seed=5, number=3)
    # 1 / (1 - r) is rounded to float32 once.
    np.testing.assert_allclose(weights, reference_weights(scores, ratio, draws), rtol=1e-7)
    assert weights.dtype == np.float32
    assert np.all(weights[:unseen] == 1)
    if unseen < 50 and ratio:
        assert set(weights) == {0, 1, np.float32(1 / (1 - ratio))}


def test_a_pass_is_a_function_of_seed_number_and_scores():
    rule, scores = InfoBatch(), make_scores(200)
    first = rule.weights(scores, 1, 2)
    assert np.array_equal(rule.weights(scores.copy(), 1, 2), first)
    for seed, number in ((2, 2), (1, 3)):
        assert not np.array_equal(rule.weights(scores, seed, number), first)
    assert not np.array_equal(rule.weights(scores[::-1].copy(), 1, 2), first)


def test_equal_scores_and_no_scores_prune_nothing():
    for scores in (np.full(30, 1.7, np.float32), np.full(30, np.nan, np.float32)):
        assert np.array_equal(InfoBatch().weights(scores, 0, 1), np.ones(30))


def test_the_expected_sum_is_that_of_all_samples_by_enumeration(monkeypatch):
    """Every outcome of the draws of the samples below the mean, each with its probability."""
    ratio, scores = 0.3, np.array([0.2, 4.0, 0.7, 0.1, 3.0, 0.9, 1.0, 0.5], np.float32)
    values = np.random.default_rng(0).normal(size=(8, 3))  # gradients
    below = scores < scores.mean()
    assert below.sum() == 6
    expected = np.zeros(3)
    for kept in product([False, True], repeat=6):
        draws = np.zeros(8)
        draws[below] = np.where(kept, 0.99, 0.0)
        monkeypatch.setattr(np.random, "Generator", lambda _bits, draws=draws: FixedDraws(draws))
        weights = InfoBatch(ratio).weights(scores, 0, 1)
        assert np.array_equal(weights[below] > 0, kept)
        expected += np.prod(np.where(kept, 1 - ratio, ratio)) * (weights[:, None] * values).sum(axis=0)
    # Weights are float32: relative error 2^-24.
    np.testing.assert_allclose(expected, values.sum(axis=0), rtol=1e-6, atol=1e-6)


class FixedDraws:
    def __init__(self, draws):
        self.draws = draws

    def random(self, count):
        assert count == len(self.draws)
        return self.draws


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.8])
def test_the_mean_over_real_draws_is_that_of_all_samples(ratio):
    """And pruning has the probability that it says."""
    scores, draws = make_scores(400, seed=4), 500
    values = np.random.default_rng(1).normal(1.0, 1.0, 400)
    weights = np.array([InfoBatch(ratio).weights(scores, 7, number) for number in range(1, draws + 1)], np.float64)
    below = scores < scores.mean(dtype=np.float64)
    # The sum over a pass has variance sum over below of v^2 r / (1 - r), its mean over the draws a share of that.
    deviation = np.sqrt((values[below] ** 2).sum() * ratio / (1 - ratio) / draws)
    assert abs((weights @ values).mean() - values.sum()) < 4 * deviation
    assert deviation < 0.02 * values.sum()
    pruned = (weights[:, below] == 0).mean()
    assert abs(pruned - ratio) < 4 * np.sqrt(ratio * (1 - ratio) / (draws * below.sum()))
    assert np.all(weights[:, ~below] == 1)


# Passes


def walk(passes, scores_of=lambda number: make_scores(50, seed=number)):
    """All passes of a run: (the pass, the step after its last, its images)."""
    found, step = [], 0
    while step < passes.plan.total_steps:
        if step == passes.end:
            passes.begin(scores_of(passes.running.number))
        sampler = PassSampler(passes)
        sampler.first_step = step
        found.append((passes.running, passes.end, [request.image for micro in sampler for request in micro]))
        step = passes.end
    return found


def test_the_first_pass_is_the_one_without_selection():
    plan = make_plan()
    _, end, images = walk(Passes(plan, InfoBatch(), seed=3))[0]
    plain = [request.image for micro in PlanSampler(plan, seed=3) for request in micro]
    assert (end, images) == (6, plain[:48])


def test_requests_are_those_of_the_plan_but_for_the_image():
    plan, passes = make_plan(), Passes(make_plan(), InfoBatch(), seed=3)
    passes.begin(make_scores(50))
    sampler, plain = PassSampler(passes), PlanSampler(plan, seed=3)
    for step in range(passes.running.first_step, passes.end):
        ours, theirs = sampler.requests(step), plain.requests(step)
        assert [request[1:] for request in ours] == [request[1:] for request in theirs]


@pytest.mark.parametrize("batches", [(1, 1), (2, 1), (1, 2)])
def test_passes_show_their_samples_in_order_up_to_the_last_whole_batch(batches):
    """Also where the batch changes within a pass."""
    stages = [Stage(0.45, 14, batch_scale=batches[0]), Stage(1.0, 28, batch_scale=batches[1])]
    curriculum = Curriculum(tuple(stages))
    plan = make_plan(curriculum=curriculum, epochs=6.0, learning_rate_cap=1.0, more_tokens=True)
    found = walk(Passes(plan, InfoBatch(anneal=0.2), seed=2))
    assert [running.number for running, _, _ in found] == list(range(len(found)))
    assert found[-1][1] == plan.total_steps
    straddled = 0
    for running, end, images in found:
        order = np.random.Generator(np.random.Philox(key=[2, running.number])).permutation(50)
        kept = [image for image in order.tolist() if running.weights[image] > 0]
        shown = sum(plan.at(step).batch for step in range(running.first_step, end))
        assert images == kept[:shown]
        if end < plan.total_steps and plan.u(end) < 0.8:  # there, and at the end of the run, a pass may be cut short
            assert shown + plan.at(end).batch > len(kept)
        straddled += plan.at(running.first_step).stage is not plan.at(end - 1).stage
    assert straddled == 1
    assert found[0][0].pruned == 0
    assert 0.1 < found[1][0].pruned < 0.5


def test_shorter_passes_are_more_passes():
    plan = make_plan(images=64)
    many = walk(Passes(plan, InfoBatch(0.9), 0), lambda number: make_scores(64, number))
    few = walk(Passes(plan, InfoBatch(0.0), 0), lambda number: make_scores(64, number))
    assert len(many) > 1.2 * len(few)
    assert [end - running.first_step for running, end, _ in few[:-1]] == [8] * (len(few) - 1)


@pytest.mark.parametrize("anneal", [0.0, 0.125, 0.5, 1.0])
def test_the_end_of_the_budget_prunes_nothing(anneal):
    plan = make_plan()
    for running, end, images in walk(Passes(plan, InfoBatch(anneal=anneal), seed=1)):
        annealing = plan.u(running.first_step) >= 1 - anneal
        assert (running.pruned == 0) == (annealing or running.number == 0)
        assert running.pruned == 0 or end == plan.total_steps or plan.u(end - 1) < 1 - anneal
        if annealing and end < plan.total_steps:
            assert len(images) == 48
            assert np.all(running.weights == 1)


def test_of_few_images_none_is_pruned_where_those_kept_fill_no_batch():
    plan = make_plan(images=9, epochs=40.0)
    found = walk(Passes(plan, InfoBatch(0.9), seed=0), lambda number: make_scores(9, number))
    assert found[-1][1] == plan.total_steps
    assert {len(images) for _, _, images in found} == {8}
    assert all(np.count_nonzero(running.weights) >= 8 for running, _, _ in found)


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 2), (2, 1), (4, 2)])
def test_ranks_and_micro_batches_share_a_pass(ranks, accumulation):
    passes = Passes(make_plan(), InfoBatch(), seed=3)
    passes.begin(make_scores(50))
    whole = PassSampler(passes)
    shares = [PassSampler(passes, rank, ranks, accumulation) for rank in range(ranks)]
    for step in range(passes.running.first_step, passes.end):
        parts = [shares[rank].requests(step, micro) for micro in range(accumulation) for rank in range(ranks)]
        assert [request for part in parts for request in part] == whole.requests(step)
    assert len(shares[0]) == len(list(shares[0])) == len(whole) * accumulation


def test_a_pass_entered_anew_goes_on():
    passes = Passes(make_plan(), InfoBatch(), seed=3)
    passes.begin(make_scores(50))
    running = passes.running
    again = Passes(make_plan(), InfoBatch(), seed=3)
    again.enter(Pass(running.number, running.first_step, running.weights.copy()))
    assert again.end == passes.end
    assert list(PassSampler(again)) == list(PassSampler(passes))
    assert again.made(passes.end) == running.number + 1
    assert again.made(running.first_step) == running.number


def test_what_passes_cannot_do_is_refused():
    with pytest.raises(ValueError, match=r"stage 1 .*: a pass over 5 images has no whole batch of 8; lower"):
        Passes(make_plan(images=5), InfoBatch(), seed=0)
    with pytest.raises(ValueError, match=r"stage 1 .* replays images"):
        Passes(make_plan(images=64, replay=Replay(ratio=1)), InfoBatch(), seed=0)
