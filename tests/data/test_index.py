from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from mae_et.data import index
from mae_et.data.sources import FileSource, open_source

LONG_AGO = 3_600_000_000_000  # ns


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache that keeps small sets too, and counts how often they are read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "CACHED_FROM", 1)
    # The trees of these tests were made just now: an hour passes before the first of them is opened.
    monkeypatch.setattr(index.time, "time_ns", lambda: int(time.time() * 1e9) + LONG_AGO)
    return tmp_path / "cache" / "mae_et" / "index"


@pytest.fixture
def readings(monkeypatch):
    """The places that were read, rather than taken from the cache."""
    seen = []
    add = index.Watch.add

    def spy(self, path):
        seen.append(path)
        add(self, path)

    monkeypatch.setattr(index.Watch, "add", spy)
    return seen


def tick() -> None:
    """Wait until the clock of the file system has moved: what changes within a tick keeps its times."""
    time.sleep(0.02)


def age(path: Path, hours: float) -> None:
    then = time.time() - hours * 3600
    os.utime(path, (then, then))


def make(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def contents(kind: str, root: Path, split: str = "train") -> list[tuple[str, int]]:
    source = open_source(kind, root, split)
    assert isinstance(source, FileSource)
    return [(source.describe(i), source.label(i)) for i in range(len(source))]


def versions(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*"))


def data_set(kind: str, folder: Path) -> Path:
    if kind == "folder":
        return make(folder / "tree", "a/1.png", "b/2.png", "b/3.png")
    (folder / "list.txt").write_text("# three\na/1.png\tant\nb/2.png\tbee\nb/3.png\n")
    return folder / "list.txt"


@pytest.mark.parametrize("kind", ["folder", "list"])
def test_the_second_opening_reads_nothing_and_gives_the_same(tmp_path, cache, readings, kind):
    root = data_set(kind, tmp_path)
    first = contents(kind, root)
    assert len(first) == 3
    assert readings
    assert len(versions(cache)) == 1
    readings.clear()
    assert contents(kind, root) == first
    assert open_source(kind, root).classes == (("a", "b") if kind == "folder" else ("ant", "bee"))
    assert readings == []


def test_arrays_are_mapped_and_pickled_whole(tmp_path, cache):
    root = data_set("list", tmp_path)
    source = open_source("list", root)
    assert isinstance(source, FileSource)
    assert not source.paths.text.flags.writeable
    assert not source.paths.text.flags.owndata
    assert pickle.loads(pickle.dumps(source)).describe(1) == source.describe(1)


def test_a_relative_root_is_found_from_elsewhere(tmp_path, cache, readings, monkeypatch):
    root = data_set("folder", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert contents("folder", Path("tree"))[0] == ("tree/a/1.png", 0)
    readings.clear()
    monkeypatch.chdir(root)
    assert contents("folder", root)[0] == (f"{root}/a/1.png", 0)
    assert readings == []


def _add(root: Path) -> None:
    make(root, "b/new.png")


def _remove(root: Path) -> None:
    (root / "b" / "3.png").unlink()


def _rename(root: Path) -> None:
    (root / "b" / "3.png").rename(root / "b" / "4.png")


def _add_class(root: Path) -> None:
    make(root, "c/new.png")


def _behind_a_link(root: Path) -> None:
    make(root.parent / "elsewhere", "new.png")


def _point_elsewhere(root: Path) -> None:
    make(root.parent / "third", "other.png")
    (root / "linked").unlink()
    (root / "linked").symlink_to(root.parent / "third")


def _mend(root: Path) -> None:
    make(root.parent / "unmounted", "back.png")


CHANGES = [_add, _remove, _rename, _add_class, _behind_a_link, _point_elsewhere, _mend]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_folder_is_read_again(tmp_path, cache, readings, monkeypatch, change):
    root = data_set("folder", tmp_path)
    make(tmp_path / "elsewhere", "5.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "broken").symlink_to(tmp_path / "unmounted")
    before = contents("folder", root)
    readings.clear()
    assert contents("folder", root) == before
    assert readings == []
    tick()
    change(root)
    now = contents("folder", root)
    monkeypatch.setattr(index, "CACHED_FROM", 10**9)
    shutil.rmtree(cache)
    assert now == contents("folder", root) != before


@pytest.mark.parametrize("same_size", [False, True])
def test_a_changed_list_is_read_again(tmp_path, cache, same_size):
    root = data_set("list", tmp_path)
    contents("list", root)
    status = root.stat()
    tick()
    root.write_text(root.read_text().replace("bee", "bug" if same_size else "beetle"))
    os.utime(root, ns=(status.st_atime_ns, status.st_mtime_ns))  # as rsync and cp -p do
    assert open_source("list", root).classes[1] == ("bug" if same_size else "beetle")


def test_classes_of_another_split_follow_its_train_list(tmp_path, cache, readings):
    (tmp_path / "train.txt").write_text("a.png\tant\nb.png\tcat\n")
    (tmp_path / "val.txt").write_text("# one\nb.png\tcat\n")
    assert contents("list", tmp_path, "val") == [(f"{tmp_path}/b.png (line 2 of {tmp_path}/val.txt)", 1)]
    readings.clear()
    tick()
    (tmp_path / "train.txt").write_text("a.png\tant\nb.png\tbee\nc.png\tcat\n")
    assert contents("list", tmp_path, "val")[0][1] == 2
    assert readings == [f"{tmp_path}/train.txt"]
    (tmp_path / "train.txt").write_text("a.png\tant\n")
    with pytest.raises(ValueError, match=r"val\.txt, line 2: label 'cat' is none of the 1"):
        open_source("list", tmp_path, "val")


def test_classes_of_another_split_follow_its_train_folder(tmp_path, cache):
    make(tmp_path / "set", "train/b/1.png", "val/b/2.png")
    assert contents("folder", tmp_path / "set", "val")[0][1] == 0
    tick()
    make(tmp_path / "set", "train/a/3.png")
    assert contents("folder", tmp_path / "set", "val")[0][1] == 1


@pytest.mark.parametrize("kind", ["folder", "list"])
def test_what_changed_just_now_or_in_the_future_is_not_kept(tmp_path, cache, monkeypatch, kind):
    """A change within the same tick of a coarse clock would leave no trace; so would one when a clock is set back."""
    root = data_set(kind, tmp_path)
    newest = max(path.stat().st_ctime_ns for path in (root, *root.rglob("*")))
    for seconds, kept in [(-3600, 0), (0, 0), (1.9, 0), (2.1, 1)]:
        monkeypatch.setattr(index.time, "time_ns", lambda seconds=seconds: newest + int(seconds * 1e9))
        contents(kind, root)
        assert len(versions(cache)) == kept, seconds


def test_small_sets_are_not_kept(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(index, "CACHED_FROM", 4)
    root = data_set("folder", tmp_path)
    contents("folder", root)
    assert not cache.exists()
    make(root, "b/4.png")
    contents("folder", root)
    assert len(versions(cache)) == 1


def _damages(version: Path) -> list[tuple[str, bytes | None]]:
    """Every file without its last byte, empty, absent, and with each of a few bytes flipped."""
    damages: list[tuple[str, bytes | None]] = []
    for file in sorted(version.iterdir()):
        data = file.read_bytes()
        damages += [(file.name, None), (file.name, b""), (file.name, data[:-1])]
        for place in {0, len(data) // 2, len(data) - 1}:
            damages.append((file.name, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]))
    return damages


@pytest.mark.parametrize("kind", ["folder", "list"])
def test_damaged_files_are_made_anew(tmp_path, cache, readings, kind):
    root = data_set(kind, tmp_path)
    right = contents(kind, root)
    (version,) = versions(cache)
    whole = {file.name: file.read_bytes() for file in version.iterdir()}
    damages = _damages(version)
    assert len(damages) > 8 * 5
    for name, data in damages:
        for file, content in whole.items():
            (version / file).write_bytes(content)
        (version / name).unlink()
        if data is not None:
            (version / name).write_bytes(data)
        readings.clear()
        assert contents(kind, root) == right, (name, data)
        assert readings, (name, data)
        assert versions(cache) == [version]
        readings.clear()
        assert contents(kind, root) == right
        assert readings == []


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("ends", np.array([0, 9, 3, 21], np.int64)),
        ("ends", np.array([0, 7, 14, 22], np.int64)),
        ("ends", np.array([-7, 7, 14, 21], np.int64)),
        ("ends", np.empty(0, np.int64)),
        ("labels", np.array([0, 1, 2], np.int32)),
        ("labels", np.array([0, -2, 1], np.int32)),
        ("labels", np.array([0, 1], np.int32)),
        ("labels", np.array([0, 1, 1], np.int64)),
        ("lines", np.array([1, 2], np.int64)),
        ("states", np.empty((0, 3), np.int64)),
        ("paths", np.array([{}] * 21, object)),
    ],
)
def test_foreign_files_with_right_checksums_are_made_anew(tmp_path, cache, readings, name, values):
    root = data_set("folder", tmp_path)
    right = contents("folder", root)
    (version,) = versions(cache)
    np.save(version / f"{name}.npy", values)
    header = json.loads((version / "header.json").read_text())
    header["checksums"] = {n: index._checksum(version / n) for n in header["checksums"]}
    (version / "header.json").write_text(json.dumps(header))
    readings.clear()
    assert contents("folder", root) == right
    assert readings


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, cache, monkeypatch):
    root = data_set("list", tmp_path)
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file in the way")
    assert len(contents("list", root)) == 3
    cache.parent.unlink()

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(index.np, "save", full)
        assert len(contents("list", root)) == 3
    assert versions(cache) == []
    monkeypatch.setattr(index, "cache_folder", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert len(contents("list", root)) == 3


def test_what_killed_processes_left_and_nobody_uses_is_removed(tmp_path, cache):
    root = data_set("folder", tmp_path)
    contents("folder", root)
    (old,) = versions(cache)
    for name, hours in (("writing-old", 2), ("writing-new", 0.5)):
        (old.parent / name).mkdir()
        age(old.parent / name, hours)
    age(old, 9 * 24)
    contents("folder", root)  # in use again
    tick()
    make(root, "b/4.png")
    contents("folder", root)  # another host may still use the old one
    kept = {path.name for path in versions(cache)}
    assert {old.name, "writing-new"} < kept
    assert len(kept) == 3
    age(old, 8 * 24)
    tick()
    make(root, "b/5.png")
    contents("folder", root)
    assert old not in versions(cache)


def test_hosts_that_share_a_home_keep_an_index_each(tmp_path, cache, readings):
    """Two data sets that take turns at one path, as the local disks of two hosts would."""
    here, there = data_set("folder", tmp_path), make(tmp_path / "other", "z/9.png")
    place = tmp_path / "data"
    for target, images in [(here, 3), (there, 1)]:
        place.symlink_to(target)
        assert len(contents("folder", place)) == images
        place.unlink()
    readings.clear()
    for target, images in [(here, 3), (there, 1), (here, 3)]:
        place.symlink_to(target)
        assert len(contents("folder", place)) == images
        place.unlink()
    assert readings == []
