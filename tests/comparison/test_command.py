"""`python -m mae_et compare` on runs that were made: pretraining, fine-tuning from it, and neighbours."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from mae_et.__main__ import main
from mae_et.comparison.comparing import compare_runs
from mae_et.comparison.table import curve_rows, flops_text, group_rows, number_text, time_text
from tests.comparison.made import make_run, plan_in
from tests.end_to_end.labelled import finetune_here, probe_here, write_classes
from tests.end_to_end.tiny import run_here

SCORED = ("evaluation.every=1", "evaluation.crop_fraction=1.0", "evaluation.knn=[3]", "epochs=1.5")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A pretraining run with pictures, and one that began with it, fine-tuned, and one that looked for neighbours."""
    images, root = write_classes(tmp_path_factory.mktemp("classes"), train=8), tmp_path_factory.mktemp("runs")
    run_here(
        images, root / "first", "tracking.pictures=true", "tracking.picture_samples=1", "data.split=train", *SCORED
    )
    finetune_here(images, root / "tuned", f"checkpoint={root}/first", "epochs=1")
    probe_here(images, root / "near", f"checkpoint={root}/first", "neighbours.k=[3]", "model.pooling=mean", knn=True)
    return root


def test_runs_that_were_made(runs):
    run = compare_runs([runs / "first"]).runs[0]
    plan = plan_in(runs / "first")
    assert run.scores.keys() == {"-train/loss", "eval/probe", "eval/knn3"}
    assert run.scores["eval/probe"][-1].cost == run.total == run.stages[-1].end
    assert run.spent["compute"] == plan.total_flops
    assert [stage.label for stage in run.stages] == [str(stage.bandwidth[0]) for stage in plan.stages]
    assert list(run.pictures) == [f"stage {i + 1}, B={span.label}" for i, span in enumerate(run.stages)]


def test_what_began_with_another_run(runs, capsys):
    assert main(["compare", str(runs / "tuned"), "--with-pretraining", "--axis", "images"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("val/top1 by images\n")
    assert "note: Costs are those of a run and of all that made the network it began with." in shown
    plans = [plan_in(runs / name) for name in ("first", "tuned")]
    tuned = compare_runs([runs / "tuned"], with_pretraining=True).runs[0]
    assert tuned.spent["compute"] == pytest.approx(sum(plan.total_flops or 0 for plan in plans), rel=1e-12)
    near = compare_runs([runs / "near"], "images", with_pretraining=True).runs[0]
    assert (near.task, list(near.scores)) == ("knn", ["knn/top1_k3"])
    assert near.scores["knn/top1_k3"][0].cost == near.total == plans[0].total_images
    assert near.parent == (runs / "first" / "run_id.txt").read_text().strip()
    probe_again = compare_runs([runs / "near"])
    assert probe_again.runs[0].total == 0
    assert any("--with-pretraining" in note for note in probe_again.notes)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("pair")
    made = [make_run(root / f"base-s{seed}", {20: 0.5, 40: 0.8 - seed / 10}, f"seed={seed}") for seed in (0, 1)]
    made += [make_run(root / "half", {10: 0.6, 20: 0.5}, "target.kind=pixel", until=20, state="failed")]
    return [str(path) for path in made]


def test_terminal(pair, capsys):
    assert main(["compare", *pair, "--axis", "images", "--reach", "0.6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "eval/probe by images"
    table = [line.split("  ") for line in lines[2:6]]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in (table[0], table[2], table[3])]
    assert cells[0][-2:] == ["images to 60.00 %", "speed-up"]
    # 0.6 lies at steps 20 + 20/3 and 30, of 8 images; their geometric mean.
    assert cells[1][:4] == ["base", "2", "75.00 ± 7.07 %", "75.00 ± 7.07 %"]
    assert cells[1][-2:] == [f"{8 * (80 / 3 * 30) ** 0.5:.3g}", "baseline"]
    assert cells[2][:5] == ["half (unfinished)", "1", "50.00 %", "60.00 %", "80"]
    assert cells[2][-2:] == ["80", "2.83x"]
    assert any(line.split() == ["target.kind", "hog", "pixel"] for line in lines)
    assert "note: half is failed at 50% of its plan, and compared as far as it is." in lines


def test_csv(pair, tmp_path, capsys):
    assert main(["compare", *pair, "--axis", "images", "--csv", str(tmp_path / "new" / "t.csv")]) == 0
    assert f"curves: {tmp_path / 'new' / 't-curves.csv'}" in capsys.readouterr().out
    with (tmp_path / "new" / "t.csv").open() as file:
        base, half = csv.DictReader(file)
    assert (base["group"], base["runs"], base["final"], base["reach"]) == ("base", "base-s0 base-s1", "0.75", "0.7")
    assert (half["complete"], half["final_sd"], half["best"], half["best_at_images"]) == ("False", "", "0.6", "80")
    assert (half["cost_to_reach_images"], half["reached_by"], half["speedup"]) == ("", "0", "")
    with (tmp_path / "new" / "t-curves.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "eval/probe"]
    assert [(row["run"], row["seed"], row["images"], row["value"]) for row in rows[:3]] == [
        ("base-s0", "0", "160", "0.5"),
        ("base-s0", "0", "320", "0.8"),
        ("base-s1", "1", "160", "0.5"),
    ]


def test_rows_of_what_some_seeds_reach(pair):
    comparison = compare_runs(pair, "images", reach=0.75)
    base = group_rows(comparison)[0]
    assert base.reached.costs == (pytest.approx(8 * (20 + 20 * 25 / 30)), None)
    assert (base.cost, base.reached.speedup.seeds) == (pytest.approx(base.reached.costs[0]), (1, 1))
    assert {row[3] for row in curve_rows(comparison)} > {"-train/loss", "train/loss", "eval/probe", "compute/fraction"}


def test_errors_are_for_people(pair, capsys):
    assert main(["compare", pair[0], "nowhere"]) == 2
    assert capsys.readouterr().err == "error: nowhere holds no run: there is no nowhere/config.yaml\n"
    with pytest.raises(SystemExit):
        main(["compare", pair[0], "--axis", "dollars"])
    assert "invalid choice: 'dollars'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (flops_text, 0.0, "0 FLOPs"),
        (flops_text, 2.5e13, "25 TFLOPs"),
        (time_text, 30.0, "30 h"),
        (time_text, 0.25, "15 min"),
        (time_text, 0.001, "3.6 s"),
        (number_text, 12345.6, "12,346"),
        (number_text, 0.012345, "0.0123"),
    ],
)
def test_numbers_for_people(function, value, text):
    assert function(value) == text


def test_comparing_needs_no_torch():
    code = "import sys, mae_et.comparison.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
