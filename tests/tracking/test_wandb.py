"""The W&B mirror: the same numbers as metrics.jsonl, on axes of cost, and no failure of it reaches the run.

The real library runs here, offline or against a server on loopback, with all its files in the test's folder.
"""

from __future__ import annotations

import io
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mae_et.tracking import JsonlTracker, MultiTracker, WandbTracker, read_metrics
from mae_et.tracking.wandb import AXES, RUN_ID_FILE

pytest.importorskip("wandb")


def row(step: int) -> dict:
    return {
        "step": step,
        "compute/fraction": step / 70,
        "compute/flops": 1.2e15 * step,
        "time/hours": step / 3600,
        "images_seen": 256 * step,
        "train/loss": math.nan if step == 20 else 1 / (step + 2),
        "train/lr": 1.4e-3,
        "stage/index": step // 20,
    }


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(
        left[name] == right[name] or (math.isnan(left[name]) and math.isnan(right[name])) for name in left
    )


def offline_logs(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*/*.wandb"))


def wandb_core_of(process: int) -> int:
    """The id of W&B's helper process, a child of the process that logs."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (entry / "stat").exists():
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == process and b"wandb-core" in (entry / "cmdline").read_bytes():
                return int(entry.name)
    raise AssertionError("wandb-core is not running")


def test_an_unknown_mode_is_named_with_its_key(tmp_path):
    with pytest.raises(ValueError, match=r"tracking\.wandb='onlin' .* online, offline, disabled"):
        WandbTracker("onlin", tmp_path)
    assert not list(tmp_path.iterdir())


def test_disabled_imports_and_writes_nothing(tmp_path, repository):
    program = (
        "import sys; from mae_et.tracking import WandbTracker; t = WandbTracker('disabled', sys.argv[1]); "
        "t.log({'a': 1}, 1); t.images({}, 1); t.finish(0); assert t.run_id is None; "
        "assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "run")], cwd=repository, check=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [("online", "disabled", "disabled"), ("offline", "disabled", "disabled"), ("disabled", "online", "disabled")],
)
def test_an_environment_that_shares_less_wins(mode, environment, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", environment)
    assert WandbTracker(mode, tmp_path).mode == expected


def test_offline_log_has_the_numbers_of_the_metrics_file(tmp_path, wandb_home, picture, read_wandb):
    records_of, history_of = read_wandb
    folder = tmp_path / "run"
    folder.mkdir()
    mirror = WandbTracker("offline", folder, name="a", group="g", job_type="pretrain", tags=["t"], config={"seed": 3})
    trackers = MultiTracker([JsonlTracker(folder / "metrics.jsonl"), mirror])
    for step in (10, 20, 30):
        trackers.log(row(step), step)
    trackers.images({"pictures/panel": picture}, 30)
    trackers.log({"compute/fraction": 0.5, "eval/knn": 0.61}, 35)
    trackers.finish(0)

    (log,) = offline_logs(folder)
    records = records_of(log)
    history = history_of(records)
    metrics = [entry for entry in read_metrics(folder / "metrics.jsonl") if "pictures" not in entry]
    numbers = [entry for entry in history if "pictures/panel" not in entry]
    assert len(numbers) == len(metrics) == 4
    assert all(same(left, right) for left, right in zip(numbers, metrics, strict=True))
    (shown,) = [entry for entry in history if "pictures/panel" in entry]
    assert shown["step"] == 30
    assert {name: shown[name] for name in AXES} == {name: row(30)[name] for name in AXES}
    assert shown["pictures/panel"]["_type"] == "image-file"
    assert (log.parent / "files" / shown["pictures/panel"]["path"]).read_bytes() == picture.read_bytes()

    defined = [record.metric for record in records if record.WhichOneof("record_type") == "metric"]
    assert {metric.name for metric in defined if metric.options.hidden} == {"step", *AXES}
    assert [(metric.glob_name, metric.step_metric) for metric in defined if metric.glob_name] == [
        ("*", "compute/fraction")
    ]
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"][:1]
    assert (run.run_id, run.project, run.display_name) == (mirror.run_id, "mae_et", "a")
    assert (run.run_group, run.job_type, list(run.tags)) == ("g", "pretrain", ["t"])
    assert json.loads({item.key: item.value_json for item in run.config.update}["seed"]) == 3
    (end,) = [record.exit for record in records if record.WhichOneof("record_type") == "exit"]
    assert end.exit_code == 0


def test_a_resumed_run_keeps_its_id_and_an_explicit_one_wins(tmp_path, wandb_home, read_wandb):
    records_of, _ = read_wandb
    ids = []
    for run_id in (None, None, "parent01"):
        tracker = WandbTracker("offline", tmp_path, run_id=run_id)
        tracker.finish(0)
        ids.append(tracker.run_id)
    assert ids[0] == ids[1]
    assert ids[2] == "parent01"
    assert (tmp_path / RUN_ID_FILE).read_text() == "parent01\n"
    logged = [
        record.run.run_id
        for log in offline_logs(tmp_path)
        for record in records_of(log)
        if record.WhichOneof("record_type") == "run"
    ]
    assert sorted(set(logged)) == sorted(set(ids))


def test_wandb_dir_is_respected(tmp_path, wandb_home, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    tracker = WandbTracker("offline", tmp_path / "run")
    tracker.finish(0)
    assert len(offline_logs(tmp_path / "elsewhere")) == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == [RUN_ID_FILE]


def test_online_resume_continues_the_same_run(tmp_path, wandb_server, picture):
    for steps in ((10, 20, 30), (40, 50)):
        tracker = WandbTracker("online", tmp_path, config={"steps": len(steps)})
        assert tracker.mode == "online"
        for step in steps:
            tracker.log(row(step), step)
        tracker.images({"pictures/panel": picture}, steps[-1])
        tracker.finish(0)
    assert list(wandb_server.runs) == [tracker.run_id]
    sent = wandb_server.runs[tracker.run_id]["rows"]
    assert [entry["_step"] for entry in sent] == list(range(7))
    plain = [{name: value for name, value in entry.items() if name[0] != "_"} for entry in sent]
    assert all(same(left, row(step)) for left, step in zip(plain[:3] + plain[4:6], (10, 20, 30, 40, 50), strict=True))
    uploaded = [name for name in wandb_server.uploads if name.startswith("media/images/pictures/panel")]
    assert len(uploaded) == 2
    definitions = json.loads(wandb_server.runs[tracker.run_id]["upserts"][-1]["config"])["_wandb"]["value"]["m"]
    # W&B's own encoding of metric definitions: "1" is a name, "2" a glob, "5" the (1-based) index of its x-axis.
    names = [definition.get("1") for definition in definitions]
    (everything,) = [definition for definition in definitions if definition.get("2") == "*"]
    assert names[everything["5"] - 1] == "compute/fraction"


def test_the_sync_command_joins_the_segments_of_a_resumed_run(tmp_path, wandb_server):
    import wandb

    for steps in ((10, 20, 30), (40, 50)):
        tracker = WandbTracker("offline", tmp_path)
        for step in steps:
            tracker.log(row(step), step)
        tracker.finish(0)
        wandb.teardown()
        if steps[0] == 10:  # segments are told apart, and ordered, by the second of their start
            time.sleep(1)
    command = f"{sys.executable} -m wandb sync {tmp_path}/wandb/offline-run-*-{tracker.run_id}"
    # It writes its own logs to the working directory.
    subprocess.run(command, shell=True, check=True, timeout=60, cwd=tmp_path)
    sent = wandb_server.runs[tracker.run_id]["rows"]
    assert [(entry["_step"], entry["step"]) for entry in sent] == [(0, 10), (1, 20), (2, 30), (3, 40), (4, 50)]


def test_no_key_falls_back_to_offline_visibly(tmp_path, wandb_home, capfd, monkeypatch, read_wandb):
    records_of, history_of = read_wandb
    # Not a terminal: nobody can be asked for a key.
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    tracker = WandbTracker("online", tmp_path)
    assert tracker.mode == "offline"
    tracker.log(row(10), 10)
    tracker.finish(0)
    warning = capfd.readouterr().err
    assert warning.count("W&B logs this run offline") == 1
    assert f"wandb sync {tmp_path}/wandb/offline-run-*-{tracker.run_id}" in warning
    assert "metrics.jsonl" in warning
    (log,) = offline_logs(tmp_path)
    assert log.parent.match(f"offline-run-*-{tracker.run_id}")
    assert len(history_of(records_of(log))) == 1


def test_an_unreachable_server_falls_back_within_the_timeout(tmp_path, wandb_home, capfd, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    begin = time.monotonic()
    tracker = WandbTracker("online", tmp_path, init_timeout=2)
    # Before init_timeout begins, wandb 0.31 asks the server twice for the key's user, for 5 s each.
    assert time.monotonic() - begin < 2 + 10 + 8
    assert tracker.mode == "offline"
    tracker.log(row(10), 10)
    tracker.finish(0)
    assert len(offline_logs(tmp_path)) == 1
    assert "W&B logs this run offline (CommError" in capfd.readouterr().err


TRAINING = """
import sys, time
from pathlib import Path
from mae_et.tracking import WandbTracker
tracker = WandbTracker("offline", sys.argv[1])
tracker.log({"train/loss": 1.0}, 1)
print("ready", flush=True)
sys.stdin.readline()
for step in range(2, 100):
    tracker.log({"train/loss": 1 / step}, step)
    time.sleep(0.01)
tracker.images({"panel": Path("missing.png")}, step)
tracker.finish(0)
print("trained", flush=True)
"""


def test_a_dead_helper_process_is_reported_once_and_the_run_goes_on(tmp_path, wandb_home, repository):
    training = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(tmp_path)],
        cwd=repository,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert training.stdout is not None
    assert training.stdout.readline() == "ready\n"
    os.kill(wandb_core_of(training.pid), signal.SIGKILL)
    output, warnings = training.communicate("\n", timeout=30)
    assert output == "trained\n"
    assert training.returncode == 0
    assert warnings.count("W&B failed to log (ConnectionResetError") == warnings.count("warning:") == 1
    assert "Nothing is lost: metrics.jsonl has every row" in warnings


def test_a_server_that_dies_does_not_hold_the_end_of_a_run(tmp_path, wandb_server):
    tracker = WandbTracker("online", tmp_path, finish_timeout=1)
    assert tracker.mode == "online"
    tracker.log(row(10), 10)
    wandb_server.close()
    tracker.log(row(20), 20)
    begin = time.monotonic()
    tracker.finish(0)
    # Without the limit, finish() of wandb 0.31 was still waiting after 90 s.
    assert time.monotonic() - begin < 1 + 8


@pytest.mark.parametrize("call", ["log", "images", "finish"])
def test_an_error_of_any_call_is_reported_once(call, tmp_path, wandb_home, capfd, monkeypatch, picture):
    import wandb

    def fail(*arguments, **options):
        raise ConnectionResetError("gone")

    tracker = WandbTracker("offline", tmp_path)
    owner, name = {"images": (wandb, "Image")}.get(call, (wandb.Run, call))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        for step in (10, 20):
            tracker.log(row(step), step)
            tracker.images({"pictures/panel": picture}, step)
        tracker.finish(0)
    assert capfd.readouterr().err.count("W&B failed to") == 1


def test_an_unwritable_folder_switches_the_mirror_off(tmp_path, wandb_home, capfd, monkeypatch):
    # A file where the folder should be: unlike a permission, that holds for root, too.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "file" / "wandb"))
    tracker = WandbTracker("offline", tmp_path / "run")
    tracker.log(row(10), 10)
    tracker.finish(0)
    assert capfd.readouterr().err.count("W&B failed to start") == 1
