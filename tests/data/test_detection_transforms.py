from __future__ import annotations

from fractions import Fraction
from itertools import pairwise, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from mae_et.data.detection_transforms import JitterTransform, mask_boxes
from mae_et.data.instances import Instances
from mae_et.data.randomness import sample_seed
from mae_et.data.requests import SampleRequest
from mae_et.data.views import FILL, Window

SHAPES = [(60, 80), (97, 41), (31, 200), (240, 320)]
SIZES = [(64, 64), (48, 96), (130, 70)]
SCALES = [(0.1, 2.0), (0.1, 0.3), (1.7, 2.0), (1.0, 1.0)]


def request(seed: int, size: tuple[int, int]) -> SampleRequest:
    return SampleRequest(image=0, size=size, magnitude=0.0, seed=sample_seed(1, seed))


def instances(boxes, masks: torch.Tensor | None = None, crowd=None) -> Instances:
    """Objects whose labels say which they are."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    crowd = torch.zeros(len(boxes)) if crowd is None else torch.tensor(crowd)
    return Instances(boxes, torch.arange(len(boxes)), torch.full((len(boxes),), 7.0), crowd.bool(), masks)


def rectangles(shape: tuple[int, int], seed: int, count: int = 4) -> list[list[int]]:
    """Whole boxes of at least a fifth of the sides, in separate vertical strips."""
    generator = np.random.default_rng(seed)
    height, width = shape
    edges = np.linspace(0, width, count + 1).astype(int)
    boxes = []
    for left, right in pairwise(edges):
        top = int(generator.integers(0, height - height // 5))
        bottom = int(generator.integers(top + height // 5, height + 1))
        inset = int(generator.integers(0, max(1, (right - left) // 3)))
        boxes.append([int(left) + inset, top, int(right), bottom])
    return boxes


def painted(shape: tuple[int, int], boxes: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """A black image with a box of another colour for each object, and the boxes' masks."""
    image = torch.zeros(3, *shape, dtype=torch.uint8)
    masks = torch.zeros(len(boxes), *shape, dtype=torch.uint8)
    for k, (x1, y1, x2, y2) in enumerate(boxes):
        image[:, y1:y2, x1:x2] = colour(k)[:, None, None]
        masks[k, y1:y2, x1:x2] = 1
    return image, masks


def colour(k: int) -> torch.Tensor:
    return torch.tensor([255 if k & 1 else 60, 255 if k & 2 else 60, 200], dtype=torch.uint8)


def there(window: Window, boxes: np.ndarray) -> np.ndarray:
    """Boxes in px of the canvas, in fp64, one point after the other."""
    (top, left, height, width), (inner_height, inner_width), mirrored = window
    moved = np.empty_like(boxes, dtype=np.float64)
    for row, (x1, y1, x2, y2) in zip(moved, boxes):
        xs = [(x - left) * inner_width / width for x in (x1, x2)]
        if mirrored:
            xs = [inner_width - x for x in reversed(xs)]
        ys = [(y - top) * inner_height / height for y in (y1, y2)]
        row[:] = xs[0], ys[0], xs[1], ys[1]
    return moved


def back(window: Window, boxes: np.ndarray) -> np.ndarray:
    """The inverse of `there`."""
    (top, left, height, width), (inner_height, inner_width), mirrored = window
    x1, y1, x2, y2 = boxes.T.astype(np.float64)
    if mirrored:
        x1, x2 = inner_width - x2, inner_width - x1
    horizontal, vertical = width / inner_width, height / inner_height
    return np.stack([x1 * horizontal + left, y1 * vertical + top, x2 * horizontal + left, y2 * vertical + top], 1)


# Geometry


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("masked", [False, True])
def test_shapes_and_layout(channels, size, masked):
    image, masks = painted((60, 80), rectangles((60, 80), 0))
    for seed in range(10):
        objects = instances(rectangles((60, 80), 0), masks if masked else None)
        view, seen, inner = JitterTransform()(image[:channels], objects, request(seed, size))
        assert view.shape == (channels, *size)
        assert view.dtype == torch.uint8
        assert view.is_contiguous()
        assert all(0 < side <= limit for side, limit in zip(inner, size))
        assert seen.boxes.shape == (len(seen), 4)
        assert (seen.boxes.dtype, seen.labels.dtype) == (torch.float32, torch.int64)
        assert (seen.areas.dtype, seen.crowd.dtype) == (torch.float32, torch.bool)
        assert len(seen.labels) == len(seen.areas) == len(seen.crowd) == len(seen)
        if masked:
            assert seen.masks is not None
            assert (seen.masks.dtype, seen.masks.shape) == (torch.uint8, (len(seen), *size))
        else:
            assert seen.masks is None


@pytest.mark.parametrize(("shape", "size"), list(product(SHAPES, SIZES)))
def test_boxes_come_back(shape, size):
    """What is not clipped returns by the geometry that was drawn; what is clipped is the part inside, at least 1 px."""
    boxes = rectangles(shape, 3)
    image, _ = painted(shape, boxes)
    returned = 0
    for scale, seed in product(SCALES, range(8)):
        jitter = JitterTransform(scale)
        _, seen, inner = jitter(image, instances(boxes), request(seed, size))
        window = jitter.draw(shape, size, request(seed, size).seed)
        assert window.inner == inner
        expected = there(window, np.array(boxes))
        clipped = expected.clip(0, [inner[1], inner[0]] * 2)
        kept = [k for k, (x1, y1, x2, y2) in enumerate(clipped) if x2 - x1 >= 1 and y2 - y1 >= 1]
        assert seen.labels.tolist() == kept
        # float32 of numbers up to 640: half a unit in the last place is 3e-5, of which a few add up.
        np.testing.assert_allclose(seen.boxes.numpy(), clipped[kept], atol=5e-4)
        whole = [i for i, k in enumerate(kept) if (expected[k] == clipped[k]).all()]
        inverse = back(window, seen.boxes.numpy()[whole])
        # The same error, times up to 10 (and the scale at which it fits) by the inverse's scale.
        np.testing.assert_allclose(inverse, np.array(boxes)[[kept[i] for i in whole]].reshape(-1, 4), atol=2e-2)
        returned += len(whole)
    assert returned > 20


@pytest.mark.parametrize(("shape", "size"), [*product(SHAPES, SIZES), ((1, 50), (32, 32)), ((50, 1), (33, 64))])
@pytest.mark.parametrize("scale", SCALES)
def test_scale_is_the_one_drawn(shape, size, scale):
    """Up to the rounding of both the part and its picture to whole px, the smallest of which is one."""
    for seed in range(20):
        jitter = JitterTransform(scale)
        (top, left, height, width), inner, _ = jitter.draw(shape, size, request(seed, size).seed)
        assert 0 <= top <= shape[0] - height
        assert 0 <= left <= shape[1] - width
        fits = min(size[0] / shape[0], size[1] / shape[1])
        factors = []
        for part, picture, whole, limit in zip((height, width), inner, shape, size):
            low, high = (picture - 0.5) / (part + 0.5), (picture + 0.5) / max(part - 0.5, 1e-9)
            factors.append((low / fits if picture > 1 else 0, high / fits))
            assert part == whole or picture == limit  # cropped only where the canvas is full
        low, high = max(low for low, _ in factors), min(high for _, high in factors)
        assert low <= high  # one factor explains both sides
        assert high >= scale[0]
        assert low <= scale[1]


# Boxes, masks and pixels


@pytest.mark.parametrize(("shape", "size"), list(product(SHAPES, SIZES)))
def test_pixels_stay_under_their_box(shape, size):
    """A rectangle's pixels, where they are more than half of its colour, reach to within 1 px of its box."""
    compared = 0
    for scale, seed in product(SCALES, range(4)):
        boxes = rectangles(shape, seed, count=1)
        image = torch.zeros(1, *shape, dtype=torch.uint8)
        x1, y1, x2, y2 = boxes[0]
        image[:, y1:y2, x1:x2] = 255
        view, seen, inner = JitterTransform(scale)(image, instances(boxes), request(seed, size))
        if len(seen) == 0 or (seen.boxes[0, 2:] - seen.boxes[0, :2]).min() < 2:
            continue
        rows, columns = np.nonzero(view[0, : inner[0], : inner[1]].numpy() >= 128)
        extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        # Half a px for the rounding to px, and next to nothing for the resize, which is symmetric about an edge.
        np.testing.assert_allclose(seen.boxes[0].numpy(), extent, atol=0.75)
        compared += 1
    assert compared > 8


@pytest.mark.parametrize(("shape", "size"), list(product(SHAPES, SIZES)))
def test_masks_stay_on_their_object(shape, size):
    compared = 0
    for scale, seed in product(SCALES, range(2)):
        boxes = rectangles(shape, seed)
        image, masks = painted(shape, boxes)
        jitter = JitterTransform(scale)
        view, seen, inner = jitter(image, instances(boxes, masks), request(seed, size))
        box = jitter.draw(shape, size, request(seed, size).seed).box
        # The resize mixes px whose centres are less than 1 px, or half a px of the image, from an edge.
        mixed = max(1, *(int(np.ceil(side / part / 2)) for side, part in zip(inner, box[2:])))
        window = 2 * mixed + 1
        inside = view[:, : inner[0], : inner[1]].int()
        assert seen.masks is not None
        for label, mask in zip(seen.labels.tolist(), seen.masks[:, : inner[0], : inner[1]].float()):
            grown = F.max_pool2d(mask[None], window, 1, mixed)[0] > 0
            shrunk = -F.max_pool2d(F.pad(-mask[None], (mixed,) * 4), window, 1)[0] > 0
            # The resize's integers round by up to 2 levels.
            like = (inside - colour(label).int()[:, None, None]).abs().amax(0) <= 2
            assert like[shrunk].all()
            assert grown[like].all()
            compared += int(shrunk.sum())
    assert compared > 500


@pytest.mark.parametrize("size", SIZES)
def test_masks_are_sampled_at_centres(size):
    """Against exact fractions; boxes and areas are those of what is sampled."""
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(3, 60, 80, generator=generator) < 0.02).byte()
    objects = instances([[0, 0, 80, 60]] * 3, masks)
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    for seed in range(12):
        jitter = JitterTransform()
        _, seen, inner = jitter(image, objects, request(seed, size))
        (top, left, height, width), _, mirrored = jitter.draw((60, 80), size, request(seed, size).seed)
        rows = [top + int((y + Fraction(1, 2)) * Fraction(height, inner[0])) for y in range(inner[0])]
        columns = [left + int((x + Fraction(1, 2)) * Fraction(width, inner[1])) for x in range(inner[1])]
        if mirrored:
            columns.reverse()
        expected = np.zeros((3, *size), np.uint8)
        expected[:, : inner[0], : inner[1]] = masks.numpy()[:, rows][:, :, columns]
        kept = [k for k in range(3) if expected[k].any()]
        assert seen.labels.tolist() == kept
        assert seen.masks is not None
        np.testing.assert_array_equal(seen.masks.numpy(), expected[kept])
        for k, box, area in zip(kept, seen.boxes.tolist(), seen.areas.tolist()):
            ys, xs = np.nonzero(expected[k])
            assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert area == len(ys)


def test_boxes_of_masks():
    masks = torch.zeros(3, 7, 9, dtype=torch.uint8)
    masks[0, 2, 3] = 1
    masks[1, 0, 8] = masks[1, 6, 0] = 1
    masks[2] = 1
    assert mask_boxes(masks).tolist() == [[3, 2, 4, 3], [0, 0, 9, 7], [0, 0, 9, 7]]
    assert mask_boxes(masks[:0]).shape == (0, 4)


def test_boxes_of_a_cut_object_are_those_of_its_mask():
    """A triangle cut by the crop is narrower than its clipped box; no box is looser than the pixels seen."""
    mask = torch.ones(100, 100).tril().byte()[None]
    tighter = 0
    for seed in range(30):
        arguments = torch.zeros(3, 100, 100, dtype=torch.uint8), request(seed, (64, 64))
        jitter = JitterTransform((2.0, 2.0))
        _, of_mask, _ = jitter(arguments[0], instances([[0, 0, 100, 100]], mask), arguments[1])
        _, of_box, inner = jitter(arguments[0], instances([[0, 0, 100, 100]]), arguments[1])
        assert of_box.boxes.tolist() == [[0, 0, inner[1], inner[0]]]
        tighter += len(of_mask) == 0 or of_mask.boxes.tolist() != of_box.boxes.tolist()
    assert tighter > 5


# What is kept


@pytest.mark.parametrize("masked", [False, True])
def test_crowds_and_what_is_not_seen_are_left_out(masked):
    boxes = [[0, 0, 40, 40], [40, 40, 80, 80], [0, 40, 40, 80], [10, 10, 10.4, 60]]
    masks = torch.zeros(4, 80, 80, dtype=torch.uint8)
    for k in range(3):
        x1, y1, x2, y2 = (int(side) for side in boxes[k])
        masks[k, y1:y2, x1:x2] = 1
    objects = instances(boxes, masks if masked else None, crowd=[0, 0, 1, 0])
    image = torch.zeros(3, 80, 80, dtype=torch.uint8)
    for seed in range(20):
        jitter = JitterTransform((2.0, 2.0))
        _, seen, _ = jitter(image, objects, request(seed, (80, 80)))
        (top, left, height, width), _, _ = jitter.draw((80, 80), (80, 80), request(seed, (80, 80)).seed)
        expected = [k for k, edge in ((0, 0), (1, 40)) if left < edge + 40 and top < edge + 40]
        expected = [k for k in expected if k == 0 or (left + width > 40 and top + height > 40)]
        assert seen.labels.tolist() == expected
        assert not seen.crowd.any()
        assert len(objects) == 4


def test_a_thin_object_of_a_small_view_is_left_out():
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    _, seen, inner = JitterTransform((0.1, 0.1))(
        image, instances([[0, 0, 9, 100], [0, 0, 11, 100]]), request(0, (100, 100))
    )
    assert inner == (10, 10)
    assert seen.labels.tolist() == [1]
    assert seen.areas.item() == pytest.approx(11)


def test_a_mask_of_which_no_centre_is_hit_is_left_out():
    image, masks = painted((100, 100), [[0, 0, 4, 4], [3, 3, 7, 7]])
    _, seen, inner = JitterTransform((0.1, 0.1), flip=False)(
        image, instances([[0, 0, 9, 9]] * 2, masks), request(0, (100, 100))
    )
    assert inner == (10, 10)
    assert seen.labels.tolist() == [1]  # the first px's centre is at 5
    assert seen.boxes.tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("masks", [None, (60, 80)])
def test_no_objects(masks):
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    view, seen, _ = JitterTransform()(image, Instances.none(masks), request(0, (32, 48)))
    assert view.shape == (3, 32, 48)
    assert len(seen) == 0
    assert seen.boxes.shape == (0, 4)
    assert (seen.masks is None) if masks is None else (seen.masks is not None and seen.masks.shape == (0, 32, 48))


def test_what_is_given_is_not_changed():
    boxes = rectangles((60, 80), 0)
    image, masks = painted((60, 80), boxes)
    objects = instances(boxes, masks.clone())
    before = image.clone()
    for seed in range(5):
        view, seen, _ = JitterTransform((1.0, 1.0))(image, objects, request(seed, (60, 80)))
        view.zero_()
        seen.boxes.zero_()
        assert seen.masks is not None
        seen.masks.zero_()
    assert torch.equal(image, before)
    assert torch.equal(objects.boxes, instances(boxes).boxes)
    assert objects.masks is not None
    assert torch.equal(objects.masks, masks)


# Padding, flip, chance


@pytest.mark.parametrize("size", SIZES)
def test_padding(size):
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    masks = torch.ones(1, 60, 80, dtype=torch.uint8)
    padded = 0
    for seed in range(10):
        view, seen, (height, width) = JitterTransform()(image, instances([[0, 0, 80, 60]], masks), request(seed, size))
        outside = torch.ones(size, dtype=torch.bool)
        outside[:height, :width] = False
        assert (view[:, outside] == FILL).all()
        assert (view[:, ~outside] == 0).all()
        assert seen.masks is not None
        assert torch.equal(seen.masks[0].bool(), ~outside)
        padded += int(outside.sum())
    assert padded > 0


def test_flip_twice_is_none():
    boxes = rectangles((60, 80), 1)
    image, masks = painted((60, 80), boxes)
    objects = instances(boxes, masks)
    mirrored = 0
    for seed in range(20):
        asked = request(seed, (64, 64))
        plain, plainly_seen, inner = JitterTransform(flip=False)(image, objects, asked)
        view, seen, _ = JitterTransform()(image, objects, asked)
        assert not JitterTransform(flip=False).draw((60, 80), (64, 64), asked.seed).mirrored
        if JitterTransform().draw((60, 80), (64, 64), asked.seed).mirrored:
            mirrored += 1
            again = view.clone()
            again[:, : inner[0], : inner[1]] = view[:, : inner[0], : inner[1]].flip(-1)
            assert torch.equal(again, plain)
            x1, y1, x2, y2 = seen.boxes.unbind(1)
            unmirrored = torch.stack([inner[1] - x2, y1, inner[1] - x1, y2], 1)
            assert torch.equal(unmirrored, plainly_seen.boxes)
        else:
            assert torch.equal(view, plain)
            assert torch.equal(seen.boxes, plainly_seen.boxes)
    assert 0 < mirrored < 20


def test_chance_comes_from_the_seed_alone():
    boxes = rectangles((60, 80), 1)
    image, masks = painted((60, 80), boxes)
    objects = instances(boxes, masks)
    jitter = JitterTransform()
    torch.manual_seed(0)
    first = [jitter(image, objects, request(seed, (64, 64))) for seed in range(5)]
    state = torch.get_rng_state()
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the generator that must have no say
    second = [JitterTransform()(image, objects, request(seed, (64, 64))) for seed in reversed(range(5))][::-1]
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())  # nothing was drawn from it
    for (view, seen, inner), (other, other_seen, other_inner) in zip(first, second):
        assert torch.equal(view, other)
        assert torch.equal(seen.boxes, other_seen.boxes)
        assert inner == other_inner
    assert len({inner for _, _, inner in first}) > 1


def test_distributions():
    """Kolmogorov-Smirnov at 1e-3: seeds are fixed, so that it fails for good or never."""
    windows = [
        JitterTransform().draw((1000, 1000), (1000, 1000), request(seed, (1000, 1000)).seed) for seed in range(600)
    ]
    mirrored = sum(window.mirrored for window in windows)
    assert stats.binomtest(mirrored, 600).pvalue > 1e-3
    factors = np.array([window.inner[0] / window.box[2] for window in windows])
    assert factors.min() < 0.12
    assert factors.max() > 1.98
    assert stats.kstest(factors, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3
    cropped = [
        (top / (1000 - height), left / (1000 - width)) for (top, left, height, width), *_ in windows if height < 900
    ]
    tops, lefts = np.array(cropped).T
    assert len(tops) > 200
    assert stats.kstest(tops, "uniform").pvalue > 1e-3
    assert stats.kstest(lefts, "uniform").pvalue > 1e-3
    assert tuple(stats.pearsonr(tops, lefts))[1] > 1e-3


@pytest.mark.parametrize("scale", [(0.0, 1.0), (2.0, 1.0), (-1.0, 1.0)])
def test_bad_scale(scale):
    with pytest.raises(ValueError, match="jitter scale"):
        JitterTransform(scale)
