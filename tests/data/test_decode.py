from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps
from torchvision.io import decode_jpeg

from mae_et.data import decode
from mae_et.data.decode import ImageError, decode_image, read_jpeg_header


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gradient(height: int = 48, width: int = 64) -> Image.Image:
    """A smooth coloured picture without any symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [255 * y / height, 255 * x / width, 255 * (x + 2 * y) / (width + 2 * height)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def noise(height: int = 48, width: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def hwc(tensor: torch.Tensor) -> np.ndarray:
    assert tensor.dtype == torch.uint8
    return tensor.permute(1, 2, 0).numpy().astype(int)


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises width x height RGB pixels and holds 1 kB of zeros."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def with_jpeg_size(data: bytes, width: int, height: int) -> bytes:
    at = data.index(b"\xff\xc0") + 5  # start of frame: marker, length, precision, height, width
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


# What the formats hold


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_the_pixels_back(kind):
    image = noise()
    assert np.array_equal(hwc(decode_image(encode(image, kind), "x")), np.asarray(image))


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_extreme_shapes(kind, size):
    pixels = decode_image(encode(Image.new("RGB", size, (200, 100, 50)), kind, **({"quality": 95})), "x")
    assert pixels.shape == (3, size[1], size[0])
    # One colour: JPEG's only error is the rounding of YCbCr and back, at most 2 levels.
    assert np.abs(hwc(pixels) - [200, 100, 50]).max() <= 2


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"keep_rgb": True}, {"quality": 20}]
)
def test_jpeg_equals_pil(options):
    data = encode(gradient(), "JPEG", **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    # The same algorithm (libjpeg's integer inverse DCT, smooth chroma upsampling) in two builds of the library: equal
    # here; older libjpeg-turbo versions differ from newer ones by 1 to 2 levels at chroma edges.
    assert np.abs(hwc(decode_image(data, "x")) - expected).max() <= 2


@pytest.mark.parametrize(("mode", "calls"), [("RGB", 1), ("L", 1), ("CMYK", 0)])
def test_photos_take_the_fast_decoder(monkeypatch, mode, calls):
    made = []

    def counted(*args, **options):
        made.append(args)
        return decode_jpeg(*args, **options)

    monkeypatch.setattr(decode, "decode_jpeg", counted)
    decode_image(encode(gradient().convert(mode), "JPEG"), "x")
    assert len(made) == calls


def test_photos_decode_as_pil_does(shared_data):
    files = sorted((shared_data / "clothing" / "val").rglob("*.jpg"))[::20]
    assert len(files) > 10
    for file in files:
        data = file.read_bytes()
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert isinstance(expected, Image.Image)
        # As above; measured 0 with torchvision 0.29 and Pillow 13.
        assert np.abs(hwc(decode_image(data, str(file))) - np.asarray(expected.convert("RGB"))).max() <= 2
        grey = hwc(decode_image(data, str(file), channels=1))
        # The JPEG's own Y against PIL's luma of clipped RGB: they part only where a colour is out of range.
        assert np.abs(grey[..., 0] - np.asarray(expected.convert("L"))).mean() < 0.5


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"comment": b"\xff\xc0" * 9}, {"icc_profile": bytes(70_000)}]
)
def test_header_of_a_plain_jpeg(mode, options):
    header = read_jpeg_header(encode(gradient(300, 513).convert(mode), "JPEG", **options))
    assert header is not None
    assert (header.width, header.height, header.upright) == (513, 300, True)


@pytest.mark.parametrize(("orientation", "upright"), [(1, True), (3, False), (6, False), (0, False)])
def test_header_tells_whether_the_image_is_turned(orientation, upright):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "a camera"
    exif[ExifTags.Base.Orientation] = orientation
    header = read_jpeg_header(encode(gradient(), "JPEG", exif=exif))
    assert header is not None
    assert header.upright is upright


def test_what_is_no_plain_jpeg_has_no_header():
    plain = encode(gradient(), "JPEG")
    at = plain.index(b"\xff\xc0")
    others = [
        plain[:at] + change + plain[at + len(change) :]
        for change in (b"\xff\xc9", b"\xff\xc0\x00\x11\x0c", b"\xff\xd9")
    ]
    for data in [encode(gradient(), "PNG"), encode(gradient().convert("CMYK"), "JPEG"), plain[: at + 9], b"", *others]:
        assert read_jpeg_header(data) is None
    assert read_jpeg_header(plain, max_pixels=48 * 64) is not None
    assert read_jpeg_header(plain, max_pixels=48 * 64 - 1) is None


@pytest.mark.parametrize("marker", [b"\xff\xff", b"\xff\x01", b"\xff\xd0"])
def test_the_header_is_the_one_that_libjpeg_finds(marker):
    """Fill bytes, and markers without a length: read as if they had one, they lead to a small header in a comment."""
    plain, length = encode(gradient(), "JPEG"), 0xFF00
    small = b"\xff\xc0\x00\x11\x08\x00\x01\x00\x01\x03" + bytes(9)
    comment = b"\xff\xfe" + length.to_bytes(2, "big") + bytes(length - 2)
    if marker == b"\xff\xff":
        comment = comment[1:]  # its own 0xff is the second fill byte
    data = bytearray(plain[:2] + marker + comment + comment[-length - 2 :] + plain[2:])
    end = 4 + int.from_bytes(data[4:6], "big")
    data[end : end + len(small)] = small
    assert read_jpeg_header(bytes(data)) is None
    with pytest.raises(ImageError, match=r"above data\.max_pixels=100|not an image"):
        decode_image(bytes(data), "x", max_pixels=100)


def test_cmyk_jpeg():
    data = encode(gradient().convert("CMYK"), "JPEG", quality=95)
    pixels = hwc(decode_image(data, "x"))
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    # And they are the colours that went in, not their negative: quality 95 keeps them to a few levels.
    assert np.abs(pixels - np.asarray(gradient())).mean() < 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_grey_is_repeated_for_rgb_and_kept_for_luma(kind):
    data = encode(gradient().convert("L"), kind)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(hwc(decode_image(data, "x", channels=1))[..., 0], expected)
    assert np.array_equal(hwc(decode_image(data, "x")), np.repeat(expected[..., None], 3, 2))


def test_luma_of_colour():
    weights = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    grey = hwc(decode_image(encode(noise(), "PNG"), "x", channels=1))[..., 0]
    assert np.abs(grey - np.asarray(noise()) @ weights).max() <= 0.51  # rounding


def test_one_bit():
    bits = np.random.default_rng(0).random((9, 13)) < 0.5
    pixels = hwc(decode_image(encode(Image.fromarray(bits), "PNG"), "x"))
    assert np.array_equal(pixels, np.repeat(bits[..., None] * 255, 3, 2))


def test_palette():
    image = noise().quantize(200)
    assert np.array_equal(hwc(decode_image(encode(image, "PNG"), "x")), np.asarray(image.convert("RGB")))


def test_palette_with_one_transparent_colour_becomes_white_there():
    image = Image.new("P", (4, 2), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((2, 1), 0)
    expected = np.full((2, 4, 3), [40, 50, 60])
    expected[1, 2] = 255
    assert np.array_equal(hwc(decode_image(encode(image, "PNG", transparency=0), "x")), expected)


def test_palette_with_degrees_of_transparency():
    image = Image.new("P", (2, 1), 0)
    image.putpalette([0, 0, 0, 100, 0, 0])
    image.putpixel((1, 0), 1)
    pixels = hwc(decode_image(encode(image, "PNG", transparency=bytes([51, 255])), "x"))
    # Black at 20 % on white is 0.8 * 255.
    assert pixels.tolist() == [[[204, 204, 204], [100, 0, 0]]]


def test_rgb_with_a_transparent_colour():
    image = Image.new("RGB", (3, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    pixels = hwc(decode_image(encode(image, "PNG", transparency=(1, 2, 3)), "x"))
    assert pixels.tolist() == [[[255] * 3, [9] * 3, [255] * 3]]


@pytest.mark.parametrize(("mode", "kind"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "TIFF")])
def test_alpha_is_composited_on_white(mode, kind):
    values = np.random.default_rng(1).integers(0, 256, (20, 30, len(mode)), dtype=np.uint8)
    pixels = hwc(decode_image(encode(Image.fromarray(values), kind), "x"))
    alpha = values[..., -1:] / 255
    expected = values[..., :-1] * alpha + 255 * (1 - alpha)
    # PIL composites in integers of a bit more than 8 bits.
    assert np.abs(pixels - expected).max() <= 1


@pytest.mark.parametrize(("kind", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")])
def test_sixteen_bit_grey_is_rescaled(kind, dtype):
    ramp = np.arange(65536).reshape(256, 256)
    image = Image.frombytes("I;16" if dtype == "<u2" else "I;16B", (256, 256), ramp.astype(dtype).tobytes())
    pixels = hwc(decode_image(encode(image, kind), "x", channels=1))[..., 0]
    assert np.array_equal(pixels, np.rint(ramp / 257))
    assert pixels.mean() == pytest.approx(127.5, abs=0.1)  # `convert("RGB")` gives 254.6


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),  # within [0, 1]: times 255
        ([0.2, 0.2, 0.4], [51, 51, 102]),
        ([-10.0, 0.0, 30.0], [0, 64, 255]),  # else the range is stretched
        ([0.0, 1000.0, 4000.0], [0, 64, 255]),
        ([float("nan"), 0.0, float("inf")], [0, 0, 255]),
        ([float("nan"), 2.0, 4.0], [0, 0, 255]),
        ([7.0, 7.0, 7.0], [0, 0, 0]),
        ([float("nan")] * 3, [0, 0, 0]),
    ],
)
def test_float_tiff(values, expected):
    image = Image.fromarray(np.array([values], np.float32))
    assert image.mode == "F"
    assert hwc(decode_image(encode(image, "TIFF"), "x", channels=1))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0, 257, 65535], [0, 1, 255]), ([-100, 0, 100_000], [0, 0, 255]), ([-100, -50, 100], [0, 64, 255])],
)
def test_grey_of_32_bit_integers(values, expected):
    image = Image.fromarray(np.array([values], np.int32))
    assert hwc(decode_image(encode(image, "TIFF"), "x", channels=1))[0, :, 0].tolist() == expected


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in [(250, 0, 0), (0, 250, 0), (0, 0, 250)]]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=10)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.array_equal(hwc(decode_image(data, "x")), np.full((8, 8, 3), [250, 0, 0]))


# Orientation

UPRIGHT = {  # what each EXIF orientation says the stored rows and columns are, undone with NumPy
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation(kind, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encode(gradient(), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    pixels = hwc(decode_image(data, "x"))
    assert pixels.shape == UPRIGHT[orientation](np.asarray(gradient())).shape
    # Lossless but for JPEG, whose error on a gradient at quality 75 is a few levels.
    assert np.abs(pixels - UPRIGHT[orientation](np.asarray(gradient()))).max() <= (12 if kind == "JPEG" else 0)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert isinstance(upright, Image.Image)
    assert np.abs(pixels - np.asarray(upright)).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_orientation_of_sixteen_bit_grey(kind):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    ramp = np.arange(0, 6000, 10, dtype=np.uint16).reshape(20, 30) * 10
    pixels = hwc(decode_image(encode(Image.fromarray(ramp), kind, exif=exif), "x", channels=1))[..., 0]
    assert np.array_equal(pixels, np.rint(np.rot90(ramp, -1) / 257))


# What is refused, and how


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_jpeg_cut_anywhere_is_refused(options):
    data = encode(noise(), "JPEG", **options)
    for length in [*range(1, len(data) - 20, 53), *range(len(data) - 20, len(data))]:
        with pytest.raises(ImageError, match=r"^photos/cut\.jpg: "):
            decode_image(data[:length], "photos/cut.jpg")


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_other_formats_cut_anywhere_in_their_pixels_are_refused(kind):
    data = encode(noise(), kind)
    # PNG ends in 4 bytes of check sum and 12 of IEND, GIF in a terminator: without those all pixels are there. TIFF's
    # directory lies behind its pixels.
    for length in range(1, len(data) - 40, 97):
        with pytest.raises(ImageError, match=r"^photos/cut: "):
            decode_image(data[:length], "photos/cut")


def test_truncation_is_named():
    data = encode(noise(), "JPEG")
    with pytest.raises(ImageError, match="truncated"):
        decode_image(data[:-1], "x")
    with pytest.raises(ImageError, match="truncated"):
        decode_image(encode(noise(), "PNG")[:2000], "x")


def test_messages_leave_out_the_decoders_source_lines():
    with pytest.raises(ImageError) as caught:
        decode_image(encode(noise(), "JPEG")[:-1], "x.jpg")
    assert ".cpp" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML page"),
        (b"\n  <html><head>", "HTML page"),
        (b'<?xml version="1.0"?><svg></svg>', "SVG"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        (bytes(range(1, 200)), "begins with the bytes 01 02 03"),
        (b"\xff\xd8\xff", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),  # PIL would start Ghostscript
    ],
)
def test_what_is_no_image_is_described(data, reason):
    with pytest.raises(ImageError, match=reason) as caught:
        decode_image(data, "folder/broken.jpg")
    assert str(caught.value).startswith("folder/broken.jpg: ")


def test_the_error_is_a_value_error():
    assert issubclass(ImageError, ValueError)


@pytest.fixture
def _nothing_is_decoded(monkeypatch):
    def forbidden(*_args, **_options):
        raise AssertionError("decoded before the number of pixels was checked")

    monkeypatch.setattr(ImageFile.ImageFile, "load", forbidden)
    monkeypatch.setattr(decode, "decode_jpeg", forbidden)


@pytest.mark.usefixtures("_nothing_is_decoded")
@pytest.mark.parametrize(
    "data",
    [
        png_header(10_001, 10_000),  # just above the default cap
        png_header(13_000, 13_000),  # PIL warns
        png_header(100_000, 100_000),  # PIL refuses
        with_jpeg_size(encode(noise(), "JPEG"), 12_000, 12_000),
        with_jpeg_size(encode(noise(), "JPEG"), 65_000, 65_000),
    ],
)
def test_too_many_pixels_are_refused_from_the_header(data):
    with pytest.raises(ImageError, match=r"^bomb\.png: too many pixels: .*data\.max_pixels=100000000"):
        decode_image(data, "bomb.png")


def test_the_cap_is_inclusive_and_can_be_set():
    data = encode(noise(10, 10), "PNG")
    assert decode_image(data, "x", max_pixels=100).shape == (3, 10, 10)
    with pytest.raises(ImageError, match=r"10 x 10 = 100 pixels, above data\.max_pixels=99"):
        decode_image(data, "x", max_pixels=99)


def test_between_pils_warning_and_its_refusal_our_cap_rules(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)  # it warns above, raises above twice that
    image = noise(10, 10)
    assert np.array_equal(hwc(decode_image(encode(image, "PNG"), "x")), np.asarray(image))
    assert Image.MAX_IMAGE_PIXELS == 60


def test_damaged_files_give_pixels_or_an_image_error_and_nothing_else():
    generator = np.random.default_rng(0)
    image = noise(24, 24)
    files = [encode(image, kind) for kind in ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]]
    files += [encode(image, "TIFF", compression="tiff_lzw"), encode(image.quantize(16), "PNG")]
    refused = 0
    for data in files:
        for _ in range(40):
            damaged = bytearray(data)
            for place in generator.integers(0, len(data), 4):
                damaged[place] = generator.integers(0, 256)
            try:
                pixels = decode_image(bytes(damaged), "x", max_pixels=100_000)
            except ImageError:
                refused += 1
            else:
                assert pixels.dtype == torch.uint8
                assert pixels.shape[0] == 3
                assert pixels.numel() > 0
    assert 20 < refused < 9 * 40  # both things happened


def test_unknown_number_of_channels():
    with pytest.raises(ValueError, match="channels=4"):
        decode_image(encode(noise(), "PNG"), "x", channels=4)


def test_layout_is_the_one_torch_resizes_fastest(tmp_path: Path):
    for kind in ["PNG", "JPEG"]:
        assert decode_image(encode(noise(), kind), "x").stride(0) == 1
