"""Crop boxes decoded alone, against whole decodes; needs a TurboJPEG of version 3."""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from sklearn.datasets import load_sample_images

from mae_et.config import ConfigError
from mae_et.data import scaled
from mae_et.data.archives import ArraySource
from mae_et.data.decode import ImageError, decode_image, read_jpeg_header
from mae_et.data.files import FileSource
from mae_et.data.loader import RequestDataset
from mae_et.data.requests import SampleRequest
from mae_et.data.scaled import SCALED, TORCHVISION, TURBOJPEG, RegionDataset, build_dataset, decode_box
from mae_et.data.transforms import METHODS, CropTransform

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture
def _turbojpeg():
    try:
        scaled._library()
    except OSError as error:
        pytest.skip(f"{error}: pip install turbojpeg")


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(number: int = 0, width: int = 250, height: int = 187) -> Image.Image:
    """A photo of no even size."""
    return Image.fromarray(load_sample_images().images[number]).resize((width, height), Image.Resampling.LANCZOS)


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def boxed(data: bytes, box: tuple[int, int, int, int], size: tuple[int, int] | None = None, channels: int = 3):
    header = read_jpeg_header(data)
    assert header is not None
    return decode_box(data, header, box, size, channels)


def source_of(folder: Path, files: list[bytes], **options) -> FileSource:
    for i, data in enumerate(files):
        (folder / f"{i}.jpg").write_bytes(data)
    return FileSource("files", folder, [f"{i}.jpg" for i in range(len(files))], **options)


def asked(count: int, size: int = 24, seed: int = 0) -> list[SampleRequest]:
    return [SampleRequest(i, (size, size), 0.0, 1000 * seed + i) for i in range(count)]


FORMS = {
    "4:2:0": {"subsampling": "4:2:0"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:4:4": {"subsampling": "4:4:4"},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "RGB": {"keep_rgb": True},
}


@pytest.mark.usefixtures("_turbojpeg")
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("form", [*FORMS, "grey"])
def test_a_box_has_the_pixels_of_a_whole_decode(form, channels):
    draws = np.random.default_rng(0)
    image = noise(75, 101).convert("L") if form == "grey" else noise(75, 101)
    data = encode(image, quality=90, **FORMS.get(form, {}))
    whole = decode_image(data, "x", channels)
    boxes = [(0, 0, 75, 101), (74, 100, 1, 1), (0, 0, 1, 1)]
    for _ in range(40):
        height, width = int(draws.integers(1, 76)), int(draws.integers(1, 102))
        boxes.append((int(draws.integers(0, 76 - height)), int(draws.integers(0, 102 - width)), height, width))
    for top, left, height, width in boxes:
        pixels = boxed(data, (top, left, height, width), channels=channels)
        assert pixels is not None
        expected = whole[:, top : top + height, left : left + width]
        # Equal with TurboJPEG 2.1.92 and torchvision 0.29; other versions of libjpeg differ by 1 to 2 levels. Noise has
        # chroma that differs by 100 levels from pixel to pixel: a missing column beside the box would show.
        assert (pixels.int() - expected.int()).abs().max() <= 2


@pytest.mark.usefixtures("_turbojpeg")
@pytest.mark.parametrize(("size", "eighths"), [((24, 8), 8), ((12, 4), 4), ((6, 2), 2), ((3, 1), 1)])
def test_a_scaled_box_lies_where_it_should(size, eighths):
    """On a plane of brightness; a map by the ratio of the sides, 41 to 6 px at 1/8, would be 4 px off at the end."""
    y, x = np.mgrid[0:61, 0:41]
    data = encode(Image.fromarray((20 + 2 * y + 2.5 * x).astype(np.uint8)), quality=100)
    top, left, height, width = box = (17, 23, 27, 11)
    pixels = boxed(data, box, size, channels=1)
    assert pixels is not None
    step = 8 / eighths
    first_y, first_x = math.floor(top / step), math.floor(left / step)
    assert pixels.shape[1:] == (math.ceil((top + height) / step) - first_y, math.ceil((left + width) / step) - first_x)
    rows = (np.arange(pixels.shape[1]) + first_y + 0.5)[:, None] * step - 0.5
    columns = (np.arange(pixels.shape[2]) + first_x + 0.5)[None] * step - 0.5
    # Rounding, and the planes of the image's blocks being cut to 8 bits: 1.5 levels.
    assert np.abs(pixels[0].numpy() - (20 + 2 * rows + 2.5 * columns)).max() <= 1.5


@pytest.mark.usefixtures("_turbojpeg")
def test_the_scale_keeps_the_box_no_smaller_than_what_it_becomes():
    data = encode(photo())
    for size in [(1, 1), (15, 20), (16, 20), (40, 80), (81, 100), (80, 101), (150, 190)]:
        pixels = boxed(data, (8, 16, 160, 200), size)
        assert pixels is not None
        assert pixels.shape[1] >= size[0]
        assert pixels.shape[2] >= size[1]


def lanczos(data: bytes, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    top, left, height, width = box
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(whole.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + width, top + height)))


@pytest.mark.usefixtures("_turbojpeg")
@pytest.mark.parametrize(
    ("decoder", "size", "snap", "bound"),
    # Measured: 0.027, 0.024; 0.10 as most boxes do not begin on the scaled image's pixels, 0.048 on multiples of 8 px;
    # 0.062 where only the largest boxes are scaled. The bounds leave a third for other photos than those measured on.
    [(TURBOJPEG, 96, 1, 0.036), (TURBOJPEG, 160, 1, 0.032), (SCALED, 96, 1, 0.14), (SCALED, 96, 8, 0.065),
     (SCALED, 160, 1, 0.085)],
)  # fmt: skip
def test_error_against_a_whole_decode_and_lanczos(decoder, size, snap, bound):
    """Relative L2 after normalisation, root mean square over crops, as in docs/performance.md."""
    crop, errors = CropTransform((224, 224)), []
    for i, form in enumerate(["4:2:0", "4:4:4"] * 8):
        image = photo(i % 2, 500, 333 + i)
        data = encode(image, quality=92, subsampling=form)
        box = crop.draw(image.height, image.width, i)[0]
        box = (box[0] // snap * snap, box[1] // snap * snap, box[2] // snap * snap, box[3] // snap * snap)
        pixels = boxed(data, box, (size, size) if decoder == SCALED else None)
        assert pixels is not None
        view = crop.of_crop(pixels, SampleRequest(0, (size, size), 0.0, 0), mirrored=False).permute(1, 2, 0).numpy()
        ours, expected = ((values / 255 - MEAN) / STD for values in (view, lanczos(data, box, size)))
        errors.append(np.linalg.norm(ours - expected) / np.linalg.norm(expected))
    assert np.sqrt(np.mean(np.square(errors))) < bound


@pytest.mark.usefixtures("_turbojpeg")
@pytest.mark.parametrize("method", METHODS)
def test_the_dataset_gives_what_a_whole_decode_gives(tmp_path, method):
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    upright = Image.Exif()
    upright[ExifTags.Base.Orientation] = 1
    files = [encode(photo()), encode(photo(1), exif=upright), encode(photo(), exif=turned), encode(photo(1), "PNG")]
    files += [encode(photo().convert("CMYK")), encode(photo()) + b"after the end", encode(photo().convert("L"))]
    source, transform = source_of(tmp_path, files), CropTransform((48, 48), method)
    plain, region = (build_dataset(source, transform, name, replace=False) for name in (TORCHVISION, TURBOJPEG))
    assert type(plain) is RequestDataset
    assert isinstance(region, RegionDataset)
    for seed in range(4):
        expected, batch = (each.__getitems__(asked(len(files), seed=seed)) for each in (plain, region))
        # As above, before the resize.
        assert (batch.images.int() - expected.images.int()).abs().max() <= 2
        assert batch.images.is_contiguous()


@pytest.mark.usefixtures("_turbojpeg")
def test_only_upright_jpegs_are_decoded_in_part(tmp_path, monkeypatch):
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 8
    damaged = encode(photo(), exif=turned).replace(b"Exif\0\0MM", b"Exif\0\0XX")
    files = [encode(photo()), encode(photo(), exif=turned), damaged, encode(photo(), "PNG")]
    whole = []
    monkeypatch.setattr(scaled, "decode_image", lambda data, *rest: whole.append(data) or decode_image(data, *rest))
    dataset = RegionDataset(source_of(tmp_path, files), CropTransform((48, 48)))
    dataset.__getitems__(asked(len(files)))
    assert whole == files[1:]


@pytest.mark.usefixtures("_turbojpeg")
def test_scaled_views_differ_little_and_boxes_not_at_all(tmp_path):
    source, transform = source_of(tmp_path, [encode(photo())] * 8), CropTransform((48, 48))
    plain, region = (build_dataset(source, transform, name, replace=False) for name in (TORCHVISION, SCALED))
    expected, batch = (each.__getitems__(asked(8)).images.double() for each in (plain, region))
    assert not torch.equal(expected, batch)
    # Another box or the other mirror image differs by half and more.
    assert (expected - batch).norm() / (expected - expected.mean()).norm() < 0.2


@pytest.mark.usefixtures("_turbojpeg")
@pytest.mark.parametrize("form", ["4:2:0", "progressive", "restarts"])
def test_a_file_cut_anywhere_is_refused(tmp_path, form):
    data = encode(photo(), **FORMS[form])
    for length in [*range(1, len(data) - 20, 397), *range(len(data) - 20, len(data))]:
        dataset = RegionDataset(source_of(tmp_path, [data[:length]]), CropTransform((48, 48), scale=(0.1, 0.1)))
        assert read_jpeg_header(data[:length]) is None or boxed(data[:length], (0, 0, 20, 100)) is None
        with pytest.raises(ImageError, match=r"0\.jpg: "):
            dataset.__getitems__(asked(1))


@pytest.mark.usefixtures("_turbojpeg")
def test_after_a_damaged_file_whole_ones_are_decoded_in_part_again():
    data = encode(photo())
    header, expected = read_jpeg_header(data), boxed(data, (0, 0, 20, 100))
    assert header is not None
    assert expected is not None
    for length in (30, 300, 398, 700, 5000):
        assert decode_box(data[:length] + b"\xff\xd9", header, (0, 0, 187, 250), None) is None
        pixels = boxed(data, (0, 0, 20, 100))
        assert pixels is not None
        assert torch.equal(pixels, expected)


@pytest.mark.usefixtures("_turbojpeg")
def test_damaged_files_give_pixels_or_an_image_error_and_nothing_else(tmp_path):
    draws = np.random.default_rng(0)
    refused = 0
    for trial in range(72):
        damaged = bytearray(encode(photo(width=60, height=50), **FORMS[list(FORMS)[trial % len(FORMS)]]))
        for place in draws.integers(0, len(damaged) if trial % 2 else 700, 4):
            damaged[place] = draws.integers(0, 256)
        dataset = RegionDataset(
            source_of(tmp_path, [bytes(damaged)], max_pixels=100_000), CropTransform((48, 48)), scaled=trial % 3 == 0
        )
        try:
            batch = dataset.__getitems__(asked(1))
        except ImageError:
            refused += 1
        else:
            assert batch.images.shape == (1, 3, 24, 24)
    assert 5 < refused < 67  # both things happened


@pytest.mark.usefixtures("_turbojpeg")
def test_too_many_pixels_are_refused(tmp_path):
    dataset = RegionDataset(source_of(tmp_path, [encode(photo())], max_pixels=46_749), CropTransform((48, 48)))
    with pytest.raises(ImageError, match=r"250 x 187 = 46750 pixels, above data\.max_pixels=46749"):
        dataset.__getitems__(asked(1))


@pytest.mark.usefixtures("_turbojpeg")
def test_the_dataset_reaches_workers_that_are_not_forked(tmp_path):
    dataset = RegionDataset(source_of(tmp_path, [encode(photo())]), CropTransform((48, 48)))
    first = dataset.__getitems__(asked(1))
    assert torch.equal(pickle.loads(pickle.dumps(dataset)).__getitems__(asked(1)).images, first.images)


def test_images_in_memory_have_nothing_to_decode():
    source = ArraySource(np.zeros((2, 8, 8, 3), np.uint8), [0, 1], "zeros")
    assert type(build_dataset(source, CropTransform((8, 8)), TURBOJPEG, replace=True)) is RequestDataset


def test_without_the_library_the_configuration_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(scaled, "_candidates", lambda: ["libturbojpeg-of-no-version.so", "libc.so.6"])
    scaled._library.cache_clear()
    source = source_of(tmp_path, [encode(photo())])
    with pytest.raises(ConfigError, match=r"data\.decoder=turbojpeg_scaled: .*pip install turbojpeg.*=torchvision"):
        build_dataset(source, CropTransform((48, 48)), SCALED, replace=True)
    scaled._library.cache_clear()
