"""The same bits: whatever the workers, however often a run is interrupted, and even when it is killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from mae_et.config import load_config
from mae_et.pretraining import pretrain
from tests.end_to_end.launched import command, start, start_ranks, wait_for_rows
from tests.end_to_end.tiny import arguments, history, run_here, weights
from tests.engine.ranks import fork_server


@pytest.fixture(scope="module")
def uninterrupted(photos, tmp_path_factory) -> Path:
    """A whole run that keeps a checkpoint of every step."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    return run_here(photos, run, "saving.steps=1", "saving.keep=1000")


def test_the_run_is_long_enough_to_mean_something(uninterrupted):
    rows = history(uninterrupted)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= 20
    assert {row["stage/bandwidth"] for row in rows} == {6, 12, 16}
    assert rows[-1]["images_seen"] > 2 * 40
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores, on purpose
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_change_nothing(photos, uninterrupted, tmp_path, workers):
    run = run_here(photos, tmp_path / "run", f"data.workers={workers}")
    assert history(run) == history(uninterrupted)
    assert weights(run) == weights(uninterrupted)


def test_the_seed_changes_everything(photos, uninterrupted, tmp_path):
    run = run_here(photos, tmp_path / "run", "seed=4")
    assert all(a["train/loss"] != b["train/loss"] for a, b in zip(history(run), history(uninterrupted)))


def interrupted_at(step: int, whole: Path, run: Path) -> Path:
    """A run folder as a run that ended right after saving `step` leaves it, with rows of lost steps behind."""
    run.mkdir()
    for name in ("config.yaml", "plan.json", "metrics.jsonl"):
        shutil.copy(whole / name, run)
    shutil.copytree(whole / "checkpoints" / f"step-{step:08}", run / "checkpoints" / f"step-{step:08}")
    return run


def test_resuming_at_any_step_equals_not_stopping(photos, uninterrupted, tmp_path):
    """Among them the middle of a pass, both stage boundaries, and the steps beside them."""
    total = len(history(uninterrupted))
    for step in range(1, total, 2):
        run = interrupted_at(step, uninterrupted, tmp_path / f"from-{step}")
        run_here(photos, run)
        assert history(run) == history(uninterrupted), f"resumed after step {step}"
        assert weights(run) == weights(uninterrupted), f"resumed after step {step}"


@pytest.mark.parametrize("changes", [("optim.accumulation=2",), ("data.downsample=fourier", "tracking.every=4")])
def test_resuming_under_accumulation_and_between_rows(photos, tmp_path, changes):
    whole = run_here(photos, tmp_path / "whole", "saving.steps=1", "saving.keep=1000", *changes)
    run = interrupted_at(10, whole, tmp_path / "resumed")
    run_here(photos, run, *changes)
    assert (history(run), weights(run)) == (history(whole), weights(whole))


def test_accumulation_averages_the_same_images(photos, uninterrupted, tmp_path):
    run = run_here(photos, tmp_path / "run", "optim.accumulation=4", "engine.precision=fp32")
    whole = run_here(photos, tmp_path / "whole", "engine.precision=fp32")
    losses = [[row["train/loss"] for row in history(path)] for path in (run, whole)]
    # Equal but for the order of fp32 sums, whose differences training amplifies over the steps.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_sigterm_to_all_processes_of_a_job_saves_too(photos, tmp_path):
    lines = command(photos, tmp_path / "run", "epochs=1000", "data.workers=2")
    ranks = start_ranks(1, lines, tmp_path / "logs")
    wait_for_rows(tmp_path / "run", 5, ranks)
    (process,) = ranks.processes
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = [int(pid) for pid in children.read_text().split()] if children.exists() else []
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
    ranks.signal(signal.SIGTERM)
    assert ranks.codes() == [143], ranks.said
    assert "SIGTERM: saved at step" in ranks.said[0]
    # The workers are gone with their run, and not only after their grace.
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_signals_save_and_exit(photos, tmp_path, number, code):
    # Long enough not to end by itself before the signal comes.
    ranks = start_ranks(1, command(photos, tmp_path / "run", "epochs=1000", "data.workers=1"), tmp_path / "logs")
    wait_for_rows(tmp_path / "run", 5, ranks)
    ranks.signal(number)
    assert ranks.codes() == [code], ranks.said
    assert f"{number.name}: saved at step" in ranks.said[0]
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    assert int(newest.name.removeprefix("step-")) == history(tmp_path / "run")[-1]["step"]


def test_a_signalled_run_continues_to_the_same_bits(photos, uninterrupted, tmp_path):
    """Here the process is one as users start it."""
    lines = command(photos, tmp_path / "run")
    job = start([sys.executable, *lines], tmp_path / "log")
    wait_for_rows(tmp_path / "run", 3, job)
    job.process.send_signal(signal.SIGTERM)
    job.gone_after()
    assert job.process.returncode in (143, 0), job.said  # 0: a busy machine let it end before
    ranks = start_ranks(1, lines, tmp_path / "logs")
    assert ranks.codes() == [0], ranks.said
    assert weights(tmp_path / "run") == weights(uninterrupted)


def killable(lines: list[str]) -> None:
    """A run in a process of its own; at module level so that the fork server can import it."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 - lives as long as the process
    pretrain(load_config(None, lines))


def seconds_until(process: BaseProcess, limit: float) -> float:
    """Wait for a process, at most so many seconds, and kill it then; returns how long it ran."""
    started = time.monotonic()
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"the run failed by itself: {process.exitcode}"
    return time.monotonic() - started


def test_kill_minus_nine_at_any_moment(photos, uninterrupted, tmp_path):
    """Five runs, each killed at two random instants: every one ends in the same weights and the same metrics.

    A run saves after every second step, so that many kills fall within a save. The fork server has everything
    imported, so that the time until a kill is spent in the run.
    """
    context = fork_server()
    chance, kills = random.Random(0), 0

    def process(run: Path) -> BaseProcess:
        return context.Process(target=killable, args=(arguments(photos, run, "saving.steps=2"),))

    seconds_until(process(tmp_path / "warm"), 120)
    whole = seconds_until(process(tmp_path / "whole"), 120)
    for trial in range(5):
        run = tmp_path / f"trial-{trial}"
        for _ in range(2):
            attempt = process(run)
            seconds_until(attempt, chance.uniform(0, 0.9 * whole))
            kills += attempt.exitcode != 0
        last = process(run)
        seconds_until(last, 120)
        assert last.exitcode == 0, f"trial {trial} did not complete"
        assert weights(run) == weights(uninterrupted), f"trial {trial}"
        assert history(run) == history(uninterrupted), f"trial {trial}"
    assert kills >= 5  # `make torture` has hundreds


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # wandb's own
def test_wandb_changes_nothing_and_a_resumed_run_is_the_same_run(photos, uninterrupted, tmp_path, monkeypatch):
    for name in ("HOME", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    run = interrupted_at(9, uninterrupted, tmp_path / "run")
    run_here(photos, run, "tracking.wandb=offline", "saving.steps=1", "saving.keep=1000")
    first = (run / "run_id.txt").read_text().strip()
    again = interrupted_at(15, run, tmp_path / "again")
    shutil.copy(run / "run_id.txt", again)
    run_here(photos, again, "tracking.wandb=offline")
    assert history(run) == history(again) == history(uninterrupted)
    assert weights(run) == weights(again) == weights(uninterrupted)
    for folder in (run, again):
        (logged,) = (folder / "wandb").glob(f"offline-run-*-{first}")
        assert (logged / f"run-{first}.wandb").stat().st_size > 1000
