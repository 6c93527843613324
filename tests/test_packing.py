"""`pack`: what becomes of images, the same bytes whoever packs them, and nothing half-written taken for whole."""

from __future__ import annotations

import os
import shutil
import signal
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from mae_et.__main__ import main
from mae_et.config import ConfigError
from mae_et.data.archives import ArraySource
from mae_et.data.packed import PackedSource
from mae_et.data.sources import open_source
from mae_et.packing.members import Namer, packed_bytes
from mae_et.packing.settings import Settings
from tests.data.stores import content, pack, write_photo, write_photos
from tests.end_to_end.tiny import run_here
from tests.engine.children import start_child, wait_child

SMALL = ("--short-side", "16")


@pytest.fixture(autouse=True, scope="module")
def _quick_disk():
    """A kill keeps the page cache, so its tests need not wait for the disk; what is synced when has its own test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory) -> dict[str, bytes]:
    """Every file of the store of the photos at 16 px."""
    store = tmp_path_factory.mktemp("stores") / "whole"
    assert pack(store, photos, *SMALL) == 0
    return content(store)


def members(store: Path, split: str = "train") -> dict[str, bytes]:
    """Every member of every shard, as the standard library reads them."""
    found = {}
    for shard in sorted((store / split).glob("*.zip")):
        with zipfile.ZipFile(shard) as archive:
            assert archive.testzip() is None
            found |= {name: archive.read(name) for name in archive.namelist()}
    return found


def opened(store: Path) -> PackedSource:
    source = open_source("packed", store)
    assert isinstance(source, PackedSource)
    return source


# What becomes of an image.


@pytest.mark.parametrize(
    ("size", "packed_size"),
    [((90, 60), (24, 16)), ((60, 90), (16, 24)), ((61, 40), (24, 16)), ((400, 17), (376, 16)), ((33, 33), (16, 16))],
)
def test_the_short_side_is_bounded_and_the_aspect_kept(tmp_path, size, packed_size):
    write_photo(tmp_path / "in" / "a.jpg", *size, quality=95)
    assert pack(tmp_path / "store", tmp_path / "in", *SMALL) == 0
    channels, height, width = opened(tmp_path / "store").image(0).shape
    assert (channels, width, height) == (3, *packed_size)


def test_what_is_small_is_not_enlarged_and_jpegs_keep_their_bytes(tmp_path):
    files = tmp_path / "in"
    for name, size in (("at.jpg", (20, 16)), ("below.jpeg", (9, 30)), ("below.png", (12, 10)), ("above.jpg", (17, 17))):
        write_photo(files / name, *size)
    write_photo(files / "named.png", 12, 10, format="JPEG")  # what a file is shows in its bytes, not its name
    assert pack(tmp_path / "store", files, *SMALL) == 0
    found = members(tmp_path / "store")
    assert sorted(found) == ["above.jpg", "at.jpg", "below.jpeg", "below.png.jpg", "named.png.jpg"]
    for name, kept in (("at.jpg", "at.jpg"), ("below.jpeg", "below.jpeg"), ("named.png.jpg", "named.png")):
        assert found[name] == (files / kept).read_bytes()
    for name, size in (("below.png.jpg", (12, 10)), ("above.jpg", (16, 16))):
        with Image.open(BytesIO(found[name])) as image:
            assert (image.format, image.size) == ("JPEG", size)


@pytest.mark.parametrize(("subsampling", "factor"), [("4:4:4", 1), ("4:2:0", 2)])
def test_pixels_are_those_of_an_antialiased_resize(tmp_path, subsampling, factor):
    write_photo(tmp_path / "in" / "a.png", 96, 72)
    assert pack(tmp_path / "store", tmp_path / "in", "--short-side", "36", "--subsampling", subsampling) == 0
    source = opened(tmp_path / "store")
    expected = BytesIO()
    with Image.open(tmp_path / "in" / "a.png") as image:
        resized = image.resize((48, 36), Image.Resampling.BICUBIC)  # PIL's is antialiased
        resized.save(expected, "JPEG", quality=90, subsampling=subsampling)
    # PIL's resize and torch's differ by a level here and there, which JPEG spreads over a block. Without antialiasing
    # the mean is 1.2, a px off it is 3.2, at quality 80 it is 3.4.
    assert np.abs(np.asarray(Image.open(expected), np.float64) - source.image(0).permute(1, 2, 0).numpy()).mean() < 0.3
    with Image.open(BytesIO(source.read(0))) as image:
        assert image.layer[0][1] == factor  # pyright: ignore[reportAttributeAccessIssue] - of Y, horizontally


def test_photos_are_packed_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    write_photo(tmp_path / "in" / "a.jpg", 60, 40, exif=exif, quality=95)
    assert pack(tmp_path / "store", tmp_path / "in", *SMALL) == 0
    assert opened(tmp_path / "store").image(0).shape == (3, 24, 16)


def test_quality_is_as_asked_for(photos, whole, tmp_path):
    assert pack(tmp_path / "store", photos, *SMALL, "--quality", "40") == 0
    assert len(members(tmp_path / "store")["ant/0.jpg"]) < len(opened_bytes(whole, tmp_path)["ant/0.jpg"])


def opened_bytes(files: dict[str, bytes], scratch: Path) -> dict[str, bytes]:
    for name, data in files.items():
        (scratch / "whole" / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / "whole" / name).write_bytes(data)
    return members(scratch / "whole")


def test_unpacked_shards_are_the_folder(photos, tmp_path):
    assert pack(tmp_path / "store", photos, "--keep-bytes") == 0
    for shard in (tmp_path / "store" / "train").glob("*.zip"):
        with zipfile.ZipFile(shard) as archive:
            archive.extractall(tmp_path / "unpacked")
    assert content(tmp_path / "unpacked") == content(photos / "train")


def test_lists_and_arrays_get_names_of_class_and_number(photos, tmp_path):
    images = sorted((photos / "train").rglob("*.jpg"))
    list_ = tmp_path / "photos.txt"
    list_.write_text("".join(f"{path}\t{path.parent.name}\n" for path in [*images[:6], images[0]]))
    assert pack(tmp_path / "store", list_, *SMALL) == 0
    assert list(members(tmp_path / "store")) == [
        *(f"ant/{i:08d}.jpg" for i in range(5)), "bee/00000005.jpg", "ant/00000006.jpg",
    ]  # fmt: skip
    assert opened(tmp_path / "store").labels.tolist() == [0] * 5 + [1, 0]
    source = ArraySource(np.full((2, 5, 5, 1), 7, np.uint8), [1, -1], "arrays", ("..", "T-shirt/top"), 3)
    for keep, names in ((True, ["T-shirt_top/00000000.png", "00000001.png"]), (False, None)):
        settings = Settings(256, 90, "4:4:4", keep, 4)
        namer = Namer("fashion_mnist", source, keep)
        assert [namer(i) for i in range(2)] == (names or ["T-shirt_top/00000000.jpg", "00000001.jpg"])
        with Image.open(BytesIO(packed_bytes(source, 0, settings, 100)[0])) as image:
            assert (image.format, image.size, image.getpixel((0, 0))) == ("PNG" if keep else "JPEG", (5, 5), (7, 7, 7))


def test_a_store_is_packed_again(photos, tmp_path):
    assert pack(tmp_path / "large", photos, "--keep-bytes") == 0
    assert main(["pack", str(tmp_path / "small"), "data.source=packed", f"data.root={tmp_path / 'large'}", *SMALL]) == 0
    assert list(members(tmp_path / "small")) == list(members(tmp_path / "large"))
    assert min(opened(tmp_path / "small").image(0).shape[1:]) == 16


# Who packs, and what interrupts it.


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_bytes_do_not_depend_on_the_workers(photos, whole, tmp_path, workers):
    assert pack(tmp_path, photos, *SMALL, "--workers", str(workers)) == 0
    assert content(tmp_path) == whole


CALLS = ((os, "fsync"), (os, "replace"), (os, "unlink"), (zipfile.ZipFile, "writestr"), (shutil, "rmtree"))


def killed(n: int, body: Callable[[], Any]) -> bool:
    """Whether `body`, run in a child, still reached its n-th call in CALLS; there it dies of SIGKILL."""
    left = n

    def hooked(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return real(*args, **kwargs)

        return call

    def with_hooks() -> None:
        for place, name in CALLS:
            setattr(place, name, hooked(getattr(place, name)))
        assert body() == 0

    code = wait_child(start_child(with_hooks))
    assert code in (0, -signal.SIGKILL)
    return code != 0


def test_a_kill_at_any_moment_leaves_whole_shards(photos, whole, tmp_path):
    n, opens = 0, []
    while True:
        store = tmp_path / str(n)
        was_killed = killed(n, lambda store=store: pack(store, photos, *SMALL))
        for name, data in content(store).items():
            if "/.packing/" not in f"/{name}":
                assert data == whole[name]  # under its name it is whole
        opens.append((store / "val" / "manifest.json").exists())
        assert pack(store, photos, *SMALL) == 0
        assert content(store) == whole
        if not was_killed:
            break
        n += 9  # meets every kind of call, of the first split and of the second
    assert n > 60
    assert opens == sorted(opens)


def test_a_file_is_on_disk_before_it_has_its_name(photos, tmp_path, monkeypatch):
    calls: list[tuple[str, str]] = []
    real = os.replace
    monkeypatch.setattr(
        os, "fsync", lambda number: calls.append(("sync", str(Path(f"/proc/self/fd/{number}").readlink())))
    )
    monkeypatch.setattr(os, "replace", lambda old, new: calls.append(("name", str(old))) or real(old, new))
    assert pack(tmp_path, photos, *SMALL) == 0
    named = [i for i, (call, _) in enumerate(calls) if call == "name"]
    assert len(named) >= 4 + 2 * 6 + 2
    for i in named:
        assert calls[i - 1] == ("sync", calls[i][1])
        assert calls[i + 1][0] == "sync"
        assert os.path.isdir(calls[i + 1][1]) or ".packing" in calls[i + 1][1]  # noqa: PTH112


def test_finished_shards_are_not_packed_again(photos, whole, tmp_path, monkeypatch):
    full = OSError(28, "No space left on device")
    real, written = zipfile.ZipFile.writestr, []

    def writestr(archive: Any, member: Any, data: bytes) -> None:
        written.append(member.filename)
        if len(written) == 6:
            raise full
        real(archive, member, data)

    monkeypatch.setattr(zipfile.ZipFile, "writestr", writestr)
    assert pack(tmp_path, photos, *SMALL) == 1
    with pytest.raises(ValueError, match="not finished"):
        open_source("packed", tmp_path)
    assert pack(tmp_path, photos, *SMALL) == 0
    assert written[6:10] == ["ant/4.jpg", "bee/0.jpg", "bee/1.jpg", "bee/2.jpg"]  # the second shard, from its beginning
    assert content(tmp_path) == whole
    written.clear()
    assert pack(tmp_path, photos, *SMALL) == 0
    assert not written


def test_a_full_disk_says_so_whoever_meets_it(photos, tmp_path, monkeypatch, capsys):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    for workers in ("0", "2"):
        assert pack(tmp_path, photos, *SMALL, "--workers", workers) == 1
        assert "No space left on device" in capsys.readouterr().err


def test_a_worker_that_dies_is_told_of(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zipfile.ZipFile, "writestr", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert pack(tmp_path, photos, *SMALL, "--workers", "2") == 1
    assert "a packing process died (Killed)" in capsys.readouterr().err


def test_an_interruption_is_no_traceback(photos, whole, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "writestr", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert pack(tmp_path, photos, *SMALL) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert pack(tmp_path, photos, *SMALL) == 0
    assert content(tmp_path) == whole


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused(photos, tmp_path, monkeypatch, capsys, finished):
    with monkeypatch.context() as patch:
        if not finished:
            patch.setattr(zipfile.ZipFile, "writestr", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        pack(tmp_path, photos, *SMALL)
    (tmp_path / "train" / ".packing" / "00000.zip.half").unlink(missing_ok=True)  # goes away in any case
    before = content(tmp_path)
    for change, difference in (
        (("--short-side", "20"), "short_side 16, now 20"),
        ((*SMALL, "--quality", "80"), "quality 90, now 80"),
        ((*SMALL, "--shard-images", "5"), "shard_images 4, now 5"),
        (("--keep-bytes",), "keep_bytes False, now True"),
    ):
        assert pack(tmp_path, photos, *change) == 2
        assert difference in capsys.readouterr().err
    other = write_photos(tmp_path / "other", per_class=4)
    assert pack(tmp_path, other, *SMALL) == 2
    assert "listed 10, now 8" in capsys.readouterr().err
    shutil.rmtree(other)
    assert content(tmp_path) == before


def test_shards_of_unknown_settings_are_refused(photos, tmp_path, capsys):
    assert pack(tmp_path, photos, *SMALL) == 0
    (tmp_path / "train" / "manifest.json").unlink()
    assert pack(tmp_path, photos, *SMALL) == 2
    assert "choose an empty folder" in capsys.readouterr().err


def test_two_at_a_time_are_one_too_many(photos, tmp_path, monkeypatch, capsys):
    codes = []

    def second(*_: Any) -> None:
        codes.append(pack(tmp_path, photos, *SMALL))
        raise KeyboardInterrupt

    monkeypatch.setattr(zipfile.ZipFile, "writestr", second)
    assert pack(tmp_path, photos, *SMALL) == 130
    assert codes == [1]
    assert f"another process packs {tmp_path}/train" in capsys.readouterr().err


# What cannot be read.


def test_bad_images_are_left_out_and_listed(tmp_path, capsys):
    root = write_photos(tmp_path / "in")
    (root / "train" / "ant" / "1.jpg").write_bytes(b"no image")
    (root / "train" / "bee" / "0.jpg").write_bytes(b"")
    assert pack(tmp_path / "store", root, *SMALL) == 1
    error = capsys.readouterr().err
    assert "of 10 images could not be read, more than data.max_bad=0.01 allows" in error
    assert "ant/1.jpg: not an image" in error
    assert pack(tmp_path / "store", root, *SMALL, "data.max_bad=0.2") == 0
    said = capsys.readouterr()
    assert f"left out: {root}/train/bee/0.jpg: the file is empty" in said.out
    assert "2 images could not be read and were left out" in said.err
    source = opened(tmp_path / "store")
    assert [source.names[i] for i in range(8)] == [f"ant/{i}.jpg" for i in (0, 2, 3, 4)] + [
        f"bee/{i}.jpg" for i in range(1, 5)
    ]
    assert source.labels.tolist() == [0] * 4 + [1] * 4
    (_, first), (name, second) = source.manifest.bad
    assert first.startswith("not an image")
    assert (name, second) == (f"{root}/train/bee/0.jpg", "the file is empty")


def test_names_that_would_be_one_are_refused(tmp_path, capsys):
    write_photo(tmp_path / "in" / "a.png", 20, 20)
    write_photo(tmp_path / "in" / "a.png.jpg", 20, 20)
    assert pack(tmp_path / "store", tmp_path / "in", *SMALL) == 2
    assert "a.png.jpg and a.png would have one name" in capsys.readouterr().err
    assert pack(tmp_path / "store", tmp_path / "in", "--keep-bytes") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--keep-bytes", "--quality", "80"), "leave out --quality"),
        (("--workers", "-1"), "--workers -1"),
        (("--shard-images", "0"), "--shard-images 0 is out of range: it must be 1 to"),
        (("--quality", "101"), "--quality 101"),
        (("--splits", "train", "test"), "no split 'test'"),
        (("data.root=/nowhere",), "/nowhere is not a folder"),
        (("data.sauce=folder",), "data.sauce"),
        (("--verify",), "no packed store"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_done_is_said_and_nothing_written(photos, tmp_path, capsys, options, message):
    assert pack(tmp_path, photos, *options) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# After packing.


def test_verify_finds_what_is_damaged(photos, tmp_path, capsys):
    assert pack(tmp_path, photos, *SMALL) == 0
    assert main(["pack", "--verify", str(tmp_path)]) == 0
    assert "all checksums are right" in capsys.readouterr().out
    shard = tmp_path / "train" / "00001.zip"
    data = bytearray(shard.read_bytes())
    for place, said in (
        (data.index(b"bee/1.jpg") + 200, "bee/1.jpg is damaged (CRC-32)"),
        (data.rindex(b"bee/1.jpg"), "its directory is not the one in the index"),
        (2, "its SHA-256 is not the one in the manifest"),
    ):
        changed = data.copy()
        changed[place] ^= 1
        shard.write_bytes(changed)
        assert main(["pack", "--verify", str(tmp_path)]) == 1
        found = capsys.readouterr().out
        assert f"{shard}: {said}" in found
        assert f"{shard}: its SHA-256" in found
        assert "00000.zip" not in found


def test_an_object_store_is_packed_into_and_continued(photos, whole, monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    with monkeypatch.context() as patch:
        real, calls = zipfile.ZipFile.writestr, iter(range(99))
        patch.setattr(zipfile.ZipFile, "writestr", lambda *args: real(*args) if next(calls) < 5 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pack("memory://bucket/store", photos, *SMALL)
    assert "/bucket/store/train/00000.zip" in memory.store
    assert "/bucket/store/train/00001.zip" not in memory.store
    assert pack("memory://bucket/store/", photos, *SMALL) == 0
    assert {name.removeprefix("/bucket/store/"): file.getvalue() for name, file in memory.store.items()} == whole
    assert main(["pack", "--verify", "memory://bucket/store"]) == 0


def test_a_run_replaces_and_lists_a_damaged_member(photos, tmp_path):
    assert pack(tmp_path / "store", photos, *SMALL) == 0
    shard = tmp_path / "store" / "train" / "00002.zip"
    data = bytearray(shard.read_bytes())
    data[data.index(b"bee/4.jpg") + 200] ^= 1
    shard.write_bytes(data)
    packed = ("data.source=packed", "data.max_bad=0.1")
    run = run_here(tmp_path / "store", tmp_path / "run", *packed)
    (row,) = (run / "bad_images.jsonl").read_text().splitlines()
    assert f"{shard}: bee/4.jpg" in row
    assert "CRC-32" in row


def test_ranges_of_settings_name_the_option():
    with pytest.raises(ConfigError, match="--short-side 0"):
        Settings(0, 90, "4:4:4", False, 1)
