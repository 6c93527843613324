"""The console: what a person sees on a terminal (one line, rewritten) and in a log file (plain lines)."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest

from mae_et.tracking import ConsoleTracker
from mae_et.tracking.console import format_duration


def metrics(step: int, stage: int = 1, bandwidth: int = 160) -> dict:
    return {
        "step": step,
        "compute/fraction": 0.4123,
        "compute/flops": 1.2e15,
        "time/hours": 0.02,
        "images_seen": 256 * step,
        "train/loss": 0.03123,
        "train/lr": 1.4e-3,
        "train/grad_norm": 0.7,
        "stage/index": stage,
        "stage/bandwidth": bandwidth,
        "throughput/images_per_second": 1240.4,
        "throughput/data_wait": 0.0234,
        "eta/hours": 190 / 3600,
    }


LINE = "step 1200/3400  u 0.412  stage 2/3 B=160  loss 0.0312  lr 1.4e-03  1,240 img/s  data wait 2%  eta 3m10s"


def screen(text: str) -> list[str]:
    """What a terminal shows after this text: a carriage return goes to the line's start, writing overwrites."""
    lines, column = [""], 0
    for character in text:
        if character == "\n":
            lines.append("")
            column = 0
        elif character == "\r":
            column = 0
        else:
            lines[-1] = lines[-1][:column] + character + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")


def test_a_log_file_gets_a_line_each_without_control_characters():
    stream = io.StringIO()
    console = ConsoleTracker(3400, stream, stages=3)
    console.log(metrics(1200), 1200)
    console.log(metrics(1250), 1250)
    console.finish(0)
    assert stream.getvalue().splitlines() == [
        "step 1200/3400  stage 2/3 runs: B=160",
        LINE,
        LINE.replace("1200", "1250"),
    ]
    assert "\r" not in stream.getvalue()


def test_a_terminal_shows_one_line_that_is_rewritten(wide):
    stream = io.StringIO()
    console = ConsoleTracker(3400, stream, is_terminal=True, stages=3)
    for step in (1150, 1200):
        console.log(metrics(step), step)
    assert screen(stream.getvalue()) == ["step 1150/3400  stage 2/3 runs: B=160", LINE]
    console.finish(0)
    assert screen(stream.getvalue())[1:] == [LINE, ""]


def test_a_shorter_line_leaves_nothing_of_the_longer_one(wide):
    stream = io.StringIO()
    console = ConsoleTracker(3400, stream, is_terminal=True, stages=3)
    console.log(metrics(1150), 1150)
    console.log({"train/loss": 0.5}, 1200)
    assert screen(stream.getvalue())[-1] == "step 1200/3400  loss 0.5000"


def test_news_and_stage_changes_stay_above_the_progress_line(wide):
    stream = io.StringIO()
    console = ConsoleTracker(3400, stream, is_terminal=True, stages=3)
    console.log(metrics(1150, stage=0, bandwidth=96), 1150)
    console.log({"step": 1150, "compute/fraction": 0.4, "eval/knn": 0.61234, "eval/k": 20, "eval/split": "test"}, 1150)
    console.images({"panel": Path("runs/a/step_1150.png")}, 1150)
    console.log(metrics(1200), 1200)
    assert screen(stream.getvalue()) == [
        "step 1150/3400  stage 1/3 runs: B=96",
        "step 1150/3400  eval/knn 0.6123  eval/k 20  eval/split test",
        "step 1150/3400  panel: runs/a/step_1150.png",
        "step 1200/3400  stage 2/3 begins: B=160",
        LINE,
    ]


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 100, len(LINE), 120])
def test_a_narrow_terminal_loses_whole_fields_and_never_wraps(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = io.StringIO()
    console = ConsoleTracker(3400, stream, is_terminal=True, stages=3)
    console.log({name: value for name, value in metrics(1200).items() if name != "eval/knn"}, 1200)
    shown = screen(stream.getvalue())[-1]
    assert len(shown) < columns
    assert shown.startswith("step 1200/3400")
    assert set(shown.split("  ")) <= set(LINE.split("  "))
    assert ("loss 0.0312" in shown) == (columns >= 40)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_diverged_loss_is_shown(terminal, wide):
    stream = io.StringIO()
    console = ConsoleTracker(10, stream, is_terminal=terminal)
    console.log({"train/loss": math.nan, "train/lr": math.inf, "eta/hours": math.nan, "eval/knn": math.nan}, 3)
    assert screen(stream.getvalue())[:2] == ["step  3/10  eval/knn nan", "step  3/10  loss nan  lr inf  eta ?"]


class GoneStream(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


def test_a_terminal_that_was_closed_does_not_stop_the_run():
    console = ConsoleTracker(10, GoneStream(), is_terminal=True)
    console.log(metrics(1), 1)
    console.finish(0)
    closed = io.StringIO()
    closed.close()
    console = ConsoleTracker(10, closed, is_terminal=False)
    console.log(metrics(1), 1)


def test_a_stream_that_cannot_spell_a_name_gets_it_escaped():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    console = ConsoleTracker(10, stream, is_terminal=False)
    console.images({"panel": Path("café.png")}, 1)
    console.images({"panel": Path("b.png")}, 2)
    assert raw.getvalue().decode().splitlines() == [
        "step  1/10  panel: caf\\xe9.png",
        "step  2/10  panel: b.png",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (190, "3m10s"),
        (3599.9, "1h00m"),
        (7500, "2h05m"),
        (86400 * 3 + 4 * 3600, "3d04h"),
        (-1, "0s"),
        (math.inf, "?"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
