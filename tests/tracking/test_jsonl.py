"""metrics.jsonl: what is written is read back, and a kill costs at most the line being written."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mae_et.tracking import JsonlTracker, read_metrics, truncate_metrics


def write(path: Path, steps: range) -> None:
    tracker = JsonlTracker(path)
    for step in steps:
        tracker.log({"compute/fraction": step / 10, "train/loss": 1 / (step + 1), "stage/index": 0}, step)
    tracker.finish(0)


def test_rows_are_read_back_as_they_were_logged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    first = {"train/loss": 0.1 + 0.2, "images_seen": 2**60, "compute/flops": 1.2e15, "note": "é\nNeu", "done": True}
    tracker.log({"step": 99, **first}, 10)
    tracker.images({"panel": tmp_path / "pictures" / "step_10.png"}, 10)
    tracker.finish(0)
    # Equality is exact: Python writes the shortest decimal that reads back as the same float64.
    assert read_metrics(path) == [
        {"step": 10, **first},
        {"step": 10, "pictures": {"panel": "pictures/step_10.png"}},
    ]


def test_picture_paths_are_relative_to_the_metrics_file(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    tracker = JsonlTracker(Path("run/metrics.jsonl"))
    tracker.images({"inside": Path("run/a.png"), "outside": tmp_path / "b.png"}, 1)
    tracker.finish(0)
    assert read_metrics("run/metrics.jsonl")[0]["pictures"] == {"inside": "a.png", "outside": "../b.png"}


def test_non_finite_numbers_are_strict_json_and_come_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log({"a": math.nan, "b": math.inf, "c": -math.inf}, 1)
    tracker.finish(0)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "step": 1,
        "a": "NaN",
        "b": "Infinity",
        "c": "-Infinity",
    }
    (row,) = read_metrics(path)
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)


def test_a_value_that_is_no_number_writes_nothing(tmp_path):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    with pytest.raises(TypeError, match="train/loss"):
        tracker.log({"train/loss": [1.0]}, 1)  # type: ignore[dict-item]
    tracker.finish(0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_every_possible_tear_of_the_last_line_costs_only_that_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(3))
    whole = path.read_bytes()
    last = whole.rfind(b"\n", 0, -1) + 1
    for end in range(last, len(whole)):
        path.write_bytes(whole[:end])
        assert [row["step"] for row in read_metrics(path)] == [0, 1], f"torn after byte {end}"
        write(path, range(7, 8))
        assert [row["step"] for row in read_metrics(path)] == [0, 1, 7], f"appended after byte {end}"


@pytest.mark.parametrize("line", [b'{"step": 1, "train/lo\n', b"\x00\x00\n", b"\xff\n", b"[1]\n", b"\n"])
@pytest.mark.parametrize("read", [read_metrics, lambda path: truncate_metrics(path, 5)])
def test_a_corrupt_whole_line_is_named(tmp_path, line, read):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + line + b'{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read(path)


@pytest.mark.parametrize("step", [-1, 0, 2, 4, 9])
def test_truncation_keeps_what_lies_before_the_checkpoint_to_the_byte(tmp_path, step):
    path = tmp_path / "metrics.jsonl"
    write(path, range(5))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines) + b'{"step": 5, "tra')
    assert truncate_metrics(path, step) == 4 - min(step, 4)
    assert path.read_bytes() == b"".join(lines[: step + 1])
    assert list(tmp_path.iterdir()) == [path]


def test_truncation_of_a_missing_file_makes_none(tmp_path):
    assert truncate_metrics(tmp_path / "metrics.jsonl", 3) == 0
    assert not list(tmp_path.iterdir())


def test_a_row_without_a_step_cannot_be_truncated(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"train/loss": 1}\n')
    with pytest.raises(ValueError, match="line 1 has no"):
        truncate_metrics(path, 3)


def test_an_interrupted_truncation_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write(path, range(5))
    before = path.read_bytes()

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        truncate_metrics(path, 2)
    assert path.read_bytes() == before


def test_a_resumed_run_repeats_no_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(8))
    uninterrupted = path.read_bytes()
    path.write_bytes(uninterrupted[:-9])
    truncate_metrics(path, 4)
    write(path, range(5, 8))
    assert path.read_bytes() == uninterrupted


def test_a_row_that_fits_only_in_part_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log({"train/loss": 1.0}, 1)
    write_all = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, line: write_all(descriptor, line[:7]))
    with pytest.raises(OSError, match="step 2"):
        tracker.log({"train/loss": 1.0}, 2)
    monkeypatch.undo()
    tracker.log({"train/loss": 1.0}, 3)
    tracker.finish(0)
    assert [row["step"] for row in read_metrics(path)] == [1, 3]


WRITER = """
import sys
from mae_et.tracking.jsonl import JsonlTracker
tracker = JsonlTracker(sys.argv[1])
step = 0
while True:
    step += 1
    tracker.log({"train/loss": 1 / step, "note": "x" * 4000}, step)
    print(step, flush=True)
"""


def test_sigkill_loses_no_row_that_was_logged(tmp_path, repository):
    """The writer reports each row after `log` returned; each reported row must be in the file."""
    path = tmp_path / "metrics.jsonl"
    for attempt in range(3):
        path.unlink(missing_ok=True)
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], cwd=repository, stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        for _ in range(50 + 37 * attempt):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        reported = [line for line in writer.stdout.read().split("\n") if line]
        writer.stdout.close()
        assert writer.wait() == -signal.SIGKILL
        steps = [row["step"] for row in read_metrics(path)]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) >= 50 + 37 * attempt + len(reported)
