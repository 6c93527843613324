"""Pipes, devices and endless files where images and lists should be: refused at once, and replaced in training."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mae_et.config import ConfigError, load_config
from mae_et.data.decode import ImageError
from mae_et.data.sources import open_source
from mae_et.pretraining import pretrain
from mae_et.tracking import read_metrics
from tests.data.trees import write_images
from tests.end_to_end.tiny import arguments

SECONDS = 30  # a hundred times what any of these takes; what hangs does so for ever
KINDS = ("pipe", "socket", "link to a pipe", "device", "large", "link to large")


@contextmanager
def at_once() -> Iterator[None]:
    """Fail what does not end: reading /dev/zero, or waiting for the writer of a pipe."""

    def late(*_: object) -> None:
        raise AssertionError(f"not over after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def place(path: Path, kind: str) -> None:
    """Put what is no image at a path; `elsewhere` beside its folder holds what links name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    elsewhere = path.parent.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    target = elsewhere / path.name if kind.startswith("link") else path
    if kind.endswith("pipe"):
        os.mkfifo(target)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(os.path.relpath(target))  # sockets have short names alone
    elif kind.endswith("large"):
        with target.open("wb") as file:
            file.truncate(2 << 30)  # no disk is taken
    else:
        target = Path("/dev/zero")
    if target != path:
        path.symlink_to(target)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("listed", [False, True])
def test_what_is_no_file_is_no_image(tmp_path, kind, listed):
    write_images(tmp_path / "images", "a.png", "c.png")
    path = tmp_path / "images" / "b.png"
    place(path, kind)
    (tmp_path / "list.txt").write_text("".join(f"images/{name}.png\n" for name in "abc"))
    with at_once():
        source = open_source("list", tmp_path / "list.txt") if listed else open_source("folder", tmp_path / "images")
        assert len(source) == 3
        with pytest.raises(ImageError, match=rf"{path}.*(pipe or a device|2,147,483,648 bytes|No such device)"):
            source.image(1)
        assert source.image(2).shape == (3, 4, 5)


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/stdin", "/dev/null", "/proc/kcore", "/dev/tty"])
def test_lists_name_no_devices(tmp_path, name):
    (tmp_path / "list.txt").write_text(f"{name}\n")
    with at_once(), pytest.raises(ImageError, match=rf"{name} \(line 1 of .*list\.txt"):
        open_source("list", tmp_path / "list.txt").image(0)


@pytest.mark.parametrize("workers", [0, 1])
def test_training_goes_on_without_them(tmp_path, workers):
    images = tmp_path / "images"
    write_images(images, *(f"{i:02}.png" for i in range(19)))
    for number, kind in enumerate(KINDS):
        place(images / f"odd{number}.png", kind)
    changes = ("epochs=2", "data.max_bad=0.5", f"data.workers={workers}", "data.timeout_minutes=0.4")
    with at_once():
        assert pretrain(load_config(None, arguments(images, tmp_path / "run", *changes)), say=lambda _: None) == 0
    rows = read_metrics(tmp_path / "run" / "bad_images.jsonl")
    assert {Path(row["path"]).name for row in rows} == {f"odd{number}.png" for number in range(len(KINDS))}
    assert all(re.search("and no image|No such device", row["error"]) for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_is_a_file_of_lines(tmp_path, kind):
    path = tmp_path / "lists" / "train.txt"
    place(path, kind)
    for root in (path, path.parent):
        config = load_config(None, [*arguments(root, tmp_path / "run"), "data.source=list"])
        with at_once(), pytest.raises(ConfigError, match=r"train\.txt"):
            pretrain(config, say=lambda _: None)
