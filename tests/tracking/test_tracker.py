"""MultiTracker: order, what a failing tracker may do to a run, and the values that trackers accept."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mae_et.tracking import MultiTracker, Tracker
from mae_et.tracking.tracker import plain_number


class Recorder:
    def __init__(self, calls: list, name: str, fails_at: str = ""):
        self.calls, self.name, self.fails_at = calls, name, fails_at

    def _called(self, what: str, *arguments) -> None:
        self.calls.append((self.name, what, *arguments))
        if what == self.fails_at:
            raise ConnectionResetError("helper process is gone")

    def log(self, metrics, step):
        self._called("log", dict(metrics), step)

    def images(self, pictures, step):
        self._called("images", dict(pictures), step)

    def finish(self, exit_code):
        self._called("finish", exit_code)


class Essential(Recorder):
    essential = True


def test_every_tracker_gets_every_call_in_order():
    calls: list = []
    trackers = MultiTracker([Recorder(calls, "a"), Recorder(calls, "b")])
    assert isinstance(trackers, Tracker)
    trackers.log({"train/loss": 0.5}, 3)
    trackers.images({"panel": Path("p.png")}, 3)
    trackers.finish(1)
    expected = [("log", {"train/loss": 0.5}, 3), ("images", {"panel": Path("p.png")}, 3), ("finish", 1)]
    assert calls == [(name, *call) for call in expected for name in ("a", "b")]


@pytest.mark.parametrize("method", ["log", "images", "finish"])
def test_a_failing_tracker_is_reported_once_and_left_out(method, capsys):
    calls: list = []
    trackers = MultiTracker([Recorder(calls, "bad", fails_at=method), Recorder(calls, "good")])
    for step in (1, 2):
        trackers.log({}, step)
        trackers.images({}, step)
    trackers.finish(0)
    assert sum(call[0] == "good" for call in calls) == 5
    assert sum(call[:2] == ("bad", method) for call in calls) == 1
    warning = capsys.readouterr().err
    assert warning.count("Recorder failed") == 1
    assert "ConnectionResetError: helper process is gone" in warning


def test_a_failure_that_cannot_be_reported_does_not_stop_the_run(monkeypatch):
    gone = io.StringIO()
    gone.close()
    monkeypatch.setattr(sys, "stderr", gone)
    calls: list = []
    trackers = MultiTracker([Recorder(calls, "bad", fails_at="log"), Recorder(calls, "good")])
    trackers.log({}, 1)
    assert [call[0] for call in calls] == ["bad", "good"]


def test_an_essential_tracker_stops_the_run():
    trackers = MultiTracker([Essential([], "truth", fails_at="log")])
    with pytest.raises(ConnectionResetError):
        trackers.log({}, 1)


def test_finish_closes_all_before_it_raises():
    calls: list = []
    trackers = MultiTracker([Essential(calls, "truth", fails_at="finish"), Recorder(calls, "other")])
    with pytest.raises(ConnectionResetError):
        trackers.finish(0)
    assert calls == [("truth", "finish", 0), ("other", "finish", 0)]


@pytest.mark.parametrize("value", [1.5, np.float32(1.5), np.float64(1.5), torch.tensor(1.5), np.array([1.5])])
def test_numbers_of_other_libraries_become_floats(value):
    plain = plain_number("train/loss", value)
    assert type(plain) is float
    assert plain == 1.5


@pytest.mark.parametrize("value", [None, [1.0], {"a": 1}, Path("x"), 1j, np.zeros(2), torch.zeros(2)])
def test_what_is_no_number_is_refused_by_name(value):
    with pytest.raises(TypeError, match="train/loss"):
        plain_number("train/loss", value)
