"""Batches: what is shown for an image that cannot be read, and what a worker that dies or hangs looks like."""

from __future__ import annotations

import gc
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Sampler

from mae_et.data.decode import ImageError
from mae_et.data.loader import (
    Batch,
    DataError,
    RequestDataset,
    batches_of,
    build_loader,
)
from mae_et.data.randomness import REPLACEMENT_STREAM, sample_seed, uniforms
from mae_et.data.replacing import TRIES, BadImage
from mae_et.data.requests import SampleRequest
from mae_et.data.sources import open_source
from mae_et.data.transforms import CropTransform
from tests.data.zoo import Memory, refused, vanish, write_zoo


class Requests(Sampler[list[SampleRequest]]):
    """So many batches of 8, over the images in order."""

    def __init__(self, images: int, batches: int):
        self.images, self.batches = images, batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[SampleRequest]]:
        for first in range(0, 8 * self.batches, 8):
            places = range(first, first + 8)
            yield [SampleRequest(place % self.images, (16, 16), 0.0, sample_seed(1, place)) for place in places]


def as_it_is(image: torch.Tensor, _request: SampleRequest) -> torch.Tensor:
    return image


def bad_ones(*bad: int) -> Callable[[int], Exception | None]:
    return lambda i: ImageError(f"memory #{i}: broken") if i in bad else None


# Replacement


def test_every_animal_of_the_zoo_is_decoded_as_it_should_be_or_replaced_and_named(tmp_path):
    animals = write_zoo(tmp_path / "zoo")
    source = open_source("folder", tmp_path / "zoo")
    paths = [os.path.relpath(source.describe(i), tmp_path / "zoo") for i in range(len(source))]
    assert sorted(paths) == sorted({*animals, "link-to-folder.jpg"})
    assert 10 < len(refused(animals)) < len(animals) - 10
    vanish(tmp_path / "zoo")
    dataset = RequestDataset(source, as_it_is, replace=True)
    for index, path in enumerate(paths):
        batch = dataset.__getitems__([SampleRequest(index, (16, 16), 0.0, sample_seed(2, index))])
        animal = animals[path]
        pixels = batch.images[0].permute(1, 2, 0).numpy().astype(int)
        if animal.pixels is not None:
            assert batch.bad == (), path
            assert pixels.shape == animal.pixels.shape, path
            assert np.abs(pixels - animal.pixels).max() <= animal.tolerance, path
            continue
        assert {image for image, _ in batch.bad} <= {paths.index(name) for name in refused(animals)}
        assert batch.bad[0].image == index
        assert batch.bad[0].error.startswith(f"{source.describe(index)}: ")
        assert re.search(animal.reason, batch.bad[0].error), batch.bad[0].error
        others = [other.pixels for other in animals.values() if other.pixels is not None]
        assert any(pixels.shape == o.shape and np.abs(pixels - o).max() <= 8 for o in others), path


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_neither_pixels_nor_what_is_reported(tmp_path, workers):
    write_zoo(tmp_path / "zoo")
    source = open_source("folder", tmp_path / "zoo")
    vanish(tmp_path / "zoo")
    transform = CropTransform((16, 16))

    def run(workers: int) -> list[Batch]:
        dataset = RequestDataset(source, transform, replace=True)
        with batches_of(build_loader(dataset, Requests(len(source), 9), workers, False)) as batches:
            return list(batches)

    alone, together = run(0), run(workers)
    assert sum(len(batch.bad) for batch in alone) > 20
    for mine, theirs in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.tensors, theirs.tensors))
        assert mine.bad == theirs.bad


def test_the_replacement_is_drawn_from_the_requests_seed():
    """Against the definition, written out; the label is the replacement's, the index the one that was asked for."""
    bad = (3, 17, 18, 19)
    dataset = RequestDataset(Memory(20, bad_ones(*bad)), as_it_is, replace=True)
    shown, tried_in_vain = Counter(), 0
    for place in range(400):
        seed = sample_seed(5, place)
        batch = dataset.__getitems__([SampleRequest(3, (4, 4), 0.0, seed)])
        failed = [3]
        for uniform in uniforms(seed, TRIES, REPLACEMENT_STREAM):
            candidate = int(20 * uniform)
            while candidate in failed:
                candidate = (candidate + 1) % 20
            if candidate not in bad:
                break
            failed.append(candidate)
        assert int(batch.images[0, 0, 0, 0]) == candidate
        assert batch.labels.tolist() == [candidate % 2]
        assert batch.indices.tolist() == [3]
        assert batch.seeds.tolist() == [seed]
        assert batch.bad == tuple(BadImage(i, f"memory #{i}: broken") for i in failed)
        shown[candidate] += 1
        tried_in_vain += len(failed) > 1
    assert set(shown) == set(range(20)) - set(bad)
    assert tried_in_vain


def test_the_rest_of_a_batch_stays():
    asked = [SampleRequest(i, (4, 4), 0.0, sample_seed(1, i)) for i in range(8)]
    whole = RequestDataset(Memory(100), as_it_is, replace=True).__getitems__(asked)
    one_bad = RequestDataset(Memory(100, bad_ones(5)), as_it_is, replace=True).__getitems__(asked)
    others = [0, 1, 2, 3, 4, 6, 7]
    assert torch.equal(whole.images[others], one_bad.images[others])
    assert not torch.equal(whole.images[5], one_bad.images[5])
    assert torch.equal(whole.indices, one_bad.indices)
    assert (whole.bad, one_bad.bad) == ((), (BadImage(5, "memory #5: broken"),))


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (
            1000,
            f"{TRIES} images in a row of memory could not be read, the first of them memory #7: broken; is",
        ),
        (8, "all 8 images of memory could not be read, the first of them memory #7: broken; is the disk"),
        (1, "the only image of memory cannot be read: memory #0: broken; mend it"),
    ],
)
def test_when_nothing_can_be_read_the_fault_is_not_an_images(count, said):
    asked: list[int] = []

    def broken(i: int) -> ImageError:
        asked.append(i)
        return ImageError(f"memory #{i}: broken")

    dataset = RequestDataset(Memory(count, broken), as_it_is, replace=True)
    with pytest.raises(ImageError, match=re.escape(said)):
        dataset.__getitems__([SampleRequest(min(7, count - 1), (4, 4), 0.0, 3)])
    assert len(asked) == len(set(asked)) == min(TRIES, count)  # none twice


def test_the_last_readable_image_is_found():
    """Of ten images nine are broken: none is tried twice, so that the tenth is always reached."""
    dataset = RequestDataset(Memory(10, bad_ones(*range(9))), as_it_is, replace=True)
    for seed in range(50):
        assert dataset.__getitems__([SampleRequest(4, (4, 4), 0.0, seed)]).images.unique().tolist() == [9]


@pytest.mark.parametrize("workers", [0, 1])
def test_scores_never_show_another_image(workers):
    loader = build_loader(RequestDataset(Memory(100, bad_ones(20)), as_it_is), Requests(100, 9), workers, False)
    with pytest.raises(ImageError, match="memory #20: broken"), batches_of(loader) as batches:
        list(batches)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("error", "expected"),
    [(OSError(5, "Input/output error", "x.jpg"), "Input/output error"), (ZeroDivisionError("a defect"), "a defect")],
)
def test_faults_that_say_nothing_about_the_image_stay_what_they_are(workers, error, expected):
    source = Memory(100, lambda i: error if i == 20 else None)
    loader = build_loader(RequestDataset(source, as_it_is, replace=True), Requests(100, 9), workers, False)
    with pytest.raises(type(error), match=expected), batches_of(loader) as batches:
        list(batches)


def test_a_transform_that_fails_is_no_bad_image():
    def transform(_image: torch.Tensor, _request: SampleRequest) -> torch.Tensor:
        raise ImageError("a defect")

    dataset = RequestDataset(Memory(100), transform, replace=True)
    with pytest.raises(ImageError, match="a defect"):
        dataset.__getitems__([SampleRequest(0, (4, 4), 0.0, 0)])


# Workers


def stop_at(image: int, how: Callable[[], object]) -> Callable[[int], None]:
    """What a worker does to itself when it comes to an image."""

    def act(i: int) -> None:
        if i == image:
            how()

    return act


def fail(source: Memory, workers: int, timeout: float = 0, look: Callable[[int, list[int]], None] | None = None) -> str:
    """The DataError of a run; none of its workers is left."""
    loader = build_loader(RequestDataset(source, as_it_is), Requests(len(source), 60), workers, False, timeout)
    pids: list[int] = []
    with pytest.raises(DataError) as caught, batches_of(loader) as batches:  # noqa: PT012
        for number, _ in enumerate(batches):
            pids = [worker.pid for worker in loader._iterator._workers]
            if look is not None:
                look(number, pids)
    assert len(pids) == workers
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    said = str(caught.value)
    del caught
    gc.collect()  # a socket left open is closed here, and not in another test: see `may_leave_a_socket`
    assert said.endswith("the same command then continues a run from its last checkpoint")
    return said


@pytest.fixture
def handed_over(request, monkeypatch) -> None:
    """How workers hand images over, "pipe" or "shared memory"; they inherit it."""
    monkeypatch.setattr("mae_et.data.loader.INLINE_BYTES", {"pipe": 1 << 20, "shared memory": 0}[request.param])


# Torch tells of a death from its handler of SIGCHLD, which may raise while a tensor's file is taken over from a worker:
# between the socket's making and the `with` that closes it. Then Python's garbage collection does, and says so.
may_leave_a_socket = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    os.read(os.pipe()[0], 1)  # as a read from a share whose server is gone


@may_leave_a_socket
@pytest.mark.parametrize(
    ("how", "said"),
    [
        (kill_self, r"data worker \d+ was ended by signal 9 \(Killed\); .*memory runs out: lower data.workers"),
        (lambda: os._exit(7), r"data worker \d+ ended by itself, with exit code 7; data.workers=0 shows"),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), r"signal 7 \(Bus error\); shared memory has run out"),
    ],
)
@pytest.mark.parametrize(("workers", "handed_over"), [(1, "pipe"), (2, "shared memory")], indirect=["handed_over"])
@pytest.mark.usefixtures("handed_over")
def test_a_worker_that_dies_at_work_is_named(capfd, how, said, workers):
    assert re.search(said, fail(Memory(600, stop_at(200, how)), workers, timeout=60))
    capfd.readouterr()  # torch's own words on stderr


@may_leave_a_socket
@pytest.mark.parametrize("handed_over", ["pipe", "shared memory"], indirect=True)
@pytest.mark.parametrize("trial", range(3))
@pytest.mark.usefixtures("handed_over")
def test_a_worker_that_is_killed_at_any_moment_is_named(trial):
    """While it hands over, mostly: reads take no time here. Torch raises RuntimeError or ConnectionResetError."""
    started: list[threading.Timer] = []

    def look(number: int, pids: list[int]) -> None:
        if number == 0:
            started.append(threading.Timer(0.006 * trial, os.kill, (pids[trial % 2], signal.SIGKILL)))
            started[0].start()
        time.sleep(0.002)

    assert "was ended by signal 9 (Killed)" in fail(Memory(600), 2, 60 * (trial % 2), look)
    started[0].join()


@may_leave_a_socket
def test_a_worker_that_is_killed_while_the_model_computes_is_named():
    def look(number: int, pids: list[int]) -> None:
        if number == 3:
            time.sleep(0.3)  # all has been fetched that may be: it waits
            os.kill(pids[1], signal.SIGKILL)
            until = time.monotonic() + 5
            while time.monotonic() < until:
                sum(range(1000))

    started = time.monotonic()
    assert "was ended by signal 9 (Killed)" in fail(Memory(600), 2, look=look)
    assert time.monotonic() - started < 4


def test_a_worker_that_hangs_is_named_and_ended():
    started = time.monotonic()
    said = fail(Memory(600, stop_at(200, hang)), 2, timeout=1.2)
    assert said.startswith("no data worker delivered a batch for 0.02 minutes: is the disk or the network share")
    assert "raise data.timeout_minutes" in said
    assert time.monotonic() - started < 8


def test_other_errors_of_the_block_stay_what_they_are_and_end_the_workers():
    loader = build_loader(RequestDataset(Memory(600), as_it_is), Requests(600, 60), 2, False)
    pids: list[int] = []
    with pytest.raises(RuntimeError, match="the model's") as caught, batches_of(loader) as batches:  # noqa: PT012
        next(batches)
        pids = [worker.pid for worker in loader._iterator._workers]
        raise RuntimeError("the model's")
    assert type(caught.value) is RuntimeError
    assert len(pids) == 2
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_without_workers_there_is_nothing_to_wait_for():
    loader = build_loader(RequestDataset(Memory(600), as_it_is), Requests(600, 3), 0, False, timeout_seconds=5)
    with batches_of(loader) as batches:
        assert len(list(batches)) == 3
