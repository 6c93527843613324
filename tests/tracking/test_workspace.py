"""The dashboard shows what runs log, by the names that they log it under; and the server gets it."""

from __future__ import annotations

import json
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mae_et.__main__ import main
from mae_et.curriculum.plan import PlannedStage
from mae_et.engine.run_folder import RunFolder
from mae_et.evaluation import scenes, scores
from mae_et.evaluation.classification import ClassificationResult
from mae_et.evaluation.detection import DetectionResult, PrecisionSummary
from mae_et.evaluation.pictures import PictureObserver
from mae_et.evaluation.probe import ProbeResult
from mae_et.evaluation.segmentation import SegmentationResult
from mae_et.examination import metrics as scores_of_classes
from mae_et.tracking import read_metrics
from mae_et.tracking.workspace import COLUMNS, PICTURES, make_workspace
from tests.end_to_end.labelled import write_classes
from tests.end_to_end.tiny import run_here

pytest.importorskip("wandb")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the library's own
SYSTEM = "system/"
BY_CODE = {  # of tasks whose runs take longer than a look at what names their scores
    **scores_of_classes("val", ClassificationResult(0.5, 0.5, 1, [], np.zeros((0, 0)))),
    **DetectionResult(PrecisionSummary(*[0.5] * 7, per_class=()), None, 1, 1, 1).metrics("val/"),
    **scenes.metrics("val", SegmentationResult(0.5, 0.5, 0.5, (), (), 1, np.zeros((0, 0)))),
}


def cheap_draw(_observer: PictureObserver, _stage: PlannedStage, path: Path, _samples: object) -> None:
    Image.new("RGB", (8, 8)).save(path)


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> tuple[Path, Path]:
    """(folder, W&B's log) of a run with scores and pictures, offline; what these show is not, and costs nothing."""
    folder = tmp_path_factory.mktemp("workspace")
    images = write_classes(folder / "images")
    accuracies = cycle([0.9, 0.7])
    with pytest.MonkeyPatch.context() as patch:
        for name, place in (("HOME", "home"), ("WANDB_CONFIG_DIR", "home/config"), ("NETRC", "home/netrc")):
            patch.setenv(name, str(folder / place))
        patch.setattr(scores, "logistic_probe", lambda _train, _test: ProbeResult(next(accuracies), 1.0))
        patch.setattr(PictureObserver, "draw", cheap_draw)
        run = run_here(
            images / "train",
            folder / "run",
            *("epochs=1", "evaluation.every=0.4", "evaluation.source=folder", f"evaluation.root={images}"),
            *("tracking.wandb=offline", "tracking.pictures=true", "tracking.picture_samples=1"),
            *("tracking.group=colours", "seed=1"),
        )
    (log,) = (run / "wandb").glob("offline-run-*/*.wandb")
    return run, log


def panels(view: Any) -> list[dict[str, Any]]:
    """Of a workspace's or a report's specification."""
    found: list[dict[str, Any]] = []
    if isinstance(view, dict):
        found += [view] if "viewType" in view else []
        view = list(view.values())
    if isinstance(view, list):
        found += [panel for part in view for panel in panels(part)]
    return found


def names_of(panel: dict[str, Any]) -> set[str]:
    """Of all that a panel reads."""
    config = panel["config"]
    names = {config.get("xAxis"), config.get("yAxis"), *config.get("metrics", []), *config.get("mediaKeys", [])}
    return {name.removeprefix("summary:") for name in names if name}


def test_every_panel_reads_what_runs_log(logged, read_wandb):
    _, log = logged
    records_of, history_of = read_wandb
    records = records_of(log)
    rows = history_of(records)
    stats = [item.key for record in records if record.HasField("stats") for item in record.stats.item]
    summary = {item.key for record in records if record.HasField("summary") for item in record.summary.update}
    known = {name for row in rows for name in row} | summary | set(BY_CODE) | {"_runtime"}
    known |= {f"{SYSTEM}{name}" for name in (*stats, "cpu")}  # of which the first sample of a process has none
    known |= {f"{SYSTEM}gpu.{i}.{name}" for i in range(8) for name in ("gpu", "memoryAllocated", "powerWatts")}
    # Pictures of other tasks, by the split that they examine last.
    examined = {f"{split}/{kind}" for split in ("val", "test") for kind in ("confusion", "detections", "scenes")}
    assert set(PICTURES) == {"pictures/stages", *examined}
    known |= examined
    spec = make_workspace("me", "mae_et")._to_model().spec.model_dump(by_alias=True, exclude_none=True)
    shown = panels(spec)
    assert len(shown) > 20
    unknown = {name for panel in shown for name in names_of(panel)} - known
    assert not unknown
    assert "pictures/stages" in {name for row in rows for name in row}
    columns = {name.removeprefix("summary:") for name in COLUMNS if name.startswith("summary:")}
    assert columns <= summary
    (first,) = [record.run for record in records if record.HasField("run")][:1]
    config = {item.key: json.loads(item.value_json) for item in first.config.update}
    for name in (name for name in COLUMNS if name.startswith("config:") and "parent" not in name):
        key, _, rest = name.removeprefix("config:").partition(".value")
        value = config[key]
        for part in filter(None, rest.split(".")):
            value = value[part]
        assert value is not None
    assert first.run_group == "colours"


def test_pictures_lie_where_their_stages_end(logged, read_wandb):
    run, log = logged
    records_of, history_of = read_wandb
    shown = [row for row in history_of(records_of(log)) if "pictures/stages" in row]
    plan = json.loads(RunFolder(run).plan_path.read_text())
    assert len(shown) == len(plan["stages"]) == 3
    rows = {row["step"]: row for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row}
    for row, stage in zip(shown, plan["stages"], strict=True):
        axes = ("compute/fraction", "compute/flops", "time/hours", "images_seen")
        assert {axis: row[axis] for axis in axes} == {axis: rows[row["step"]][axis] for axis in axes}
        assert row["pictures/stages"]["caption"].startswith(f"stage-{stage['index'] + 1}-B")
        assert row["pictures/stages"]["path"].startswith("media/images/pictures/stages_")
    steps = [row["step"] for row in shown]
    assert steps == sorted(steps)
    assert steps[-1] == max(rows)


def test_the_summary_is_of_the_rows(logged, read_wandb):
    run, log = logged
    records_of, _ = read_wandb
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "eval/probe" in row]
    best = max(rows, key=lambda row: row["eval/probe"])
    summary = {}
    for record in records_of(log):
        if record.HasField("summary"):
            summary.update({item.key: json.loads(item.value_json) for item in record.summary.update if item.key})
    assert [row["eval/probe"] for row in rows] == [0.9, 0.7]
    assert summary["best/eval/probe"] == best["eval/probe"]
    assert summary["best/eval/probe_at_flops"] == best["compute/flops"]
    assert summary["best/eval/probe_at_hours"] == best["time/hours"]


def test_workspace_and_report_are_saved(wandb_server, capsys):
    assert main(["workspace", "--entity", "me", "--project", "photos", "--report"]) == 0
    addresses = capsys.readouterr().out.split()
    assert [address.startswith(f"{wandb_server.url}/me/photos") for address in addresses] == [True, True]
    workspace, report = wandb_server.views
    assert (workspace["type"], report["type"]) == ("project-view", "runs")
    assert {view["projectName"] for view in wandb_server.views} == {"photos"}
    one, other = (json.loads(view["spec"]) for view in wandb_server.views)
    sections = one["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == [
        *("Scores against compute", "Loss by stage", "Throughput and data wait", "Pictures", "Machine")
    ]
    assert one["section"]["runSets"][0]["grouping"] == [{"section": "run", "name": "group"}]
    assert {name for panel in panels(one) for name in names_of(panel)} == {
        name for panel in panels(other) for name in names_of(panel)
    }
    assert [panel["viewType"] for panel in panels(other)].count("Run Comparer") == 1
    places = [
        [tuple(panel["layout"].values()) for panel in panels(block)]
        for block in other["blocks"]
        if block["type"] == "panel-grid"
    ]
    assert all(len(set(grid)) == len(grid) for grid in places)


def test_runs_are_drawn_one_by_one_if_asked_for():
    spec = make_workspace("me", "mae_et", grouped=False)._to_model().spec.model_dump(by_alias=True)
    assert spec["section"]["runSets"][0]["grouping"] == []


def test_without_a_key_it_says_how_to_log_in(wandb_home, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["workspace", "--entity", "me"]) == 2
    assert "`wandb login` keeps a key" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert main(["workspace", "--entity", "me"]) == 2
    assert "pip install 'mae_et[workspaces]'" in capsys.readouterr().err
