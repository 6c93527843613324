"""Checkpoints under kill -9 at every call of a save, full and failing disks, and leftovers of dead writers."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mae_et.engine.checkpoint import CheckpointError, latest_checkpoint, save_checkpoint
from tests.engine.children import mount_tmpfs, start_child, wait_child
from tests.engine.saves import assert_loads, assert_same_bits, names, save

SKIP = 77  # exit code of a child that cannot do its test here
# Everything of `os` through which a save touches the disk.
CALLS = ("mkdir", "open", "write", "fsync", "close", "rename", "unlink", "rmdir")


def run_child(body: Callable[[], Any]) -> int:
    """Exit code (negative for a signal) of a forked child that runs `body`; a hung child fails the test."""
    return wait_child(start_child(body))


def killed(n: int, body: Callable[[], Any]) -> bool:
    """Whether `body`, run in a child, still reached its n-th call in CALLS; there it writes half of what it should,
    if it writes, and dies of SIGKILL."""
    left = n

    def hooked(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return real(*args, **kwargs)

        return call

    def with_hooks() -> None:
        for name in CALLS:
            setattr(os, name, hooked(name, getattr(os, name)))
        body()

    code = run_child(with_hooks)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def test_leftovers_of_dead_writers_are_removed(tmp_path, monkeypatch):
    run_child(lambda: (tmp_path / f"step-00000001.tmp-{os.getpid()}").mkdir())
    run_child(lambda: (tmp_path / f"step-00000001.trash-{os.getpid()}-3").mkdir())
    (tmp_path / f"step-00000002.tmp-{os.getpid()}").mkdir()  # ours, from before: a container that reuses pids
    alive = f"step-00000001.tmp-{os.getppid()}"
    (tmp_path / alive).mkdir()
    other = ["best", "step-00000001.bak", "step-1"]
    for name in other:
        (tmp_path / name).mkdir()
    assert len(names(tmp_path)) == 7
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space"):
            save(tmp_path, 2)
    assert names(tmp_path) == sorted([alive, *other])  # gone before anything was written: they took up the space
    save(tmp_path, 2)
    assert names(tmp_path) == sorted([alive, "step-00000002", *other])


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def quick_disk(monkeypatch):
    """A kill keeps the page cache, so its tests need not wait for the disk; what is synced when has its own test."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None, raising=False)  # it starts writing back


def first_save(folder: Path) -> None:
    folder.mkdir()


def over_one(folder: Path) -> None:
    save(folder, 1)


def over_leftovers(folder: Path) -> None:
    """A second kill: an earlier one left half a save and half a deletion."""
    save(folder, 1)
    shutil.copytree(folder / "step-00000001", folder / "step-00000002.tmp-999999999")
    shutil.copytree(folder / "step-00000001", folder / "step-00000000.trash-999999999")


@pytest.mark.parametrize(("before", "keep"), [(first_save, 3), (over_one, 3), (over_one, 1), (over_leftovers, 1)])
@pytest.mark.usefixtures("quick_disk")
def test_kill_at_every_call_of_a_save(tmp_path, before, keep):
    n, seen = 0, []
    while True:
        folder = tmp_path / str(n)
        before(folder)
        was_killed = killed(n, lambda folder=folder: save(folder, 2, keep))
        found = latest_checkpoint(folder, pytest.fail)
        seen.append(0 if found is None else found.step)
        assert seen[-1] in ((0, 2) if before is first_save else (1, 2))
        if found is not None:
            assert_loads(folder, found.step)
        save(folder, 3, keep)  # the next process tidies up, and nothing is in its way
        assert_loads(folder, 3)
        steps = {3, *([found.step] if found else []), *([1] if before is not first_save else [])}
        assert names(folder) == [f"step-{step:08d}" for step in sorted(steps)][-keep:]
        shutil.rmtree(folder)
        if not was_killed:
            break
        n += 1
    # 4 files of open, write.., fsync, close; the folder's fsync; a rename; the parent's fsync.
    assert n >= 4 * 4 + 5
    assert seen == sorted(seen)  # once the new one is visible, it stays
    assert seen[-1] == 2


def check_replacement(folder: Path) -> int:
    """Loads the only step there is, saved with seed 1 and replaced with seed 2; returns the seed."""
    found = latest_checkpoint(folder, pytest.fail)
    assert found is not None
    seed = found.state["samples_seen"] // 64
    assert seed in (1, 2)
    assert_loads(folder, 7, seed)
    return seed


@pytest.mark.usefixtures("quick_disk")
def test_kill_at_every_call_of_a_replacement(tmp_path):
    # The only checkpoint there is gets replaced: the old or the new one must be loadable at any moment.
    n, seen, was_killed = 0, [], True
    while was_killed:
        folder = tmp_path / str(n)
        save(folder, 7, seed=1)
        was_killed = killed(n, lambda folder=folder: save(folder, 7, seed=2))
        seen.append(check_replacement(folder))
        save(folder, 8)
        assert names(folder) == ["step-00000007", "step-00000008"]
        n += 1
    assert set(seen) == {1, 2}
    assert seen == sorted(seen)


@pytest.mark.usefixtures("quick_disk")
def test_two_kills_in_a_row(tmp_path):
    rng = random.Random(0)
    kills = 0
    for trial in range(25):
        folder = tmp_path / str(trial)
        save(folder, 7, seed=1)
        for _ in range(2):
            kills += killed(rng.randrange(20, 45), lambda folder=folder: save(folder, 7, seed=2))
            check_replacement(folder)
        save(folder, 7, seed=2)
        assert check_replacement(folder) == 2
        assert names(folder) == ["step-00000007"]
    assert kills >= 25


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to name the file behind a descriptor")
def test_everything_is_on_disk_before_it_is_relied_on(tmp_path, monkeypatch):
    """A kill keeps the page cache and a power cut does not, so here the order of the calls is what is tested."""
    save(tmp_path, 1)
    log: list[tuple[str, str]] = []

    def watch(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            at = Path(f"/proc/self/fd/{args[0]}").readlink() if isinstance(args[0], int) else Path(args[0])
            log.append((name, at.name))
            return real(*args, **kwargs)

        return call

    for name in ("write", "fsync", "rename", "unlink"):
        monkeypatch.setattr(os, name, watch(name, getattr(os, name)))
    save(tmp_path, 2, keep=1)
    monkeypatch.undo()

    def index(name: str, at: str, last: bool = False) -> int:
        found = [i for i, entry in enumerate(log) if entry == (name, at)]
        return found[-1 if last else 0]

    temporary = f"step-00000002.tmp-{os.getpid()}"
    for file in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert index("write", file, last=True) < index("fsync", file) < index("write", "manifest.json")
    assert index("write", "manifest.json", last=True) < index("fsync", "manifest.json") < index("fsync", temporary)
    published = index("rename", temporary)
    assert index("fsync", temporary) < published < index("fsync", tmp_path.name) < index("rename", "step-00000001")
    # Deletion starts when no power cut can bring the old name back.
    assert log.index(("unlink", "model.safetensors")) > index("fsync", tmp_path.name, last=True)
    assert index("fsync", tmp_path.name, last=True) > index("rename", "step-00000001")


# Calls of a save without pruning: 8 pieces of 4 files; 4 files, the temporary folder, and its parent before and after
# pruning; the parent and the temporary folder; one rename.
@pytest.mark.parametrize(("call", "times"), [("write", 8), ("fsync", 7), ("open", 8), ("mkdir", 2), ("rename", 1)])
def test_a_full_disk_leaves_the_previous_checkpoint_and_nothing_else(tmp_path, monkeypatch, call, times):
    save(tmp_path, 1)
    real = getattr(os, call)
    failures = 0
    for n in range(times + 1):
        left = n

        def fail(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == -1:
                if call == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                full()
            return real(*args, **kwargs)

        with monkeypatch.context() as patch, warnings.catch_warnings():
            patch.setattr(os, call, fail)
            warnings.simplefilter("ignore", RuntimeWarning)  # pruning fails when the new one is complete
            try:
                save(tmp_path, 2)
            except CheckpointError as error:
                failures += 1
                for part in (str(tmp_path), "step 2", "No space left on device", "needed: 412", "free: "):
                    assert part in str(error)
        assert (left < 0) == (n < times)
        complete = names(tmp_path) == ["step-00000001", "step-00000002"]
        assert complete or names(tmp_path) == ["step-00000001"]
        assert_loads(tmp_path, 2 if complete else 1)
        shutil.rmtree(tmp_path / "step-00000002", ignore_errors=True)
    # Not an error: a parent that exists already; pruning.
    assert failures == times - {"mkdir": 1, "fsync": 1, "open": 1}.get(call, 0)


def test_a_failed_replacement_puts_the_old_one_back(tmp_path, monkeypatch):
    save(tmp_path, 1)
    real, calls = os.rename, []

    def fail_second(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        real(*args)

    monkeypatch.setattr(os, "rename", fail_second)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(tmp_path, 1, seed=2)
    assert names(tmp_path) == ["step-00000001"]
    assert_loads(tmp_path, 1)


def test_a_disk_that_returns_other_bytes_is_noticed_before_anything_is_pruned(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)
    real = os.write

    def corrupt(descriptor: int, block: Any) -> int:
        raw = bytearray(block)
        raw[len(raw) // 2] ^= 1
        return real(descriptor, raw)

    monkeypatch.setattr(os, "write", corrupt)
    with pytest.raises(CheckpointError, match=r"altered|damaged"):
        save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step-00000001"]
    assert_loads(tmp_path, 1)


def test_short_writes_are_completed(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, block: real(descriptor, block[:100]))
    save(tmp_path, 1)
    assert_loads(tmp_path, 1)


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1)
    assert names(tmp_path) == []


def test_failing_to_prune_is_a_warning_because_the_checkpoint_is_safe(tmp_path, monkeypatch):
    save(tmp_path, 1)
    real = os.rename

    def fail(source: Any, target: Any) -> None:
        if "trash" in str(target):
            raise OSError(errno.EACCES, "Permission denied")
        real(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.warns(RuntimeWarning, match="could not remove old checkpoints"):
        save(tmp_path, 2, keep=1)
    assert_loads(tmp_path, 2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs tmpfs")
@pytest.mark.skipif(os.getuid() != 0, reason="needs root to mount a small tmpfs")
def test_a_really_full_disk(tmp_path):
    tensors = {"model": {"weight": torch.rand(1 << 18)}}  # 1 MiB

    def body() -> None:
        if not mount_tmpfs(tmp_path, 3 << 19):  # 1.5 checkpoints
            os._exit(SKIP)
        save_checkpoint(tmp_path, 1, tensors, {})
        for _ in range(10):
            with pytest.raises(
                CheckpointError, match=r"No space left on device .*needed: 1,048,576, free: \d{3},\d{3}\)"
            ):
                save_checkpoint(tmp_path, 2, tensors, {})
            assert names(tmp_path) == ["step-00000001"]
        found = latest_checkpoint(tmp_path, pytest.fail)
        assert found is not None
        assert_same_bits(found.tensors["model"], tensors["model"])

    code = run_child(body)
    if code == SKIP:
        pytest.skip("this machine does not let root mount a tmpfs")
    assert code == 0
    assert names(tmp_path) == []  # the mount was seen by the child only
