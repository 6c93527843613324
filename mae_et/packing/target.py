"""Where a split of a store is written: every file appears under its name at once and whole, or not at all.

On disk a file is written under another name, flushed, and renamed. Object stores show an object when its upload has
ended; other file systems behind a URL are tried for sizes when a packing continues, and `--verify` tells the rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mae_et.data.packed import Files, is_url
from mae_et.engine.run_folder import fsync_folder

WORK = ".packing"  # of a split, until it is finished: settings, and a record of each shard


class Target:
    """The files of a split that is being packed.

    Args:
        root: of the split, a folder's path or a URL.
    """

    def __init__(self, root: str) -> None:
        self.files, self.work = Files(root), Files(f"{root}/{WORK}")
        self.is_local = not is_url(root)

    @contextlib.contextmanager
    def taken(self) -> Iterator[Path]:
        """Hold the split for this process, and give it a folder on disk for what is half-written.

        Raises:
            RuntimeError: another process packs it.
            OSError: the folder cannot be made or written to.
        """
        if not self.is_local:
            with tempfile.TemporaryDirectory(prefix="mae_et-pack-") as folder:
                yield Path(folder)
            return
        work = Path(self.work.root)
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work, os.O_RDONLY)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(f"another process packs {self.files.root}: wait until it has ended") from None
            for leftover in work.glob("*.half"):
                leftover.unlink()
            yield work
        finally:
            os.close(lock)

    def sizes(self) -> dict[str, int]:
        """Return the names and bytes of the files that are there; none if the folder is not."""
        try:
            return self.files.sizes()
        except FileNotFoundError:
            return {}

    def publish(self, half: Path, name: str) -> None:
        """Give a finished file of this disk its name in the split; it is gone from where it was.

        Raises:
            OSError: the disk is full, or the network does not answer.
        """
        if not self.is_local:
            filesystem, root = self.files.filesystem()
            filesystem.put_file(str(half), f"{root}/{name}")
            half.unlink()
            return
        with half.open("rb") as file:
            os.fsync(file.fileno())
        path = Path(self.files.path(name))
        path.parent.mkdir(exist_ok=True)
        half.replace(path)
        fsync_folder(path.parent)

    def write(self, folder: Path, name: str, data: bytes) -> None:
        """Write a small file into the split, by way of a folder for half-written ones; raises as `publish`."""
        half = folder / f"{name.replace('/', '-')}.half"
        half.write_bytes(data)
        self.publish(half, name)

    def finish(self) -> None:
        """Remove what was needed for continuing."""
        if self.is_local:
            shutil.rmtree(self.work.root, ignore_errors=True)
            return
        filesystem, root = self.work.filesystem()
        with contextlib.suppress(FileNotFoundError):  # an object store has no folders without objects
            filesystem.rm(root, recursive=True)
