"""The run folder: layout, refusal of unusable paths, the lock under kill -9 and fork, atomic text files."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mae_et.engine.run_folder import RunFolder, RunFolderError, write_text_atomic
from tests.engine.children import PATIENCE, start_child, wait_child


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    assert wait_child(pid) == -signal.SIGKILL


def start_holder(path: Path, then: Callable[[Callable[[], None]], None]) -> int:
    """A child that holds the run folder, and calls `then(ready)`; returns once it has called `ready`."""
    reader, writer = os.pipe()

    def body() -> None:
        def ready() -> None:
            os.write(writer, b".")

        RunFolder(path).acquire()
        then(ready)
        time.sleep(PATIENCE)

    pid = start_child(body)
    os.close(writer)
    assert os.read(reader, 1) == b"."
    os.close(reader)
    return pid


def test_layout_is_created_and_may_exist_already(tmp_path):
    path = tmp_path / "a" / "b"
    for _ in range(2):
        run = RunFolder(path)
        assert sorted(p.name for p in path.iterdir()) == ["checkpoints", "pictures"]
        assert (run.checkpoints, run.pictures) == (path / "checkpoints", path / "pictures")
        assert run.config_path == path / "config.yaml"
        assert run.plan_path == path / "plan.json"
        assert run.metrics_path == path / "metrics.jsonl"


def refused(path: Path) -> str:
    start = time.monotonic()
    with pytest.raises(RunFolderError) as caught:
        RunFolder(path)
    assert time.monotonic() - start < 1
    message = str(caught.value)
    assert str(path) in message
    assert "run=" in message
    return message


def test_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("results")
    assert "is not a folder" in refused(tmp_path / "run")
    assert "Not a directory" in refused(tmp_path / "run" / "below")
    assert (tmp_path / "run").read_text() == "results"


def test_a_file_in_place_of_a_subfolder_is_refused(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    assert str(tmp_path / "checkpoints") in refused(tmp_path)


def test_a_link_to_nowhere_is_refused(tmp_path):
    # A disk that is not mounted must not read as "no checkpoint yet".
    (tmp_path / "checkpoints").symlink_to(tmp_path / "not-mounted")
    refused(tmp_path)


@pytest.mark.parametrize("below", ["", "new"])
def test_an_unwritable_folder_is_refused(below):
    # Outside tmp_path, which another user cannot enter; root drops to "nobody", to whom permissions apply.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for sub in ("checkpoints", "pictures"):
            (folder / sub).mkdir()
        folder.chmod(0o555)

        def body() -> None:
            if os.getuid() == 0:
                os.setuid(65534)
            assert "Permission denied" in refused(folder / below)

        assert wait_child(start_child(body)) == 0
        folder.chmod(0o755)


def test_a_failing_disk_is_refused(tmp_path, monkeypatch):
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    assert "Read-only file system" in refused(tmp_path)


def test_a_second_run_is_told_who_holds_the_folder(tmp_path):
    holder = start_holder(tmp_path, lambda ready: ready())
    run = RunFolder(tmp_path)
    start = time.monotonic()
    with pytest.raises(RunFolderError) as caught:
        run.acquire()
    assert time.monotonic() - start < 1
    message = str(caught.value)
    for part in (str(tmp_path), f"process {holder} on {socket.gethostname()}", time.strftime("%Y-"), "run=", "wait"):
        assert part in message
    kill(holder)
    with run:
        assert f"process {os.getpid()} " in run.lock_path.read_text()


def test_the_lock_dies_with_its_process(tmp_path):
    for _ in range(5):
        kill(start_holder(tmp_path, lambda ready: ready()))
        RunFolder(tmp_path).acquire().release()


def test_what_an_earlier_holder_wrote_is_gone(tmp_path):
    (tmp_path / ".lock").write_text("process 1 on a host with a long name " * 10)
    with RunFolder(tmp_path) as run:
        assert len(run.lock_path.read_text().splitlines()) == 1
        assert "long name" not in run.lock_path.read_text()


def test_release_and_the_same_process(tmp_path):
    run, other = RunFolder(tmp_path), RunFolder(tmp_path)
    with run, pytest.raises(RunFolderError, match=f"process {os.getpid()} "):
        other.acquire()
    with other as entered:
        assert entered is other
        with pytest.raises(RunFolderError):
            run.acquire()
    run.release()  # not held: nothing happens
    with run.acquire() as again:
        assert again is run
    other.acquire().release()


def test_the_lock_survives_other_readers_of_its_file(tmp_path):
    # With record locks (lockf), this read would give the folder free without a word.
    def body() -> None:
        with pytest.raises(RunFolderError):
            RunFolder(tmp_path).acquire()

    with RunFolder(tmp_path) as run:
        run.lock_path.read_text()
        assert wait_child(start_child(body)) == 0


def by_fork(ready: Callable[[], None]) -> None:
    """As a DataLoader worker does, in the lowest terms."""
    if os.fork() == 0:
        ready()
        time.sleep(PATIENCE)
        os._exit(0)


def by_multiprocessing(ready: Callable[[], None]) -> None:
    """As a DataLoader starts its workers on Linux."""

    def work() -> None:
        ready()
        time.sleep(PATIENCE)

    multiprocessing.get_context("fork").Process(target=work, daemon=True).start()


def by_subprocess(ready: Callable[[], None]) -> None:
    subprocess.Popen([sys.executable, "-S", "-c", f"import time; time.sleep({PATIENCE})"])
    ready()


@pytest.mark.parametrize("fork", [by_fork, by_multiprocessing, by_subprocess])
def test_a_living_child_of_a_killed_run_does_not_hold_the_folder(tmp_path, fork):
    def then(ready: Callable[[], None]) -> None:
        os.setpgid(0, 0)  # so that the orphan can be found and ended
        fork(ready)

    parent = start_holder(tmp_path, then)
    try:
        with pytest.raises(RunFolderError):
            RunFolder(tmp_path).acquire()
        kill(parent)
        os.killpg(parent, 0)  # raises if nobody of the group is alive: then this test would test nothing
        RunFolder(tmp_path).acquire().release()
    finally:
        os.killpg(parent, signal.SIGKILL)


def test_a_child_that_leaves_does_not_unlock_its_parent(tmp_path):
    with RunFolder(tmp_path) as run:
        assert wait_child(start_child(run.release)) == 0
        with pytest.raises(RunFolderError):
            RunFolder(tmp_path).acquire()
        assert f"process {os.getpid()} " in run.lock_path.read_text()


def test_a_file_system_without_locks_warns_and_goes_on(tmp_path, monkeypatch):
    def fail(*_args: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    run = RunFolder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", fail)
        with pytest.warns(RuntimeWarning, match="no locks"):
            run.acquire()
    run.release()


def test_a_lock_file_that_cannot_be_opened_is_an_error_of_the_folder(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(RunFolderError, match="run="):
        RunFolder(tmp_path).acquire()


@pytest.mark.parametrize("text", ["", "a: 1\r\n", "µ = ½\n" * 10_000])
def test_text_is_written_as_given(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text("older and longer " * 1000)
    write_text_atomic(path, text)
    assert path.read_bytes() == text.encode()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_text(tmp_path, monkeypatch, call):
    def fail(*_args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "plan.json"
    path.write_text("old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_text_that_cannot_be_encoded_leaves_the_old_text(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomic(path, "new " * 10_000 + "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def start_and_kill(n: int, names: tuple[str, ...], body: Callable[[], Any]) -> int:
    """Exit code of a child that runs `body` and kills itself in place of its n-th call of these functions of `os`."""
    left = n

    def hooked(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return real(*args)

        return call

    def with_hooks() -> None:
        for name in names:
            setattr(os, name, hooked(getattr(os, name)))
        body()

    return wait_child(start_child(with_hooks))


def test_a_kill_leaves_all_of_the_old_or_all_of_the_new_text(tmp_path):
    path = tmp_path / "plan.json"
    old, new = "old " * 5000, "new " * 7000
    found = []
    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        path.write_text(old)
        names = ("open", "fsync", "replace", "close")
        code = start_and_kill(len(found), names, lambda: write_text_atomic(path, new))
        found.append(path.read_text())
    assert code == 0
    # In order: fsync and replace, before which the old text stands; open, fsync and close of the folder; no kill.
    assert found == [old, old, new, new, new, new]
    assert len(list(tmp_path.glob(".*tmp*"))) == 2
    RunFolder(tmp_path).acquire().release()
    assert not list(tmp_path.glob(".*tmp*"))
