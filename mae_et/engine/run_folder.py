"""The folder of one run: its layout, a lock against a second run, and atomic text files.

    <run>/config.yaml  plan.json  metrics.jsonl  checkpoints/  pictures/  .lock

POSIX only (`fcntl`). On a network file system the lock holds across hosts where the mount passes `flock` on (NFS and
Lustre have mount options for it); where it does not, `RunFolder.acquire` warns and goes on without.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import tempfile
import threading
import warnings
from datetime import datetime
from pathlib import Path

# Errors of flock itself that mean "no locks on this mount", as opposed to "held by another".
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class RunFolderError(RuntimeError):
    """The run folder cannot be used; the message names it, the reason, and what to do."""


class RunFolder:
    """One run's output folder, created and tried for writing at construction.

    Only the main rank should hold the lock and write. Use it as a context manager, or call `acquire` and `release`.

    Args:
        path: of the folder.
        writes: False where only the names in it are wanted: nothing is created or tried then. So do the other ranks,
            whose hosts need not have the folder.

    Raises:
        RunFolderError: the path is a file, cannot be created or written to, or holds files that are links. Folders may
            be links to another disk; but writing to a file that is one would overwrite whatever it names.
    """

    def __init__(self, path: str | os.PathLike[str], writes: bool = True) -> None:
        self.path = Path(path).expanduser()
        self._lock: int | None = None
        if not writes:
            return
        folder = self.path
        try:
            for folder in (self.path, self.checkpoints, self.pictures):
                folder.mkdir(parents=True, exist_ok=True)
                # Permission bits say nothing of read-only mounts and quotas; a nameless file tries all of them.
                with tempfile.TemporaryFile(dir=folder):
                    pass
            for folder in _own_folders(self.path):
                _refuse_links(folder)
        except OSError as error:
            raise RunFolderError(_unusable(self.path, folder, error)) from error

    @property
    def config_path(self) -> Path:
        """The configuration of the run, all defaults written out."""
        return self.path / "config.yaml"

    @property
    def plan_path(self) -> Path:
        """The plan: stages in steps."""
        return self.path / "plan.json"

    @property
    def metrics_path(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def status_path(self) -> Path:
        """What has become of the run; see `engine.status`."""
        return self.path / "status.json"

    @property
    def bad_images_path(self) -> Path:
        """Images that could not be read, one JSON object each; absent while there are none."""
        return self.path / "bad_images.jsonl"

    @property
    def non_finite_path(self) -> Path:
        """Samples of the steps that ended a run by not being finite, one JSON object each."""
        return self.path / "nonfinite.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder that `save_checkpoint` takes."""
        return self.path / "checkpoints"

    @property
    def pictures(self) -> Path:
        """The folder of the pictures that the trackers show."""
        return self.path / "pictures"

    @property
    def lock_path(self) -> Path:
        """The locked file; it stays when the run ends, and only the lock on it means anything."""
        return self.path / ".lock"

    def acquire(self) -> RunFolder:
        """Takes the folder for this process without waiting, until `release` or the end of the process.

        The lock dies with this process however it ends, even while children that it forked live on.

        Raises:
            RunFolderError: another run (or another `RunFolder` of this process) holds the folder, or the lock file
                cannot be written.
        """
        try:
            lock = os.open(self.lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise RunFolderError(_unusable(self.path, self.lock_path, error)) from error
        try:
            self._flock(lock)
            _write_holder(lock)
            self._remove_leftovers()
        except OSError as error:
            os.close(lock)
            raise RunFolderError(_unusable(self.path, self.lock_path, error)) from error
        except BaseException:
            os.close(lock)
            raise
        self._lock = lock
        _holders.add(self)
        return self

    def release(self) -> None:
        """Gives the folder free; does nothing where this process does not hold it."""
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._forget_lock()

    def __enter__(self) -> RunFolder:
        return self if self._lock is not None else self.acquire()

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _flock(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(lock, 1000, 0).decode(errors="replace").strip() or "another process"
            raise RunFolderError(
                f"run folder {self.path} is in use by {holder}; "
                "choose another folder with run=..., or wait until that run has ended"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(
                f"the file system of {self.path} has no locks ({error.strerror}): "
                "make sure yourself that no second run writes there",
                RuntimeWarning,
                stacklevel=3,
            )

    def _remove_leftovers(self) -> None:
        # Under the lock nobody else writes here, so these are from a process killed inside write_text_atomic.
        for leftover in self.path.glob(".*.tmp-*-*"):
            if not leftover.is_dir():
                leftover.unlink(missing_ok=True)

    def _forget_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None
        _holders.discard(self)


# flock belongs to the open file, which forked children share: a DataLoader worker that outlives a killed run would
# keep the folder locked. Record locks (lockf) are not inherited, but vanish in silence as soon as anything in the
# process opens and closes the lock file (a copytree of the run folder is enough), and do not stop a second RunFolder
# of the same process. So: flock, and each forked child closes its copy first thing. It must not unlock: that would
# unlock the parent's too. Children that exec lose it by themselves, since Python opens files close-on-exec.
_holders: set[RunFolder] = set()


def _forget_locks_in_child() -> None:
    for folder in list(_holders):
        folder._forget_lock()


os.register_at_fork(after_in_child=_forget_locks_in_child)


def write_text_atomic(path: Path, text: str) -> None:
    """Writes a UTF-8 text file so that `path` holds all of the old or all of the new text, even after a power cut.

    Where `path` is a link, the file takes its place.

    Raises:
        OSError: the folder is full, missing or not writable; the old file is then intact.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{threading.get_ident()}")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("x", encoding="utf-8", newline="") as file:  # never through a link that waits there
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable: what was created, renamed or deleted there survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _own_folders(run: Path) -> list[Path]:
    """The run's folder and those in it, but for wandb/: its links are W&B's own, which replaces them."""
    return [run, *(Path(entry.path) for entry in os.scandir(run) if entry.is_dir() and entry.name != "wandb")]


def _refuse_links(folder: Path) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir() and not entry.is_file(follow_symlinks=False):
                what = "a link to a file" if entry.is_symlink() else "a pipe or a device"
                raise RunFolderError(
                    f"{entry.path} is {what}, and a run would write to what it names: remove it, or choose another "
                    "folder with run=..."
                )


def _write_holder(lock: int) -> None:
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    text = f"process {os.getpid()} on {socket.gethostname()}, started {since}\n".encode()
    os.ftruncate(lock, 0)
    os.pwrite(lock, text, 0)


def _unusable(run: Path, at: Path, error: OSError) -> str:
    reason = "is not a folder" if isinstance(error, FileExistsError) else error.strerror or error
    return f"cannot use {run} as the run folder: {at}: {reason}; choose one that you can write to with run=..."
