from __future__ import annotations

import numpy as np
import pytest
import timm.data.mixup as timm_mixup
import torch
from scipy import stats

from mae_et.ops.mixing import MixDraw, cutmix_box, draw_mix, mix, smooth_targets

MIXUP, CUTMIX = MixDraw(0.3, None), MixDraw(1 - 20 / 96, (2, 3, 4, 5))


def batch(count: int = 6, dtype=torch.float32, size: tuple[int, int] = (8, 12)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, *size), generator=generator)
    return images.to(dtype), torch.randint(0, 5, (count,), generator=generator)


def reversed_order(count: int) -> torch.Tensor:
    """Places of the images in a batch whose reverse pairs those that are neighbours here: 0, 2, 4, 5, 3, 1."""
    return torch.tensor([*range(0, count, 2), *range(count - 1, 0, -2)])


# Mixing


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("draw", [MIXUP, CUTMIX, MixDraw(1.0, None)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_timm_on_a_reordered_batch(dtype, draw, smoothing, monkeypatch):
    images, labels = batch(dtype=dtype)
    order = reversed_order(6)
    theirs = timm_mixup.Mixup(0.8, 1.0, label_smoothing=smoothing, num_classes=5)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (draw.lam, draw.box is not None))
    if draw.box is not None:
        top, left, height, width = draw.box
        monkeypatch.setattr(timm_mixup, "rand_bbox", lambda *_, **__: (top, top + height, left, left + width))
    expected_images, expected_targets = theirs(images[order].float(), labels[order])
    mixed, targets = mix(images, labels, 5, draw, smoothing)
    # Two products and a sum in fp32 on levels up to 255, perhaps fused: one rounding, 2^-16, apart.
    torch.testing.assert_close(mixed[order], expected_images, rtol=0, atol=2**-15)
    torch.testing.assert_close(targets[order], expected_targets, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.float64])
def test_formulas(dtype):
    images, labels = batch(dtype=dtype)
    values, one_hot = images.double().numpy(), np.eye(5)[labels.numpy()]
    partner = [1, 0, 3, 2, 5, 4]
    mixed, targets = mix(images, labels, 5, MIXUP)
    assert mixed.dtype == targets.dtype == torch.float32
    assert np.abs(mixed.numpy() - (0.3 * values + 0.7 * values[partner])).max() < 2**-15  # as above
    assert np.abs(targets.numpy() - (0.3 * one_hot + 0.7 * one_hot[partner])).max() < 1e-7
    mixed, targets = mix(images, labels, 5, CUTMIX)
    assert mixed.dtype == targets.dtype == torch.float32
    expected = values.copy()
    expected[:, :, 2:6, 3:8] = values[partner][:, :, 2:6, 3:8]
    assert np.array_equal(mixed.numpy(), expected)
    assert np.abs(targets.numpy() - (76 * one_hot + 20 * one_hot[partner]) / 96).max() < 1e-7


@pytest.mark.parametrize("draw", [MIXUP, CUTMIX, MixDraw(1.0, None)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_input_is_left_alone(draw, dtype):
    images, labels = batch(dtype=dtype)
    before = images.clone(), labels.clone()
    mixed, _ = mix(images, labels, 5, draw, 0.1)
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])
    assert mixed.data_ptr() != images.data_ptr()


@pytest.mark.parametrize("draw", [MIXUP, CUTMIX])
def test_how_a_batch_is_divided_does_not_matter(draw):
    images, labels = batch(12)
    whole = mix(images, labels, 5, draw, 0.1)
    for share in (2, 4, 6):
        parts = [mix(i, k, 5, draw, 0.1) for i, k in zip(images.split(share), labels.split(share))]
        assert torch.equal(torch.cat([part[0] for part in parts]), whole[0])
        assert torch.equal(torch.cat([part[1] for part in parts]), whole[1])


@pytest.mark.parametrize("draw", [MIXUP, CUTMIX, MixDraw(1.0, None)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_no_value_is_asked_of_the_device(draw, dtype):
    """Tensors of the meta device have no values: reading one raises."""
    images, labels = (tensor.to("meta") for tensor in batch(dtype=dtype))
    mixed, targets = mix(images, labels, 5, draw, 0.1)
    assert mixed.shape == images.shape
    assert targets.shape == (6, 5)


@pytest.mark.parametrize("draw", [MIXUP, CUTMIX, MixDraw(1.0, None)])
def test_an_odd_batch_is_refused(draw):
    with pytest.raises(ValueError, match=r"7 images .* even"):
        mix(*batch(7), 5, draw)


# Targets


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_smoothing_equals_timm(smoothing):
    labels = torch.tensor([3, 0, 4, 4])
    targets = smooth_targets(labels, 5, smoothing)
    assert torch.equal(targets, timm_mixup.mixup_target(labels, 5, smoothing=smoothing))
    expected = (1 - smoothing) * np.eye(5)[labels.numpy()] + smoothing / 5
    assert np.abs(targets.numpy() - expected).max() < 1e-7  # fp32 of numbers up to 1


# The draw


def draws(count: int = 3000, size: tuple[int, int] = (96, 64), **options) -> list[MixDraw]:
    return [draw_mix(7, step, size, **options) for step in range(count)]


def timm_draws(count: int = 3000, size: tuple[int, int] = (96, 64), **options) -> list[MixDraw]:
    theirs = timm_mixup.Mixup(**options)
    np.random.seed(0)  # noqa: NPY002
    result = []
    for _ in range(count):
        lam, cut = theirs._params_per_batch()
        box = None
        if cut:
            (top, bottom, left, right), lam = timm_mixup.cutmix_bbox_and_lam((6, 3, *size), lam)
            box = (int(top), int(left), int(bottom - top), int(right - left))
        result.append(MixDraw(float(lam), box))
    return result


def test_a_draw_is_a_function_of_seed_and_step():
    first = draws(50)
    torch.manual_seed(3)
    assert draws(50)[::-1] == [draw_mix(7, step, (96, 64)) for step in reversed(range(50))]
    assert len({draw.lam for draw in first}) > 45
    assert [draw_mix(8, step, (96, 64)) for step in range(50)] != first
    assert all(type(draw.lam) is float for draw in first)


@pytest.mark.parametrize(
    "options",
    [
        {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
        {"mixup_alpha": 0.2, "cutmix_alpha": 0.5, "switch": 0.2},
        {"mixup_alpha": 0.4, "cutmix_alpha": 0.0},
        {"mixup_alpha": 0.0, "cutmix_alpha": 0.7},
        {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "probability": 0.3},
    ],
)
def test_draws_are_distributed_as_timms(options):
    probability, switch = options.pop("probability", 1.0), options.pop("switch", 0.5)
    ours = draws(**options, probability=probability, switch_probability=switch)
    theirs = timm_draws(**options, prob=probability, switch_prob=switch)
    kinds = [
        [sum(draw.box is None and draw.lam != 1 for draw in some), sum(draw.box is not None for draw in some)]
        for some in (ours, theirs)
    ]
    # 5 standard errors of a difference of two counts of 3000.
    assert np.abs(np.subtract(kinds[0], kinds[1])).max() <= 5 * np.sqrt(2 * 3000 / 4)
    assert sum(kinds[0]) == pytest.approx(3000 * probability, abs=5 * np.sqrt(3000 * probability * (1 - probability)))
    for boxed in (False, True):
        some, others = (
            [d for d in many if (d.box is not None) == boxed and (boxed or d.lam != 1)] for many in (ours, theirs)
        )
        assert (len(some) > 200) == (len(others) > 200)
        if not some:
            continue
        values = [np.array([(d.lam, *(d.box or ())) for d in many]).T for many in (some, others)]
        for mine, his in zip(*values):
            # Fixed seeds: constants, not chance. A box of ratio 1 - lam, or an uncorrected lam, gives < 1e-6.
            assert stats.ks_2samp(mine, his).pvalue > 1e-3


def test_lam_is_beta_distributed():
    lams = [draw.lam for draw in draws(mixup_alpha=0.8, cutmix_alpha=0.0)]
    assert stats.kstest(lams, stats.beta(0.8, 0.8).cdf).pvalue > 1e-3


def test_nothing_is_mixed_without_a_probability_or_an_alpha():
    assert set(draws(50, probability=0.0)) == {MixDraw(1.0, None)}
    assert set(draws(50, mixup_alpha=0.0, cutmix_alpha=0.0)) == {MixDraw(1.0, None)}


def test_lam_is_the_share_outside_of_the_box():
    for draw in draws(300, mixup_alpha=0.0):
        assert draw.box is not None
        outside = np.ones((96, 64))
        top, left, height, width = draw.box
        outside[top : top + height, left : left + width] = 0
        assert draw.lam == pytest.approx(outside.mean(), abs=1e-12)


@pytest.mark.parametrize("size", [(96, 64), (7, 9)])
@pytest.mark.parametrize("lam", [0.0, 0.013, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("centre", [(0, 0), (3, 8), (6, 4)])
def test_boxes_equal_timms(size, lam, centre, monkeypatch):
    middles = iter(centre)
    monkeypatch.setattr(np.random, "randint", lambda *_, **__: next(middles))
    top, bottom, left, right = timm_mixup.rand_bbox((1, 3, *size), lam)
    assert cutmix_box(size, lam, centre) == (top, left, bottom - top, right - left)


def test_steps_do_not_repeat_the_order_of_the_images():
    """Step k and pass k share a Philox key; their counters keep them apart."""
    order = np.random.Generator(np.random.Philox(key=[7, 3])).random(100)
    drawn = np.random.Generator(np.random.Philox(key=[7, 3], counter=[0, 0, 0, 1])).random(100)
    assert not np.isin(drawn, order).any()
    box = draw_mix(7, 3, (10**6, 10**6), mixup_alpha=0.0).box
    assert box is not None
    assert box[0] + box[2] // 2 not in {int(value * 10**6) for value in order}
