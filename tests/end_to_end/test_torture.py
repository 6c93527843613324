"""The short form of `make torture`: a few seeds of each fault; and that the harness notices what it is there for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.torture.catalogue import KINDS, counts, described, find_trials, kind_of, table
from tests.torture.runner import read_log, summary
from tests.torture.table import BEGIN, END, filled

REPOSITORY = Path(__file__).resolve().parents[2]
SHORT = counts(list(find_trials()), short=True)


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> list[dict]:
    """Rows of all short trials, held by one process that has forked no thread."""
    folder = tmp_path_factory.mktemp("torture")
    line = [sys.executable, "-m", "tests.torture", "--short", "--log", str(folder / "log"), "--folder", str(folder)]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=900)
    assert (folder / "log").exists(), done.stderr
    return read_log(folder / "log")


@pytest.mark.parametrize("kind", SHORT)
def test_the_short_form(log, kind):
    rows = [row for row in log if row["kind"] == kind]
    assert len(rows) == SHORT[kind]
    failed = [row["message"] for row in rows if row["outcome"] == "FAILED"]
    assert not failed, "\n".join(failed)
    if all(row["outcome"] == "skipped" for row in rows):
        pytest.skip(rows[0]["message"])


TRIALS = """
import os, subprocess, sys, time
from pathlib import Path
from tests.torture.runner import run_trials, summary
from tests.torture.runs import Skipped

def passes(folder, seed):
    (folder / "file").write_text("x")

def fails(folder, seed):
    assert seed == 0, f"seed {seed} is not 0"

def raises(folder, seed):
    raise KeyError("gone")

def skips(folder, seed):
    raise Skipped("no such disk")

def crashes(folder, seed):
    os.kill(os.getpid(), 11)

def forks(folder, seed):
    if os.fork() == 0:
        time.sleep(60)

def in_a_session_of_its_own(folder, seed):
    subprocess.Popen(["sleep", "60"], start_new_session=True)

import tests.torture.runner as runner
runner.GRACE = 0.3
names = ("passes", "fails", "raises", "skips", "crashes", "forks", "in_a_session_of_its_own")
rows = run_trials({name: globals()[name] for name in names}, dict.fromkeys(names, 2), Path(sys.argv[1]),
                  Path(sys.argv[2]), 2, print)
"""


def hold(tmp_path: Path) -> list[dict]:
    line = [sys.executable, "-c", TRIALS, str(tmp_path / "log"), str(tmp_path / "work")]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return read_log(tmp_path / "log")


def test_the_runner_notices_failures_crashes_and_orphans(tmp_path):
    rows = hold(tmp_path)
    by = {(row["kind"], row["seed"]): row for row in rows}
    outcomes = {key: row["outcome"] for key, row in by.items()}
    assert len(rows) == 14
    assert [outcomes[kind, seed] for kind in ("passes", "fails") for seed in (0, 1)] == ["passed"] * 3 + ["FAILED"]
    assert outcomes["skips", 0] == "skipped"
    assert all(outcomes[kind, 0] == "FAILED" for kind in ("raises", "crashes", "forks", "in_a_session_of_its_own"))
    assert "seed 1 is not 0" in by["fails", 1]["message"]
    assert "KeyError: 'gone'" in by["raises", 0]["message"]
    assert "no such disk" in by["skips", 0]["message"]
    assert "exit code -11" in by["crashes", 0]["message"]
    assert "left running: {" in by["forks", 0]["message"]
    assert "sleep 60" in by["in_a_session_of_its_own", 0]["message"]
    kept = sorted(path.name for path in (tmp_path / "work").iterdir())
    assert "passes-0" not in kept
    assert "fails-1" in kept
    assert "FAILED fails 1: seed 1 is not 0" in summary(rows)
    # What was tried is not tried again; what was lost is.
    lines = (tmp_path / "log").read_text().splitlines(keepends=True)
    (tmp_path / "log").write_text("".join(lines[:-1]) + lines[-1][:20])
    again = hold(tmp_path)
    assert len(again) == 14
    assert again[:-1] == rows[:-1]


def test_every_kind_says_what_it_does_and_what_happens():
    trials = find_trials()
    assert set(KINDS) <= set(trials)
    for name, trial in trials.items():
        assert all(described(name, trial)), f"{name} needs a docstring or a row of the catalogue"


def test_the_long_run_is_as_long_as_promised():
    long = counts(list(find_trials()), short=False)
    kills = sum(number * 3 for kind, number in long.items() if kind_of(kind).each == "3 kills")
    assert kills >= 300
    assert long["kill_in_save"] * 2 >= 50
    assert long["bit_flip"] + long["truncation"] >= 200
    assert long["fuzzed_images"] * 25 >= 200
    assert long["bad_config"] >= 30
    assert long["world_sizes"] * 4 >= 20


def test_the_table_holds_what_the_log_holds():
    rows = [{"kind": "kill", "seed": seed, "seconds": 1.5, "outcome": "passed", "message": ""} for seed in range(40)]
    rows += [
        {"kind": "bit_flip", "seed": s, "seconds": 1, "outcome": o, "message": ""}
        for s, o in ((0, "FAILED"), (1, "passed"))
    ]
    rows += [{"kind": "two_runs", "seed": 0, "seconds": 0, "outcome": "skipped", "message": "skipped: x"}]
    lines = table(rows, find_trials()).splitlines()
    assert lines[2].startswith("| `kill -9` at any moment |")
    assert lines[2].endswith("| 40 × 3 kills | 40 | `python -m tests.torture --kinds kill --trials kill=40` |")
    assert "| 2 | **1** |" in lines[3]
    assert len(lines) == 6
    assert lines[-1].startswith("42 trials, 41 passed, 1 failed, 1 skipped")
    page = f"# Page\n\n{BEGIN}\nold\n{END}\n\nmore\n"
    assert filled(page, "new") == f"# Page\n\n{BEGIN}\n\nnew\n\n{END}\n\nmore\n"
    assert filled(filled(page, "other"), "new") == filled(page, "new")
    with pytest.raises(ValueError, match="has no"):
        filled("# Page\n", "new")
    real = (REPOSITORY / "docs" / "reliability.md").read_text()
    assert filled(real, "new").count("new") >= 1


def test_the_log_is_json_lines(log):
    assert all(json.dumps(row) for row in log)
    assert {tuple(row) for row in log} == {("kind", "seed", "seconds", "outcome", "message")}
