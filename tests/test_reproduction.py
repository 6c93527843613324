"""`reproduce`: experiments parse and plan, the runner continues where it was killed, the table is right."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from mae_et.__main__ import main
from mae_et.config import ConfigError
from mae_et.curriculum import Plan
from mae_et.reproduction.cells import MARKER, runs_of
from mae_et.reproduction.command import listing
from mae_et.reproduction.costs import Planner, cost_table, traffic_table
from mae_et.reproduction.experiments import SCALES, find, names, read_experiment
from mae_et.reproduction.table import whole_table
from tests.end_to_end.labelled import COMMON, TINY_FINETUNE, write_classes
from tests.end_to_end.tiny import TINY
from tests.recipes import REPOSITORY
from tests.test_paper_map import ROWS, starts_with

every_experiment = pytest.mark.parametrize("name", names())
# Data that are not on every machine; a plan needs no more than their names.
PLACES = {
    "photos": "/data/photos",
    "clipart": "/data/clipart",
    "imagenet": "/data/imagenet",
    "imagenet22k": "/data/imagenet22k",
}


@every_experiment
def test_an_experiment_is_of_an_entry_of_the_map(name):
    experiment = read_experiment(find(name))
    assert experiment.title
    assert set(experiment.scales) <= set(SCALES)
    rows = [row for row in ROWS if row.paper == experiment.paper and starts_with(row.entry, experiment.entry)]
    assert rows, f"docs/paper.md has no {experiment.entry} of {experiment.paper}"
    assert all(row.reproduce == name for row in rows if not row.status.startswith("absent"))


@every_experiment
def test_every_cell_loads_and_plans(name):
    for scale in read_experiment(find(name)).scales.values():
        planner = Planner(scale, PLACES)
        for cell in scale.cells.values():
            plan = planner.plan(cell.name)
            if cell.program in ("pretrain.py", "finetune.py", "plan"):
                assert isinstance(plan, Plan), f"{name}, {scale.name}, {cell.name}: {plan}"
            # A laptop's training ends within minutes: three are 18 TFLOPs at 100 GFLOP/s. Others end by the clock.
            trained = cell.program != "plan" and planner.wall_hours(cell.name) is None
            if trained and scale.name == "laptop" and isinstance(plan, Plan):
                assert (plan.total_flops or 0) < 3.6e13


def test_a_folder_holds_one_command():
    """Tables share runs: a cell's name stands for the same command in all of them."""
    made = {}
    for name in names():
        for scale in read_experiment(find(name)).scales.values():
            for cell in scale.cells.values():
                for run in runs_of(scale, cell, PLACES):
                    assert made.setdefault(run.folder, run.words) == run.words, f"{name}: {run.folder}"


@every_experiment
def test_figures_of_the_paper_have_a_source(name):
    experiment = read_experiment(find(name))
    figures = [cell.paper for scale in experiment.scales.values() for cell in scale.cells.values() if cell.paper]
    assert all(re.search(r"\d", figure) for figure in figures)
    if experiment.known == "unseen":
        # What an unseen table has for figures are those of a table that was seen.
        assert all("81.0" in figure or "79.6" in figure for figure in figures)


def test_names_are_found_as_people_write_them():
    assert find("Table 15") == find("table_15") == find("table15") == REPOSITORY / "configs/reproduce/table_15.yaml"
    assert "table_15" in listing()
    with pytest.raises(ConfigError, match="table_15"):
        find("table_99")


def test_tables_of_benchmarks_are_read_as_well():
    for path in (REPOSITORY / "benchmarks" / "tables").glob("*.yaml"):
        (scale,) = read_experiment(path).scales.values()
        for cell in scale.cells.values():
            runs_of(scale, cell, PLACES)


def test_a_cost_is_that_of_all_seeds():
    scale = read_experiment(find("table_6")).scales["laptop"]
    plans = [(Planner(scale, {}).plan(cell.name), len(cell.seeds)) for cell in scale.cells.values()]
    steps = sum(plan.total_steps * seeds for plan, seeds in plans if isinstance(plan, Plan))
    assert f"in all: {steps:,} steps" in cost_table(scale, {})


def test_traffic_is_the_ratio_of_the_areas():
    plan = Planner(read_experiment(find("table_20")).scales["paper"], {}).plan("mae")
    assert isinstance(plan, Plan)
    rows = {row.split()[0]: row.split() for row in traffic_table(plan, 3).splitlines() if row.strip()[:1].isdigit()}
    for size in (96, 160, 224):
        batch, sent, ratio = rows[str(size)][1], rows[str(size)][3], rows[str(size)][-1]
        assert float(ratio) == pytest.approx((size / 224) ** 2, abs=1e-3)  # printed with three digits
        assert float(sent) == pytest.approx(int(batch) * 3 * size**2 / 1e6, abs=0.05)  # printed with one


def test_the_papers_scale_starts_only_when_told(capsys):
    assert main(["reproduce", "table_6", "--scale", "paper"]) == 0
    out = capsys.readouterr().out
    assert "--yes" in out


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"a": {"title": "a", "command": "rm -rf"}}, "unknown program"),
        ({"a": {"title": "a", "command": "knn", "sedes": [1]}}, "sedes"),
        ({}, "no cells"),
    ],
)
def test_malformed_files_are_refused(tmp_path, cells, message):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"cells": cells}))
    with pytest.raises(ConfigError, match=message):
        read_experiment(tmp_path / "x.yaml")


def test_a_cell_uses_earlier_cells_of_its_seed(tmp_path):
    cells = {
        "one": {"title": "1", "command": "pretrain.py"},
        "three": {"title": "3", "command": "pretrain.py", "seeds": [1, 2, 3]},
        "user": {"title": "u", "command": "finetune.py a={one} b={three} c={place} 'd=[{e: 1}]'", "seeds": [2, 3]},
        "early": {"title": "e", "command": "finetune.py checkpoint={late}"},
        "late": {"title": "l", "command": "pretrain.py"},
    }
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"runs": "runs/x", "settings": ["epochs=1"], "cells": cells}))
    (scale,) = read_experiment(tmp_path / "x.yaml").scales.values()
    first, second = runs_of(scale, scale.cells["user"], {"place": "/there"})
    assert first.words[1:] == ["a=runs/x/one", "b=runs/x/three-2", "c=/there", "d=[{e: 1}]", "epochs=1"]
    assert second.words[2] == "b=runs/x/three-3"
    assert second.folder == REPOSITORY / "runs/x/user-3"
    with pytest.raises(ConfigError, match="late"):
        runs_of(scale, scale.cells["early"], {})


def test_the_table_has_the_papers_figure_beside_ours(tmp_path):
    cells = {"a": {"title": "ours", "command": "finetune.py", "seeds": [1, 2], "paper": "81.6 %"}}
    cells["later"] = {"title": "not yet", "command": "finetune.py", "paper": "1 %"}
    scales = {"laptop": {"runs": str(tmp_path), "caption": "small.", "cells": cells}}
    values = {"title": "T", "paper": "P", "entry": "Table 1", "known": "picture", "scales": scales}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(values))
    for seed, top1, hours in ((1, 0.60, 0.1), (2, 0.62, 0.3)):
        folder = tmp_path / f"a-{seed}"
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps({"val": {"top1": 0.1}, "test": {"top1": top1}}))
        (folder / "metrics.jsonl").write_text(
            json.dumps({"step": 1, "compute/flops": 2.5e12, "time/hours": hours}) + "\n"
        )
    experiment = read_experiment(tmp_path / "x.yaml")
    text = whole_table(experiment, experiment.scales["laptop"], {})
    assert "P, Table 1: T" in text
    assert "read in the authors' picture of it" in text
    # 61 % with a deviation of sqrt(2) points; half of 6 + 18 minutes.
    assert "| ours | 81.6 % | 61.0 ± 1.4 | 2.5 | 12.0 | 2 |" in text
    assert "not yet" not in text
    assert text.endswith("small.")


@pytest.fixture
def tiny_table(tmp_path):
    """A pretraining and a run from it, seconds each."""
    photos = write_classes(tmp_path / "photos", train=8, test=3)
    pretraining = ["'" + word + "'" for word in (*TINY, "epochs=1", f"data.root={photos}") if "seed" not in word]
    tuning = [
        "'" + word + "'" for word in (*COMMON, *TINY_FINETUNE, "epochs=1", f"data={photos}") if "seed" not in word
    ]
    (tmp_path / "pretrain.yaml").write_text("task: pretrain\n")
    (tmp_path / "finetune.yaml").write_text("task: finetune\n")
    cells = {
        "first": {
            "title": "first",
            "command": f"pretrain.py --config {tmp_path}/pretrain.yaml {' '.join(pretraining)}",
        },
        "second": {
            "title": "second",
            "command": f"finetune.py --config {tmp_path}/finetune.yaml checkpoint={{first}} {' '.join(tuning)}",
        },
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({"runs": str(tmp_path / "runs"), "cells": cells}))
    return path


def test_continues_cell_by_cell_after_a_kill(tiny_table, capsys):
    runs = tiny_table.parent / "runs"
    line = [sys.executable, "-m", "mae_et", "reproduce", str(tiny_table)]
    started = subprocess.Popen(line, cwd=REPOSITORY, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not (runs / "first" / MARKER).exists() and time.monotonic() < deadline and started.poll() is None:
            time.sleep(0.05)
    finally:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    marker = (runs / "first" / MARKER).read_text()
    assert not (runs / "second" / MARKER).exists()

    assert main(["reproduce", str(tiny_table)]) == 0
    out = capsys.readouterr().out
    assert out.index("equivalent epochs") < out.index("second, seed 0")
    assert "first, seed" not in out
    assert (runs / "first" / MARKER).read_text() == marker
    (row,) = re.findall(r"\| second \| [\d.]+ \|.*\| 1 \|", out)
    assert row in (runs / "tiny.md").read_text()

    assert main(["reproduce", str(tiny_table)]) == 0
    out = capsys.readouterr().out
    assert "seed" not in out.replace("seeds", "")
    assert row in out

    # What was made by another command is not passed off as this one's.
    tiny_table.write_text(tiny_table.read_text().replace("checkpoint=", "optim.clip=1 checkpoint="))
    assert main(["reproduce", str(tiny_table)]) == 2
    assert "another command" in capsys.readouterr().err
