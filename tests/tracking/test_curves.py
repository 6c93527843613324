"""The picture of a run's curves: smoothing, stages and the choice of axes, and that nothing is cut off."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from mae_et.tracking import JsonlTracker, read_metrics
from mae_et.tracking.curves import _score_groups, _stage_spans, curve_picture, smooth


def run(count=200, bandwidths=(96, 160, 224), reached=1.0, scores=True) -> list[dict]:
    rng = np.random.default_rng(0)
    rows: list[dict] = []
    for step in range(1, count + 1):
        u = step / count
        if u > reached:
            break
        stage = min(int(u * len(bandwidths)), len(bandwidths) - 1)
        rows.append(
            {
                "step": step,
                "compute/fraction": u,
                "train/loss": 0.06 - 0.02 * u + 0.001 * rng.standard_normal() + 2 * math.exp(-step),
                "train/lr": 1.4e-3 * (1 - u),
                "stage/index": stage,
                "stage/bandwidth": bandwidths[stage],
            }
        )
        if scores and step % 50 == 0:
            rows.append({"step": step, "compute/fraction": u, "eval/knn": u / 2, "eval/seconds": 30.5})
    return rows


@pytest.mark.parametrize("window", [1, 3, 9, 401])
def test_smoothing_is_the_mean_over_the_window(window):
    values = np.random.default_rng(0).standard_normal(101)
    values[[5, 6, 50]] = [math.nan, math.inf, -math.inf]
    expected = []
    for centre in range(len(values)):
        near = values[max(0, centre - window // 2) : centre + window // 2 + 1]
        near = near[np.isfinite(near)]
        expected.append(near.mean() if len(near) else math.nan)
    # Differences of running sums of 101 values near 1: rounding below 101 * 2**-52 * 10.
    np.testing.assert_allclose(smooth(values, window), expected, atol=1e-12)


def test_stages_meet_without_a_gap_and_carry_their_bandwidth():
    spans = _stage_spans([row for row in run(reached=0.5) if "train/loss" in row])
    assert [span.label for span in spans] == ["B = 96", "B = 160"]
    assert spans[0].begin == 0.0
    assert spans[0].end == spans[1].begin == pytest.approx(0.33)
    assert spans[1].end == 0.5


def test_scores_within_0_and_1_share_an_axis():
    rows = run()
    rows.append({"step": 200, "compute/fraction": 1.0, "eval/probe": 0.7, "eval/note": "text", "eval/loss": math.nan})
    assert _score_groups(rows) == [["eval/knn", "eval/probe"], ["eval/seconds"], ["eval/loss"]]


def ink(path) -> np.ndarray:
    """Which pixels of a picture are not white."""
    return np.array(Image.open(path).convert("RGB")).min(axis=2) < 250


@pytest.mark.parametrize(
    "rows",
    [
        run(),
        run(scores=False),
        run(reached=0.4),
        run(count=1),
        run(count=12, bandwidths=(28,)),
        run(bandwidths=tuple(range(96, 288, 8))),
        [{"compute/fraction": 0.5, "train/loss": math.nan, "train/lr": 1e-3}],
    ],
    ids=["full", "no scores", "unfinished", "one row", "few rows", "24 stages", "only NaN"],
)
def test_a_picture_is_1200_wide_with_nothing_at_its_border(rows, tmp_path):
    path = tmp_path / "pictures" / "curves.png"
    curve_picture(rows, path, title="a run")
    marked = ink(path)
    assert marked.shape[1] == 1200
    assert marked.any()
    assert not marked[:3].any()
    assert not marked[-3:].any()
    assert not marked[:, :3].any()
    assert not marked[:, -3:].any()


def test_each_group_of_scores_adds_an_axis(tmp_path):
    heights = []
    for scores in (False, True):
        curve_picture(run(scores=scores), tmp_path / "curves.png")
        heights.append(ink(tmp_path / "curves.png").shape[0])
    assert heights[1] - heights[0] == 2 * 200


def test_a_diverged_loss_is_marked(tmp_path):
    """Crosses in vermilion (213, 94, 0) stand at the foot of the loss's axes; the learning rate is the same colour."""
    counts = []
    for loss in (0.05, math.nan):
        rows = [dict(row) for row in run(scores=False)]
        for row in rows[100:110]:
            row["train/loss"] = loss
        curve_picture(rows, tmp_path / "curves.png")
        upper = np.array(Image.open(tmp_path / "curves.png").convert("RGB"))[:370].astype(int)
        counts.append((np.abs(upper - [213, 94, 0]).max(axis=2) < 20).sum())
    assert counts[0] == 0
    assert counts[1] > 50


def test_the_metrics_file_is_all_it_takes(tmp_path):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    for row in run(count=60):
        tracker.log(row, row["step"])
        tracker.images({"panel": tmp_path / "p.png"}, row["step"])
    tracker.finish(0)
    curve_picture(read_metrics(tmp_path / "metrics.jsonl"), tmp_path / "curves.png")
    assert ink(tmp_path / "curves.png").any()


def test_without_a_loss_there_is_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="has the run logged yet"):
        curve_picture([{"step": 1, "pictures": {}}, {"train/loss": 0.5}], tmp_path / "curves.png")
