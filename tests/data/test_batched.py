"""Batch calls give what calls one by one give, to the bit: seeds, boxes, pixels, and what a worker hands over."""

from __future__ import annotations

import pickle
import zlib
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch

from mae_et.curriculum import Curriculum
from mae_et.data import batched, loader
from mae_et.data.archives import ArraySource
from mae_et.data.augment import TrainTransform
from mae_et.data.batched import LARGEST_SIDE, can_resize, fixed_point_weights, resize_boxes
from mae_et.data.loader import Batch, RequestDataset, batches_of, build_loader
from mae_et.data.randomness import sample_seeds
from mae_et.data.replacing import BadImage
from mae_et.data.requests import SampleRequest, SampleRequests
from mae_et.data.sampler import PlanSampler
from mae_et.data.transforms import METHODS, CropTransform, EvalTransform, bicubic


def demo_sampler(seed: int = 7, first_step: int = 0) -> PlanSampler:
    curriculum = Curriculum.preset("efficienttrain_pp", 28, 2)
    plan = curriculum.plan(epochs=4.0, images=50, batch=8, patch_size=2, mask_ratio=0.75)
    return PlanSampler(plan, seed, first_step)


def array_source(side: int = 28, stored: int = 1, channels: int | None = None) -> ArraySource:
    pixels = np.random.Generator(np.random.Philox(key=[1, 2])).integers(0, 256, (50, side, side, stored), np.uint8)
    return ArraySource(pixels, np.arange(50) % 3, "noise", channels=channels)


def requests_of(size: tuple[int, int], count: int = 40) -> SampleRequests:
    images = np.random.default_rng(0).integers(0, 50, count)
    return SampleRequests(images, size, 3.0, sample_seeds(5, 1 << 33, count))


def one_by_one(source: ArraySource, transform) -> RequestDataset:
    return RequestDataset(source, lambda image, request: transform(image, request))  # hides `many`


def assert_same(batch: Batch, expected: Batch) -> None:
    for mine, theirs in zip(batch.tensors, expected.tensors):
        assert mine.dtype == theirs.dtype
        assert mine.is_contiguous()
        assert torch.equal(mine, theirs)
    assert batch.bad == expected.bad


# Resizing


def assert_resizes_as_torch(images: np.ndarray, boxes: np.ndarray, mirrored: np.ndarray, size: tuple[int, int]) -> None:
    views = resize_boxes(images, boxes, mirrored, size)
    assert views.flags.c_contiguous
    for image, (top, left, height, width), flip, view in zip(images, boxes, mirrored, views):
        expected = bicubic(torch.from_numpy(image)[:, top : top + height, left : left + width], size)
        assert np.array_equal(view, (expected.flip(-1) if flip else expected).numpy()), (images.shape, size, boxes)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("side", "size"),
    [(side, size) for side in (2, 9, 28, 32, 47, 48) for size in (2, 5, 12, 20, 28, 33, 48) if side <= 4 * size],
)
def test_every_length_of_a_side_is_resized_as_torch_does(channels, side, size):
    """No tolerance: both are integers. Black beside white makes the sums largest, and noise the rounding diverse."""
    assert can_resize(side, side, (size, size))
    chance = np.random.default_rng(side)
    for values in ([0, 255], range(256)):
        lengths = np.arange(1, side + 1)
        places = chance.integers(0, side - lengths + 1, (2, side))
        boxes = np.stack([*places, lengths[::-1], lengths], 1)
        boxes[:, 0] = chance.integers(0, side - boxes[:, 2] + 1)
        images = chance.choice(list(values), (side, channels, side, side)).astype(np.uint8)
        assert_resizes_as_torch(images, boxes, chance.random(side) < 0.5, (size, size))


def test_sides_may_differ():
    chance = np.random.default_rng(0)
    images = chance.choice([0, 1, 254, 255], (30, 3, 31, 44)).astype(np.uint8)
    boxes = np.tile([3, 20, 17, 24], (30, 1))
    assert_resizes_as_torch(images, boxes, chance.random(30) < 0.5, (40, 13))


def test_sums_are_integers_that_float32_holds():
    """The largest of them that pixels from -128 to 127 can make, for all that is taken; others are refused."""
    refused = 0
    for side in range(1, LARGEST_SIDE + 1, 5):
        for size in range(1, LARGEST_SIDE + 1, 5):
            weights, bits = fixed_point_weights(side, size)
            exact = 128 * np.abs(weights).sum(-1).max() < 2**24
            assert can_resize(side, side, (size, size)) == exact
            assert can_resize(side, 8, (size, 8)) == exact
            assert np.abs(weights).max() < 2**15
            assert bits.max() <= 22
            refused += not exact
            assert exact or side > 4 * size
    assert refused


def test_large_images_are_left_to_torch():
    assert can_resize(LARGEST_SIDE, LARGEST_SIDE, (LARGEST_SIDE, LARGEST_SIDE))
    assert not can_resize(LARGEST_SIDE + 1, 28, (28, 28))
    assert not can_resize(28, 28, (28, LARGEST_SIDE + 1))


# Crops


@pytest.mark.parametrize(
    ("scale", "ratio"),
    # The first leaves one image in thirty without a box in the tries at once, the last all of them in all ten.
    [((0.5, 1.0), (3 / 4, 4 / 3)), ((0.08, 0.3), (3 / 4, 4 / 3)), ((0.98, 1.0), (1.2, 2.0))],
)
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize(("height", "width"), [(28, 28), (32, 20), (375, 500)])
def test_boxes_of_a_batch_are_those_of_its_samples(scale, ratio, flip, height, width):
    transform = CropTransform((28, 28), scale=scale, ratio=ratio, flip=flip)
    seeds = sample_seeds(3, 10**12, 1000)
    boxes, mirrored = transform.draw_many(height, width, seeds)
    expected = [transform.draw(height, width, seed) for seed in seeds.tolist()]
    assert [(tuple(box), flip) for box, flip in zip(boxes.tolist(), mirrored.tolist())] == expected
    assert boxes.dtype == np.int64


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("side", "stored", "channels"), [(28, 1, 1), (28, 1, 3), (32, 3, 3), (64, 3, 1)])
def test_views_of_a_batch_are_those_of_its_samples(method, side, stored, channels):
    source = array_source(side, stored, channels)
    transform = CropTransform((26, 28), method, scale=(0.3, 1.0))
    for size in ((12, 12), (20, 28), (26, 28)):
        asked = requests_of(size)
        expected = one_by_one(source, transform).__getitems__(asked)
        assert_same(RequestDataset(source, transform).__getitems__(asked), expected)
        assert_same(RequestDataset(source, transform).__getitems__(list(asked)), expected)


@pytest.mark.parametrize(("size", "fraction"), [((28, 28), 1.0), ((20, 20), 0.875), ((12, 16), 1.0)])
@pytest.mark.parametrize("stored", [1, 3])
def test_evaluations_of_a_batch_are_those_of_its_samples(size, fraction, stored):
    source, transform = array_source(28, stored), EvalTransform(size, fraction)
    asked = requests_of(size)
    expected = one_by_one(source, transform).__getitems__(asked)
    assert_same(RequestDataset(source, transform).__getitems__(asked), expected)


def test_transforms_without_a_batch_call_see_one_image_after_the_other():
    source, transform = array_source(28, 3), TrainTransform((28, 28))
    asked = requests_of((20, 20))
    views = [transform(source.image(request.image), request) for request in asked]
    assert torch.equal(RequestDataset(source, transform).__getitems__(asked).images, torch.stack(views))


def test_views_do_not_share_memory_with_the_source():
    source = array_source()
    before = source.image(3)
    asked = SampleRequests(np.array([3, 3]), (28, 28), 0.0, np.array([1, 2]))
    for transform in (EvalTransform((28, 28), 1.0), CropTransform((28, 28), scale=(1.0, 1.0), ratio=(1.0, 1.0))):
        RequestDataset(source, transform).__getitems__(asked).images.fill_(9)
        assert torch.equal(source.image(3), before)


# A whole run


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_those_of_committed_runs(workers):
    """Checksums taken before there were batch calls: requests and boxes, and all that comes out."""
    sampler, transform = demo_sampler(), CropTransform((28, 28), scale=(0.5, 1.0))
    drawn = batches = 0
    for asked in sampler:
        text = repr([(*request, transform.draw(28, 28, request.seed)) for request in asked])
        drawn = zlib.crc32(text.encode(), drawn)
    assert drawn == 3755891423
    with batches_of(build_loader(RequestDataset(array_source(), transform), sampler, workers, False)) as delivered:
        for batch in delivered:
            for values in batch.tensors:
                batches = zlib.crc32(values.numpy().tobytes(), batches)
    assert batches == 1158883345


# Requests and batches between processes


def test_requests_are_a_sequence_of_tuples():
    asked = requests_of((12, 12), 5)
    tuples = [SampleRequest(int(asked.images[i]), (12, 12), 3.0, int(asked.seeds[i])) for i in range(5)]
    assert list(asked) == tuples
    assert [asked[i] for i in range(5)] == tuples
    assert asked[-1] == tuples[-1]
    assert asked[1:3] == tuples[1:3]
    assert len(asked) == 5
    assert asked == tuples
    assert asked != tuples[:4]
    assert SampleRequests.of(tuples) == asked
    assert SampleRequests.of(asked) is asked
    assert all(type(value) is int for request in asked for value in (request.image, request.seed))
    assert pickle.loads(pickle.dumps(asked)) == tuples


@pytest.mark.parametrize("images_inline", [True, False])
def test_a_batch_survives_its_hand_over(monkeypatch, images_inline):
    images = torch.arange(300, dtype=torch.uint8).reshape(2, 3, 5, 10)
    numbers = torch.tensor([[0, -1], [2**62, 5], [7, 8]])
    batch = Batch(images, *numbers, bad=(BadImage(4, "broken"),))
    monkeypatch.setattr(loader, "INLINE_BYTES", images.nbytes - (not images_inline))
    received = pickle.loads(ForkingPickler.dumps(batch))
    assert type(received) is Batch
    assert_same(received, batch)
    assert received.images.is_shared() != images_inline
    received.images.fill_(0)  # writable
    received.labels.fill_(0)


def test_tables_are_made_once():
    batched._side.cache_clear()
    transform = CropTransform((28, 28))
    for _ in range(3):
        transform.many(torch.zeros(4, 1, 28, 28, dtype=torch.uint8), requests_of((12, 12), 4))
    assert batched._side.cache_info().misses == 1
