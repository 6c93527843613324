"""Every run after pretraining tells W&B what it began with: read from what W&B itself wrote."""

from __future__ import annotations

import json

import pytest

from mae_et.engine.checkpoint import latest_checkpoint
from tests.end_to_end.labelled import finetune_here, probe_here, write_classes
from tests.end_to_end.tiny import run_here


@pytest.fixture
def pretrained(tmp_path):
    images = write_classes(tmp_path / "images", train=15)
    return images, run_here(images / "train", tmp_path / "pretrained", "epochs=1")


def wandb_run(run, read_wandb):
    """(job type, configuration, rows) of the one W&B run in a folder."""
    records, rows = read_wandb
    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    found = records(file)
    (first, *_) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in first.config.update}
    return first, config, rows(found)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # wandb's own
@pytest.mark.parametrize("job", ["finetune", "probe", "probe-mae", "knn"])
def test_lineage_reaches_wandb(pretrained, tmp_path, wandb_home, read_wandb, job):
    images, parent = pretrained
    run = tmp_path / "run"
    changes = [f"checkpoint={parent}", "tracking.wandb=offline", "tracking.group=colours"]
    if job == "finetune":
        finetune_here(images, run, *changes, "epochs=0.6")
    elif job == "probe-mae":
        probe_here(images, run, *changes, "epochs=1", "optim.batch=8")
    else:
        probe_here(images, run, *changes, "protocol=logistic", "neighbours.k=[3]", knn=job == "knn")
    first, config, rows = wandb_run(run, read_wandb)
    checkpoint = latest_checkpoint(parent / "checkpoints")
    assert checkpoint is not None
    manifest = json.loads((checkpoint.path / "manifest.json").read_text())
    assert first.job_type == job.partition("-")[0]
    assert first.run_group == "colours"
    assert first.run_id == (run / "run_id.txt").read_text().strip()
    assert config["parent_run_id"] == (parent / "run_id.txt").read_text().strip() != first.run_id
    assert config["parent_checkpoint_sha256"] == manifest["files"]["model.safetensors"]["sha256"]
    assert config["parent"]["config"]["model"]["width"] == 16
    scores = {"finetune": "test/top1", "probe": "probe/top1", "probe-mae": "test/top1", "knn": "knn/top1_k3"}
    assert any(scores[job] in row for row in rows)
