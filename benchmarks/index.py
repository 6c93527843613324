"""Millions of paths, in a list and in a folder: `python benchmarks/index.py --images 3000000 --files 100000`.

Prints medians of 3 child processes each: seconds by the clock and of the processor (on a machine that does other work
too, the second tells more), and the peak of resident memory above that of the imports alone.
Pages of the index that processes share are in the peak of each of them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mae_et.data.sampler import pass_order
from mae_et.data.sources import FileSource, Source, open_source

CLASSES = 21_841
TOUCHED = 100_000


def names(images: int, classes: int) -> Iterator[tuple[str, str]]:
    """Class and path (60 characters) of so many images."""
    for i in range(images):
        name = f"n{i * classes // images:08d}"
        yield name, f"imagenet22k/train/{name}/{name}_{i * 2_654_435_761 % 2**32:010d}_resized.JPEG"


def write_list(path: Path, images: int, labels: bool) -> None:
    """Write a list of images that are not there."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{image}\t{name}\n" if labels else f"{image}\n" for name, image in names(images, CLASSES))


def write_folder(root: Path, files: int) -> None:
    """Make class folders of empty files."""
    for name, image in names(files, min(1000, files)):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / Path(image).name).touch()


def peak() -> float:
    """Peak of this process's resident memory so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def own() -> float:
    """Memory that this process shares with no other, MiB."""
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(fields[name].split()[0]) for name in ("Private_Clean", "Private_Dirty")) / 1024


def touch(source: Source) -> None:
    """Ask for the paths of random images."""
    for i in np.random.default_rng(0).integers(0, len(source), TOUCHED).tolist():
        source.describe(i)


def in_worker(source: Source) -> float:
    """MiB that a forked process comes to own by asking for the paths of random images."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        touch(source)  # once for the code's own pages
        before = own()
        touch(source)
        os.write(writer, str(own() - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return float(os.read(reader, 100))


def measure(kind: str, place: str) -> dict[str, tuple[float, float, float]]:
    """Do everything in this process, one after the other: seconds of each, and MiB."""
    imported = peak()
    numbers = {"imports": (0.0, 0.0, imported)}

    def timed(name: str, action: Callable[[], object]) -> object:
        started, worked = time.perf_counter(), time.process_time()
        result = action()
        numbers[name] = time.perf_counter() - started, time.process_time() - worked, peak() - imported
        return result

    source = timed("open", lambda: open_source(kind, place))
    assert isinstance(source, FileSource)
    timed("paths", lambda: touch(source))
    timed("order", lambda: pass_order(len(source), 0, 0))
    numbers["worker"] = *numbers["paths"][:2], in_worker(source)
    return numbers


def in_child(kind: str, place: Path, cache: Path) -> dict[str, list[float]]:
    """Measure in a process of its own, with this folder as the cache."""
    command = [sys.executable, __file__, "--measure", kind, str(place)]
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def report(title: str, name: str, results: list[dict[str, list[float]]]) -> None:
    """Print medians."""
    seconds, worked, memory = (statistics.median(result[name][i] for result in results) for i in range(3))
    print(f"  {title:<52} {seconds:7.3f} s  {worked:7.3f} s CPU  {memory:6.1f} MiB", flush=True)


def compare(title: str, kind: str, place: Path, scratch: Path, rounds: int) -> None:
    """Measure all there is to measure of one data set."""
    caches = [scratch / f"cache {place.name} {i}" for i in range(rounds)]
    blocked = scratch / "no cache"
    blocked.touch()
    first = [in_child(kind, place, cache) for cache in caches]
    without = [in_child(kind, place, blocked) for _ in range(rounds)]
    size = sum(file.stat().st_size for file in caches[0].rglob("*") if file.is_file()) / 2**20
    again = [in_child(kind, place, cache) for cache in caches]
    print(f"{title}; index of {size:.0f} MiB; imports {again[0]['imports'][2]:.0f} MiB", flush=True)
    report("first open, index written", "open", first)
    report("open without a cache", "open", without)
    report("open from the cache", "open", again)
    report(f"{TOUCHED:,} random paths", "paths", again)
    report("order of a pass", "order", again)
    report(f"{TOUCHED:,} random paths in a worker: memory of its own", "worker", again)


def main() -> None:
    """Make the data, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3_000_000, help="paths in the lists")
    parser.add_argument("--files", type=int, default=100_000, help="empty files in the folder; 0: no folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for labels in (False, True):
            place = scratch / ("labelled.txt" if labels else "plain.txt")
            write_list(place, arguments.images, labels)
        if arguments.files:
            write_folder(scratch / "tree", arguments.files)
        time.sleep(2.5)  # what changed within two seconds is not kept
        for name in ("plain", "labelled"):
            title = f"list of {arguments.images:,} paths, {name}"
            compare(title, "list", scratch / f"{name}.txt", scratch, arguments.rounds)
        if arguments.files:
            compare(f"folder of {arguments.files:,} files", "folder", scratch / "tree", scratch, arguments.rounds)


if __name__ == "__main__":
    main()
