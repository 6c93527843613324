from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data.auto_augment import RandAugment as TimmRandAugment
from timm.data.random_erasing import RandomErasing as TimmRandomErasing
from timm.data.transforms_factory import create_transform

from mae_et.data.augment import RandAugment, RandomErasing, TrainTransform, python_random
from mae_et.data.randomness import sample_seed
from mae_et.data.requests import SampleRequest
from mae_et.data.transforms import METHODS, CropTransform, from_pil, to_pil

FOURIER = ("fourier", "fourier_pixel0")
GREY = {"mean": (0.286,), "std": (0.353,)}
OPERATIONS = RandAugment((0.5,)).names


def request(seed: int, size: tuple[int, int] = (32, 32), magnitude: float = 9.0) -> SampleRequest:
    return SampleRequest(image=0, size=size, magnitude=magnitude, seed=sample_seed(0, seed))


def picture(channels: int = 3, height: int = 90, width: int = 120) -> torch.Tensor:
    """Smooth and bright on one side, so that moving, turning and recolouring it shows; with some noise."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.linspace(0, 2, height)[:, None], torch.linspace(0, 3, width)
    waves = torch.stack([(rows * (c + 1)).cos() * (columns + c).sin() for c in range(channels)])
    return (60 * waves + 130 + 15 * torch.rand(channels, height, width, generator=generator)).to(torch.uint8)


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.mode == other.mode and one.size == other.size and one.tobytes() == other.tobytes()


def options(channels: int) -> dict:
    return GREY if channels == 1 else {}


def random_states() -> tuple:
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002


def timm_augment(names: list[str], seed: int, magnitude: int, monkeypatch) -> TimmRandAugment:
    """timm's RandAugment as a training script builds it, about to choose `names` and draw from `seed`."""
    chain = create_transform(224, True, auto_augment=f"rand-m{magnitude}-mstd0.5-inc1", interpolation="bicubic")
    theirs = next(step for step in chain.transforms if isinstance(step, TimmRandAugment))  # pyright: ignore
    by_name = {operation.name: operation for operation in theirs.ops}
    monkeypatch.setattr(np.random, "choice", lambda _ops, n, replace, p: [by_name[name] for name in names])
    random.seed(seed)
    return theirs


# What comes out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (48, 64)])
def test_shape_and_layout(method, channels, size):
    transform = TrainTransform((48, 64), method, erasing=1.0, **options(channels))
    for seed in range(6):
        view = transform(picture(channels), request(seed, size))
        assert view.shape == (channels, *((48, 64) if method in FOURIER else size))
        assert view.dtype == torch.uint8
        assert view.is_contiguous()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_view_is_a_function_of_image_and_request(method, channels):
    transform = TrainTransform((64, 64), method, erasing=0.5, **options(channels))
    image = picture(channels)
    before = image.clone()
    requests = [request(seed, magnitude=seed % 10) for seed in range(40)]
    views = [transform(image, one) for one in requests]
    copy = pickle.loads(pickle.dumps(transform))
    random.seed(1)
    for one, view in reversed(list(zip(requests, views))):
        assert torch.equal(copy(image, one), view)
    assert torch.equal(image, before)
    assert len({view.numpy().tobytes() for view in views}) == len(views)


def test_global_generators_are_left_alone():
    random.gauss(0, 1)  # draws two numbers and keeps one for the next call: state as well
    np.random.standard_normal()  # noqa: NPY002
    before = random_states()
    transform = TrainTransform((64, 64), erasing=1.0)
    for seed in range(10):
        transform(picture(), request(seed))
    assert random_states() == before


def test_the_generator_is_restored_after_an_error():
    before = random.getstate()
    with pytest.raises(KeyError), python_random(3):
        {}[random.random()]
    assert random.getstate() == before


@pytest.mark.parametrize("method", METHODS)
def test_all_off_is_crop_and_flip(method):
    transform = TrainTransform((64, 64), method, randaugment=False, erasing=0.0)
    for seed in range(10):
        expected = CropTransform((64, 64), method, scale=(0.08, 1.0))(picture(), request(seed))
        assert torch.equal(transform(picture(), request(seed)), expected)


@pytest.mark.parametrize(
    ("image", "settings", "message"),
    [
        (None, {"mean": (0.5,)}, "one number per channel in both"),
        (picture(1), {}, "1 channels and a mean of 3"),
        (picture(3), GREY, "3 channels and a mean of 1"),
    ],
)
def test_statistics_must_fit_the_image(image, settings, message):
    with pytest.raises(ValueError, match=message):
        TrainTransform((64, 64), **settings)(image, request(0))


# RandAugment


@pytest.mark.parametrize("seed", range(12))
def test_the_released_chain_to_the_bit(seed, monkeypatch):
    """Crop, flip, timm's RandAugment at the final size, Lanczos: in PIL alone."""
    transform = TrainTransform((64, 64), "lanczos", erasing=0.0)
    image, one = picture(), request(seed, magnitude=7)
    (top, left, height, width), mirrored = transform.crop.draw(90, 120, one.seed)
    view = to_pil(image).crop((left, top, left + width, top + height)).resize((64, 64), Image.Resampling.BICUBIC)
    if mirrored:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert transform.augment is not None
    names, inner = transform.augment.draw(one.seed)
    view = timm_augment(names, inner, 7, monkeypatch)(view).resize((32, 32), Image.Resampling.LANCZOS)
    assert torch.equal(transform(image, one), from_pil(view))


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_timms(name, monkeypatch):
    ours = RandAugment((0.485, 0.456, 0.406))
    ours.names = [name]
    view, changed = to_pil(picture()), 0
    for seed in range(8):
        _, inner = ours.draw(request(seed).seed)
        expected = timm_augment([name, name], inner, 9, monkeypatch)(view)
        assert same(ours(view, request(seed)), expected)
        changed += not same(expected, view)
    assert changed


@pytest.mark.parametrize("method", METHODS)
def test_the_size_at_which_each_method_augments(method, monkeypatch):
    transform = TrainTransform((64, 64), method, erasing=0.0)
    sizes = []

    class Spy(RandAugment):
        def __call__(self, view, request):
            sizes.append(view.size)
            return view

    monkeypatch.setattr(transform, "augment", Spy((0.5, 0.5, 0.5)))
    transform(picture(), request(1, (24, 40)))
    assert sizes == [(40, 24) if method == "resize" else (64, 64)]


def test_our_names_are_timms_increasing_operations():
    chain = create_transform(224, True, auto_augment="rand-m9-mstd0.5-inc1")
    theirs = next(step for step in chain.transforms if isinstance(step, TimmRandAugment))  # pyright: ignore
    assert [operation.name for operation in theirs.ops] == OPERATIONS
    assert len(OPERATIONS) == 15
    assert theirs.num_layers == RandAugment.OPERATIONS


def test_operations_are_drawn_evenly_and_independently():
    augment = RandAugment((0.5,))
    drawn = np.array([[OPERATIONS.index(name) for name in augment.draw(sample_seed(0, i))[0]] for i in range(9000)])
    pairs = np.bincount(drawn[:, 0] * 15 + drawn[:, 1], minlength=225)
    # Fixed seeds: a constant. Without replacement the diagonal is empty and the p-value below 1e-100.
    assert stats.chisquare(pairs).pvalue > 1e-3


def test_staircase_rounds_the_magnitude_down():
    smooth, stairs = RandAugment((0.5,) * 3), RandAugment((0.5,) * 3, staircase=True)
    view, differing = to_pil(picture()), 0
    for seed in range(30):
        floor = smooth(view, request(seed, magnitude=5.0))
        assert same(stairs(view, request(seed, magnitude=5.9)), floor)
        assert same(stairs(view, request(seed, magnitude=5.0)), floor)
        differing += not same(smooth(view, request(seed, magnitude=5.9)), floor)
    assert differing > 10


@pytest.mark.parametrize("channels", [1, 3])
def test_strength_rises_with_the_magnitude(channels):
    augment, view = RandAugment((0.5,) * channels, magnitude_std=0.0), to_pil(picture(channels))
    strengths = [
        np.mean(
            [
                np.abs(np.asarray(augment(view, request(seed, magnitude=magnitude))).astype(int) - view).mean()
                for seed in range(150)
            ]
        )
        for magnitude in (0.0, 2.5, 5.0, 7.5, 10.0)
    ]
    assert np.all(np.diff(strengths) > 0)
    assert strengths[-1] > 1.5 * strengths[0]


@pytest.mark.parametrize("std", [0.0, 0.5, 1.0])
def test_the_spread_of_the_magnitude(std, monkeypatch):
    """A picture turns by 3 degrees per unit of magnitude: the angles of a spot show the magnitudes."""
    view = Image.new("L", (101, 101))
    view.paste(255, (86, 46, 95, 55))
    augment = RandAugment((0.0,), magnitude_std=std)
    augment.names = ["Rotate"]
    monkeypatch.setattr(RandAugment, "OPERATIONS", 1)
    monkeypatch.setattr(RandAugment, "PROBABILITY", 1.0)
    offsets, angles = np.arange(101) - 50, []
    for seed in range(400):
        pixels = np.asarray(augment(view, request(seed, magnitude=5.0))).astype(float)
        angles.append(np.degrees(np.arctan2(abs(pixels.sum(1) @ offsets), pixels.sum(0) @ offsets)))
    # .1 px at a radius of 40 px is .15 degrees. 400 draws: standard errors of 5 % of the spread and 3.5 %.
    assert np.mean(angles) == pytest.approx(15, abs=0.15 + 4 * 0.05 * 3 * std)
    assert np.std(angles) == pytest.approx(3 * std, abs=0.15 + 4 * 0.035 * 3 * std)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("magnitude", [0.0, 10.0, 12.0])
def test_the_ends_of_the_range_of_magnitudes(name, channels, magnitude):
    augment, view = RandAugment((0.5,) * channels), to_pil(picture(channels))
    augment.names = [name]
    for seed in range(8):
        augmented = augment(view, request(seed, magnitude=magnitude))
        assert (augmented.mode, augmented.size) == (view.mode, view.size)


def test_posterising_keeps_a_bit():
    augment, view = RandAugment((0.5,) * 3, magnitude_std=0.0), to_pil(picture())
    augment.names = ["PosterizeIncreasing"]
    levels = [set(np.asarray(augment(view, request(seed, magnitude=10.0))).flat) for seed in range(12)]
    assert all(some == {0, 128} or some == set(np.asarray(view).flat) for some in levels)
    assert {0, 128} in levels


@pytest.mark.parametrize("name", OPERATIONS)
def test_grey_pictures_are_augmented_as_their_coloured_copies(name):
    grey, colour = RandAugment((0.286,)), RandAugment((0.286,) * 3)
    grey.names = colour.names = [name]
    view = to_pil(picture(1))
    for seed in range(10):
        ours = grey(view, request(seed))
        assert same(ours, colour(view.convert("RGB"), request(seed)).getchannel("G"))


# Erasing


def boxes_of(erase: RandomErasing, height: int, width: int, count: int) -> list:
    return [erase.draw(height, width, sample_seed(0, i)) for i in range(count)]


def timm_boxes(height: int, width: int, count: int, probability: float) -> list:
    erase = TimmRandomErasing(probability, mode="pixel", device="cpu")
    random.seed(0)
    boxes = []
    for _ in range(count):
        erased = erase(torch.full((1, height, width), 9e9))[0] != 9e9
        rows, columns = erased.any(1).nonzero(), erased.any(0).nonzero()
        boxes.append((rows[0].item(), columns[0].item(), len(rows), len(columns)) if len(rows) else None)
    return boxes


@pytest.mark.parametrize(("height", "width"), [(64, 64), (28, 28), (32, 90)])
def test_boxes_are_distributed_as_timms(height, width):
    count = 3000
    ours = boxes_of(RandomErasing(1.0, [0.5], [0.2]), height, width, count)
    theirs = timm_boxes(height, width, count, 1.0)
    # Where the picture is long, some boxes fit in none of the 10 tries.
    assert ours.count(None) == pytest.approx(theirs.count(None), abs=5 + 5 * np.sqrt(theirs.count(None)))
    ours, theirs = (np.array([box for box in boxes if box is not None]) for boxes in (ours, theirs))
    quantities = [
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 2] / b[:, 3],
        lambda b: b[:, 0] / (height - b[:, 2]),
        lambda b: b[:, 1] / (width - b[:, 3]),
    ]
    for quantity in quantities:
        # Fixed seeds: constants, not chance. A linear aspect or the side instead of the area gives < 1e-6.
        assert stats.ks_2samp(quantity(ours), quantity(theirs)).pvalue > 1e-3
    top, left, box_height, box_width = ours.T
    assert np.all((top >= 0) & (top + box_height <= height) & (left >= 0) & (left + box_width <= width))
    # Sides are rounded by at most half a pixel.
    assert np.all((box_height + 0.5) * (box_width + 0.5) >= 0.02 * height * width)
    assert np.all((box_height - 0.5) * (box_width - 0.5) <= height * width / 3)


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_a_share_of_the_images_is_erased(probability):
    count = 4000
    erased = sum(box is not None for box in boxes_of(RandomErasing(probability, [0.5], [0.2]), 32, 32, count))
    assert erased / count == pytest.approx(probability, abs=4 * np.sqrt(probability * (1 - probability) / count))


@pytest.mark.parametrize("method", METHODS)
def test_the_box_and_nothing_else_is_erased_at_the_size_that_leaves(method):
    crop = CropTransform((64, 64), method, scale=(0.08, 1.0))
    transform = TrainTransform((64, 64), method, randaugment=False, erasing=1.0)
    for seed in range(5):
        plain, view = crop(picture(), request(seed)), transform(picture(), request(seed))
        box = transform.erase.draw(plain.shape[1], plain.shape[2], request(seed).seed)
        assert box is not None
        top, left, height, width = box
        inside = torch.zeros(plain.shape[1:], dtype=torch.bool)
        inside[top : top + height, left : left + width] = True
        assert torch.equal(view[:, ~inside], plain[:, ~inside])
        # Noise meets the pixel's own level rarely: 1 in 150 at the mode of a normal law of std .226 * 255.
        assert (view[:, inside] != plain[:, inside]).float().mean() > 0.9


@pytest.mark.parametrize(
    ("mean", "std", "clamped"),
    [
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.029, 0.028, 0.040)),
        ((0.286,), (0.353,), (0.230,)),
    ],
)
def test_noise_is_timms_brought_back_to_levels(mean, std, clamped):
    erase = RandomErasing(1.0, mean, std)
    drawn = []
    for seed in range(40):
        view = torch.zeros(len(mean), 128, 128, dtype=torch.uint8)
        erase(view, sample_seed(0, seed))
        top, left, height, width = erase.draw(128, 128, sample_seed(0, seed)) or (0, 0, 0, 0)
        drawn.append(view[:, top : top + height, left : left + width].flatten(1))
    levels = torch.cat(drawn, dim=1).numpy()
    count = levels.shape[1]
    assert count > 50_000
    normal = np.random.default_rng(0).standard_normal(count)
    for channel, (m, s, share) in enumerate(zip(mean, std, clamped)):
        expected = np.clip(np.rint((normal * s + m) * 255), 0, 255)
        assert stats.ks_2samp(levels[channel], expected).pvalue > 1e-3
        # What timm's noise would put beyond black and white: the tails of the normal law, as the docstring says. At
        # most a level's worth of density (.4 / (std * 255)) more, for what rounds to 0 or 255 from within.
        beyond = stats.norm.cdf(-m / s) + stats.norm.sf((1 - m) / s)
        assert beyond == pytest.approx(share, abs=6e-4)
        assert np.isin(levels[channel], (0, 255)).mean() == pytest.approx(beyond, abs=0.004 + 4 * 0.42 / count**0.5)


def test_noise_of_samples_and_channels_is_independent():
    erase = RandomErasing(1.0, (0.5,) * 3, (0.1,) * 3)
    fields = []
    for seed in (1, 2):
        view = torch.zeros(3, 512, 512, dtype=torch.uint8)
        top, left, height, width = erase.draw(512, 512, seed) or (0, 0, 0, 0)
        noise = erase(view, seed)[:, top : top + height, left : left + width]
        fields += [channel.flatten()[:4000].numpy() for channel in noise]
    correlation = np.corrcoef(fields) - np.eye(6)
    assert np.abs(correlation).max() < 5 / np.sqrt(4000)
