"""Packed stores read like the folders that they were made from, and say so where they are damaged."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest

from mae_et.data import packed
from mae_et.data.decode import ImageError
from mae_et.data.packed import PackedSource
from mae_et.data.sources import Source, available_splits, count_images, open_source
from tests.data.stores import content, pack, write_photos
from tests.engine.children import start_child, wait_child


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def kept(photos, tmp_path_factory) -> Path:
    """A store of the photos' own bytes: 10 images in 3 shards."""
    store = tmp_path_factory.mktemp("stores") / "kept"
    assert pack(store, photos, "--keep-bytes") == 0
    return store


@pytest.fixture
def store(kept, tmp_path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(kept, tmp_path / "store")


@pytest.fixture
def remote(kept) -> str:
    """The same store in an object store of this process's memory."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for name, data in content(kept).items():
        memory.pipe_file(f"/bucket/store/{name}", data)
    return "memory://bucket/store"


def assert_same(found: Source, expected: Source) -> None:
    assert len(found) == len(expected)
    assert (found.classes, found.labels.tolist()) == (expected.classes, expected.labels.tolist())
    for i in range(len(expected)):
        assert found.label(i) == expected.label(i)
        assert found.image(i).equal(expected.image(i))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_store_reads_as_its_folder(kept, photos, split, channels):
    found = open_source("packed", kept, split, channels=channels)
    assert_same(found, open_source("folder", photos, split, channels=channels))
    assert (found.name, found.channels) == (f"packed {split}", channels)


def test_what_a_store_says_of_itself(kept):
    source = open_source("packed", kept)
    assert source.describe(9) == f"{kept}/train/00002.zip: bee/4.jpg"
    assert available_splits("packed", kept) == ("train", "val")
    with pytest.raises(IndexError):
        source.image(10)
    with pytest.raises(ValueError, match=r"no split 'test' .*it has train, val"):
        open_source("packed", kept, "test")


def test_counting_opens_no_shard_and_no_index(store):
    for file in [*store.rglob("*.zip"), *store.rglob("*.npy")]:
        file.unlink()
    assert count_images("packed", store) == 10
    assert count_images("packed", store, "val") == 1


def test_a_url_reads_as_the_folder(remote, photos):
    assert_same(open_source("packed", remote), open_source("folder", photos))
    assert open_source("packed", remote).describe(0) == "memory://bucket/store/train/00000.zip: ant/0.jpg"
    assert available_splits("packed", remote) == ("train", "val")
    assert count_images("packed", remote, "val") == 1
    with pytest.raises(ValueError, match="no split"):
        open_source("packed", "memory://bucket/elsewhere")
    with pytest.raises(ValueError, match=r"data\.root=nowhere://x"):
        open_source("packed", "nowhere://x")


def test_only_an_images_own_bytes_are_fetched(remote, monkeypatch):
    source = open_source("packed", remote)
    assert isinstance(source, PackedSource)
    fetched = []
    memory = fsspec.filesystem("memory")
    real = memory.cat_file

    def cat_file(path: str, version_id: str | None = None, start: int = 0, end: int = 0) -> bytes:  # as s3fs has it
        fetched.append((path, start, end))
        assert version_id is None
        return real(path, start, end)

    monkeypatch.setattr(memory, "cat_file", cat_file)
    data = source.read(5)
    ((path, start, end),) = fetched
    assert path.endswith("train/00001.zip")
    assert end - start == len(data)


def test_a_url_may_end_in_a_slash(remote):
    assert len(open_source("packed", f"{remote}/")) == count_images("packed", f"{remote}/") == 10


def test_a_server_that_lists_no_sizes_is_asked_for_them(remote, monkeypatch):
    memory = fsspec.filesystem("memory")
    real = memory.ls
    monkeypatch.setattr(memory, "ls", lambda *args, **how: [item | {"size": None} for item in real(*args, **how)])
    assert len(open_source("packed", remote)) == 10


def test_a_store_taken_for_a_folder_says_what_to_set(kept):
    for root in (kept, kept / "train"):
        with pytest.raises(ValueError, match=rf"^{kept} is a packed store; set data\.source=packed data\.root={kept}$"):
            open_source("folder", root)
    with pytest.raises(ValueError, match="one split of a packed store"):
        open_source("packed", kept / "train")
    with pytest.raises(ValueError, match=r"s3://b/store is a URL.* set data\.source=packed"):
        open_source("folder", "s3://b/store")


def damage(shard: Path, member: str) -> None:
    """Flip a bit in the middle of a member."""
    data = bytearray(shard.read_bytes())
    place = data.index(member.encode()) + 300
    data[place] ^= 1
    shard.write_bytes(data)


def test_a_damaged_member_is_a_bad_image(store):
    damage(store / "train" / "00001.zip", "bee/0.jpg")
    source = open_source("packed", store)
    with pytest.raises(ImageError, match=r"train/00001\.zip: bee/0\.jpg: .*damaged"):
        source.image(5)
    source.image(4), source.image(6)


def test_what_goes_away_later_says_nothing_of_an_image(store, remote):
    here, there = open_source("packed", store), open_source("packed", remote)
    shutil.rmtree(store)
    fsspec.filesystem("memory").store.clear()
    for source in (here, there):
        with pytest.raises(OSError, match="00000"):
            source.image(0)


def no_manifest(split: Path) -> None:
    (split / "manifest.json").unlink()


def torn_manifest(split: Path) -> None:
    (split / "manifest.json").write_bytes((split / "manifest.json").read_bytes()[:-40])


def newer_format(split: Path) -> None:
    _edit(split, lambda manifest: manifest.update(format=2))


def shard_elsewhere(split: Path) -> None:
    _edit(split, lambda manifest: manifest["shards"][0].update(name="../../secret.zip"))


def no_images(split: Path) -> None:
    _edit(split, lambda manifest: manifest.pop("images"))


def no_shard(split: Path) -> None:
    (split / "00001.zip").unlink()


def short_shard(split: Path) -> None:
    (split / "00001.zip").write_bytes((split / "00001.zip").read_bytes()[:-1])


def no_index(split: Path) -> None:
    (split / "index" / "crcs.npy").unlink()


def other_index(split: Path) -> None:
    np.save(split / "index" / "labels.npy", np.zeros(10, np.int32))


def outside(split: Path) -> None:
    _forge(split, "offsets", np.full(10, 1 << 40, np.int64))


def beyond_int64(split: Path) -> None:
    _forge(split, "offsets", np.full(10, (1 << 63) - 1, np.int64))


def unknown_class(split: Path) -> None:
    _forge(split, "labels", np.full(10, 2, np.int32))


def fewer_rows(split: Path) -> None:
    _forge(split, "lengths", np.full(9, 1, np.uint32))


def _edit(split: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((split / "manifest.json").read_text())
    change(manifest)
    (split / "manifest.json").write_text(json.dumps(manifest))


def _forge(split: Path, column: str, values: np.ndarray) -> None:
    """Change a column of the index together with its checksum."""
    file = io.BytesIO()
    np.save(file, values)
    (split / "index" / f"{column}.npy").write_bytes(file.getvalue())
    _edit(split, lambda manifest: manifest["index"].update({column: hashlib.sha256(file.getvalue()).hexdigest()}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_manifest, r"no split 'train' with a manifest\.json"),
        (torn_manifest, r"manifest\.json is damaged"),
        (newer_format, "has format 2; this version"),
        (shard_elsewhere, r"manifest\.json is damaged"),
        (no_images, r"manifest\.json is damaged \(KeyError"),
        (no_shard, r"00001\.zip is not there, and [\d,]+ bytes were packed; copy it again"),
        (short_shard, r"00001\.zip has [\d,]+ bytes, and"),
        (no_index, r"index/crcs\.npy is missing or damaged"),
        (other_index, r"index/labels\.npy is missing or damaged .*SHA-256"),
        (outside, r"index does not fit manifest\.json"),
        (beyond_int64, r"index does not fit manifest\.json"),
        (unknown_class, r"index does not fit manifest\.json"),
        (fewer_rows, r"index does not fit manifest\.json"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_store_is_not_opened(store, change, message):
    change(store / "train")
    with pytest.raises(ValueError, match=message):
        open_source("packed", store)


def test_processes_that_fork_and_copies_read_for_themselves(kept, remote):
    for root in (kept, remote):
        source = open_source("packed", root)
        first = source.image(0)  # its shard is open from here on
        copy = pickle.loads(pickle.dumps(source))

        def read(source=source, copy=copy, first=first) -> None:
            # The child reads other images at the same time as this process: neither moves the other's place.
            for i in [*range(10), 0] * 20:
                assert source.image(i).equal(copy.image(i))
            assert source.image(0).equal(first)

        child = start_child(read)
        read()
        assert wait_child(child) == 0


def test_few_shards_are_open_at_a_time(store, monkeypatch):
    def shards_open() -> int:
        descriptors = Path("/proc/self/fd").iterdir()
        paths = [os.path.realpath(path) for path in descriptors]
        return sum(path.startswith(str(store)) and path.endswith(".zip") for path in paths)

    monkeypatch.setattr(packed, "_OPEN_SHARDS", 2)
    source = open_source("packed", store)
    for i in [*range(10), *range(10)]:
        source.image(i)
    assert shards_open() == 2
    del source
    assert shards_open() == 0


def test_a_missing_root_says_what_to_set(tmp_path):
    with pytest.raises(ValueError, match=r"set data\.root="):
        open_source("packed")
    for look in (open_source, count_images):
        with pytest.raises(ValueError, match=rf"{tmp_path}/nowhere .*set data\.root="):
            look("packed", tmp_path / "nowhere")
        with pytest.raises(ValueError, match=r"no split 'train' .*no packed store"):
            look("packed", tmp_path)
