"""What W&B gets beside rows: alerts on faults, the last checkpoint if it is wanted, and nothing in the user's home."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from mae_et.tracking import WandbTracker
from mae_et.tracking import wandb as mirror

wandb = pytest.importorskip("wandb")


def end(tracker: WandbTracker, error: Exception | None, exit_code: int) -> None:
    """Close a tracker as a run does: in the `finally` of what ends it."""
    try:
        if error is not None:
            raise error
    except Exception:
        tracker.finish(exit_code)
    else:
        tracker.finish(exit_code)


def alerts(server, tracker: WandbTracker) -> list[tuple[str, str, str]]:
    return [(alert["title"], alert["text"], alert["severity"]) for alert in server.runs[tracker.run_id]["alerts"]]


def test_an_error_that_ends_a_run_is_told_to_people(tmp_path, wandb_server):
    told, silent, stopped = (tmp_path / name for name in ("told", "silent", "stopped"))
    error = ValueError("not finite for 10 steps in a row")
    tracker = WandbTracker("online", told)
    tracker.alert("x" * 100, "W&B takes titles of 63 characters")
    end(tracker, error, 1)
    assert alerts(wandb_server, tracker) == [
        ("x" * 63, "W&B takes titles of 63 characters", "ERROR"),
        ("Run failed: ValueError", "not finite for 10 steps in a row", "ERROR"),
    ]
    tracker = WandbTracker("online", silent, alerts=False)
    end(tracker, error, 1)
    assert alerts(wandb_server, tracker) == []
    tracker = WandbTracker("online", stopped)
    end(tracker, None, 128 + 15)  # a signal that was obeyed is no fault
    assert alerts(wandb_server, tracker) == []


@pytest.mark.parametrize("told", [True, False])
def test_a_disk_that_fills_up_is_told_to_people(told, tmp_path, wandb_server, capfd, monkeypatch):
    usage = namedtuple("usage", "total used free")
    answers = iter([2**30, 2**30])
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(2**31, 2**30, next(answers, 4096)))
    tracker = WandbTracker("online", tmp_path, alerts=told)
    for step in (1, 2, 3):
        tracker.log({"train/loss": 1.0}, step)
    tracker.finish(0)
    assert [title for title, _, _ in alerts(wandb_server, tracker)] == ["Disk full"] * told
    assert capfd.readouterr().err.count("MiB are left on the disk of") == 1


def test_an_alert_that_fails_leaves_the_run_its_end(tmp_path, wandb_home, capfd, monkeypatch, read_wandb):
    records_of, _ = read_wandb
    tracker = WandbTracker("offline", tmp_path)
    called = []

    def fail(*_arguments, **_options):
        called.append(True)
        raise ConnectionResetError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(wandb.Run, "alert", fail)
        end(tracker, ValueError("of the run"), 1)
    assert called
    assert "warning:" not in capfd.readouterr().err
    (log,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert [record.exit.exit_code for record in records_of(log) if record.HasField("exit")] == [1]


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Two checkpoints, and what a killed save leaves."""
    folder = tmp_path / "checkpoints"
    for step in (90, 100):
        path = folder / f"step-{step:08d}"
        path.mkdir(parents=True)
        (path / "model.safetensors").write_bytes(os.urandom(200_000 + step))
        (path / "manifest.json").write_text(json.dumps({"files": {"model.safetensors": {"sha256": f"hash{step}"}}}))
    (folder / "step-00000110.tmp-123").mkdir()
    return folder


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_last_checkpoint_becomes_an_artifact_and_no_copy(tmp_path, wandb_server, checkpoints, monkeypatch):
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.delenv(name)
    run = tmp_path / "run"
    config = {"task": "finetune", "parent_run_id": "parent01", "parent_checkpoint_sha256": "hash0", "other": 1}
    tracker = WandbTracker("online", run, config=config, checkpoints=checkpoints)
    assert os.environ["WANDB_DATA_DIR"] == str(run / "wandb" / "data")
    tracker.log({"train/loss": 1.0}, 100)
    tracker.finish(0)
    ((name, artifact),) = wandb_server.artifacts.items()
    assert name == f"checkpoint-{tracker.run_id}"
    assert (artifact["artifactTypeName"], artifact["committed"]) == ("model", True)
    assert json.loads(artifact["metadata"]) == {
        **{"step": 100, "run_id": tracker.run_id, "sha256": {"model.safetensors": "hash100"}, "task": "finetune"},
        **{"parent_run_id": "parent01", "parent_checkpoint_sha256": "hash0"},
    }
    sent = [upload for upload in wandb_server.uploads if upload.startswith("artifact/")]
    assert sorted(sent) == ["artifact/manifest.json", "artifact/model.safetensors"]
    assert max(path.stat().st_size for path in files_below(run)) < 100_000
    # All that W&B wrote of its own lies in the run's folder, and the environment is as it was.
    assert any(path.is_relative_to(run / "wandb" / "cache") for path in files_below(run))
    assert not [path for path in files_below(tmp_path / "home") if "wandb" in str(path.relative_to(tmp_path))]
    assert not {"WANDB_DATA_DIR", "WANDB_CACHE_DIR"} & set(os.environ)


@pytest.mark.parametrize(("exit_code", "expected"), [(0, 1), (1, 0), (143, 0)])
def test_offline_artifacts_are_of_runs_that_ended_as_planned(
    exit_code, expected, tmp_path, wandb_home, checkpoints, read_wandb
):
    records_of, _ = read_wandb
    tracker = WandbTracker("offline", tmp_path / "run", checkpoints=checkpoints)
    tracker.finish(exit_code)
    (log,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    found = [record.artifact for record in records_of(log) if record.WhichOneof("record_type") == "artifact"]
    assert len(found) == expected
    for artifact in found:
        local = {entry.path: entry.local_path for entry in artifact.manifest.contents}
        newest = checkpoints / "step-00000100"
        assert local == {path.name: str(path) for path in newest.iterdir()}


def test_a_checkpoint_that_is_no_artifact_does_not_keep_the_run_open(tmp_path, wandb_server, checkpoints, capfd):
    (checkpoints / "step-00000100" / "manifest.json").write_text("{}")
    tracker = WandbTracker("online", tmp_path / "run", project="photos", entity="me", checkpoints=checkpoints)
    tracker.log({"train/loss": 1.0}, 100)
    tracker.finish(0)
    said = capfd.readouterr().err
    assert said.count("W&B did not take the last checkpoint (KeyError: 'files'). To send it:") == 1
    put = f"wandb artifact put --type model --name me/photos/checkpoint-{tracker.run_id}"
    assert said.count(f"{put} {checkpoints}/step-00000100\n") == 1
    assert not wandb_server.artifacts
    assert len(wandb_server.runs[tracker.run_id]["rows"]) == 1


def test_a_silent_server_takes_no_checkpoint_and_the_run_has_its_end(
    tmp_path, wandb_server, checkpoints, capfd, monkeypatch, read_wandb
):
    monkeypatch.setattr(mirror, "CHECKPOINT_SECONDS", 0.5)
    monkeypatch.setattr(mirror, "FINISH_GRACE", 2.0)
    tracker = WandbTracker("online", tmp_path / "run", checkpoints=checkpoints, finish_timeout=0.5)
    wandb_server.delay = 30
    begin = time.perf_counter()
    tracker.finish(0)
    # 0.5 s for the checkpoint, 0.5 s for the end, three times 2 s of grace, and what a busy machine adds.
    assert time.perf_counter() - begin < 7 + 2
    wandb_server.delay = 0
    said = capfd.readouterr().err
    assert said.count("is off for the rest of this run") == 0
    assert said.count("wandb sync --no-skip-online") == 1
    assert f"/checkpoint-{tracker.run_id} {checkpoints}/step-00000100\n" in said
    (log,) = (tmp_path / "run" / "wandb").glob("run-*/*.wandb")
    kinds = [record.WhichOneof("record_type") for record in read_wandb[0](log)]
    assert kinds[-1] == "exit"
    assert "artifact" not in kinds  # why the command for it is of its own


def test_a_wandb_that_polls_otherwise_is_closed_all_the_same(tmp_path):
    closed = []
    library = SimpleNamespace(teardown=lambda: closed.append(True))
    tracker = WandbTracker("disabled", tmp_path)
    tracker._run = SimpleNamespace(_run_status_checker=object())  # as of a version whose checkers have no `stop`
    tracker._wandb = library  # pyright: ignore[reportAttributeAccessIssue]
    tracker._close()
    assert closed
