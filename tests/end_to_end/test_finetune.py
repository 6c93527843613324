"""Runs on labels, whole: from a checkpoint and from scratch, what their folders hold, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import torch

from mae_et.config import ConfigError
from mae_et.engine.checkpoint import latest_checkpoint
from mae_et.exchange.weights import WeightsError, open_weights
from tests.end_to_end.labelled import TINY_CONVNET, TINY_VIT, finetune_here, write_classes
from tests.end_to_end.tiny import history, run_here, weights


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def pretrained(photos, tmp_path_factory):
    return run_here(photos, tmp_path_factory.mktemp("pretrained") / "run")


@pytest.fixture(scope="module")
def tuned(images, pretrained, tmp_path_factory):
    run = tmp_path_factory.mktemp("tuned") / "run"
    # RandAugment inverts colours, which are the classes here.
    changes = ["augment.randaugment=false", "model.drop_path=0", "augment.mix_probability=0.5"]
    return finetune_here(images, run, f"checkpoint={pretrained}", "saving.steps=1", "saving.keep=1000", *changes)


def report(run):
    return json.loads((run / "report.json").read_text())


def test_the_folder_holds_all_of_the_run(tuned):
    found = report(tuned)
    assert found["val"]["images"] == 9
    assert found["test"]["images"] == 18
    assert found["test"]["top1"] > 0.9
    with (tuned / "per_class.csv").open() as lines:
        rows = list(csv.reader(lines))
    assert [row[1] for row in rows[1:]] == ["blue", "green", "red"]
    assert (tuned / "pictures" / "confusion.png").stat().st_size > 3000
    assert json.loads((tuned / "classes.json").read_text()) == ["blue", "green", "red"]
    looks = [row for row in history(tuned) if "val/top1" in row]
    assert len(looks) == 5  # at each fifth of the compute, the last one with the examination
    assert looks[-1]["test/top1"] == found["test"]["top1"]
    assert "test/top1" not in looks[0]


def test_the_first_row_says_where_the_weights_are_from(tuned, pretrained):
    row = history(tuned)[0]
    checkpoint = latest_checkpoint(pretrained / "checkpoints")
    assert checkpoint is not None
    manifest = json.loads((checkpoint.path / "manifest.json").read_text())
    assert row["parent/path"] == str(checkpoint.path)
    assert row["parent/checkpoint_sha256"] == manifest["files"]["model.safetensors"]["sha256"]
    assert row["parent/run_id"] == (pretrained / "run_id.txt").read_text().strip()
    assert row["step"] == 0
    assert json.loads(str(row["parent/config"]))["model"]["width"] == 16


def test_it_begins_with_the_checkpoints_weights(images, pretrained, tmp_path):
    """One step at a learning rate of nothing: the encoder is the checkpoint's, norm and head are new."""
    changes = ["optim.lr=1e-30", "optim.min_lr=0", "optim.weight_decay=0", "epochs=0.3"]
    run = finetune_here(images, tmp_path / "run", f"checkpoint={pretrained}", *changes)
    ours, theirs = open_weights(str(run)).tensors, open_weights(str(pretrained)).tensors
    for name, tensor in theirs.items():
        if not name.startswith("norm."):
            assert torch.equal(ours[name], tensor), name
    assert torch.equal(ours["fc_norm.weight"], torch.ones(16))
    assert 0 < ours["head.weight"].std().item() < 3e-5
    assert ours["head.bias"].abs().max() == 0


@pytest.mark.parametrize("model", [TINY_VIT, TINY_CONVNET], ids=["vit", "convnet"])
@pytest.mark.parametrize("method", ["resize", "lanczos", "fourier"])
def test_supervised_training_through_all_stages(images, tmp_path, model, method):
    changes = ["curriculum.preset=efficienttrain_pp", "augment.magnitude=[0,9]", f"data.downsample={method}"]
    if model is TINY_CONVNET:
        changes.append("data.size=32")  # its maps shrink eightfold
    run = finetune_here(images, tmp_path / "run", *model, *changes, "optim.ema=0.5")
    rows = [row for row in history(run) if "train/loss" in row]
    sizes = list(dict.fromkeys(row["stage/bandwidth"] for row in rows))
    assert len(sizes) == 3
    assert sizes == sorted(sizes)
    assert sizes[-1] == (32 if model is TINY_CONVNET else 16)
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


@pytest.mark.parametrize(
    "changes",
    [
        ["curriculum.preset=efficienttrain_pp", "optim.ema=0.9"],
        ["optim.name=lamb", "optim.layer_decay=null"],
        ["optim.name=lars", "optim.accumulation=2"],
        ["optim.name=sgd", "data.repeats=2", "optim.clip=1.0"],
    ],
    ids=["curriculum-ema", "lamb", "lars-accumulation", "sgd-repeats"],
)
def test_a_resumed_run_has_the_same_bits(images, tmp_path, changes):
    """Mixing, drop path, RandAugment and the average continue where they were, also where a stage begins."""
    changes = [*TINY_VIT, "epochs=4", *changes]
    whole = finetune_here(images, tmp_path / "whole", *changes, "saving.steps=1", "saving.keep=1000")
    plan = json.loads((whole / "plan.json").read_text())
    first_stage = plan["stages"][0]["steps"]
    total = sum(stage["steps"] for stage in plan["stages"])
    for step in {1, min(first_stage, total - 1), total - 2}:
        run = tmp_path / f"from-{step}"
        run.mkdir()
        for name in ("config.yaml", "plan.json", "metrics.jsonl", "backbone.json", "run_id.txt"):
            shutil.copy(whole / name, run)
        shutil.copytree(whole / "checkpoints" / f"step-{step:08}", run / "checkpoints" / f"step-{step:08}")
        finetune_here(images, run, *changes, "data.workers=1")
        assert weights(run) == weights(whole)
        assert history(run) == history(whole)
        assert report(run) == report(whole)


def test_a_run_continues_without_its_parent(images, photos, tmp_path):
    parent = run_here(photos, tmp_path / "parent")
    changes = [f"checkpoint={parent}", "saving.steps=1", "saving.keep=1000"]
    whole = finetune_here(images, tmp_path / "whole", *changes)
    run = shutil.copytree(whole, tmp_path / "run")
    for step in range(5, 100):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08}", ignore_errors=True)
    (run / "report.json").unlink()
    shutil.rmtree(parent)
    finetune_here(images, run, *changes)
    assert weights(run) == weights(whole)


def test_evaluation_alone_repeats_the_report(images, tuned, pretrained, tmp_path):
    run = shutil.copytree(tuned, tmp_path / "run")
    changes = ["augment.randaugment=false", "model.drop_path=0", "augment.mix_probability=0.5"]
    rows = (run / "metrics.jsonl").read_bytes()
    (run / "report.json").unlink()
    finetune_here(images, run, f"checkpoint={pretrained}", *changes, only_evaluate=True)
    assert report(run) == report(tuned)
    assert (run / "metrics.jsonl").read_bytes() == rows
    with pytest.raises(ConfigError, match="holds no checkpoint to evaluate"):
        finetune_here(images, tmp_path / "empty", *TINY_VIT, only_evaluate=True)


def test_a_larger_test_size(images, pretrained, tmp_path):
    run = finetune_here(images, tmp_path / "run", f"checkpoint={pretrained}", "evaluation.size=24", "epochs=0.5")
    assert report(run)["size"] == [24, 24]


def test_few_shots_are_the_same_for_every_seed(images, pretrained, tmp_path):
    said: list[str] = []
    changes = [f"checkpoint={pretrained}", "data.shots=4", "epochs=2", "optim.batch=4"]
    run = finetune_here(images, tmp_path / "run", *changes, said=said.append)
    assert "12 train, 9 val, 18 test images of 3 classes" in said[1]
    assert json.loads((run / "plan.json").read_text())["images"] == 12
    with pytest.raises(ConfigError, match="fewer than 40 images of"):
        finetune_here(images, tmp_path / "more", f"checkpoint={pretrained}", "data.shots=40")


def test_what_was_tuned_can_be_tuned_again(images, tuned, tmp_path):
    run = finetune_here(images, tmp_path / "run", f"checkpoint={tuned}", "epochs=0.5")
    ours, theirs = open_weights(str(run)), open_weights(str(tuned))
    assert ours.shape == theirs.shape
    assert (ours.mean, ours.std) == (theirs.mean, theirs.std)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["checkpoint=null"], "model.name is not set, and no checkpoint tells it"),
        (["optim.batch=9"], "optim.batch=9 gives 9 images at a time, and mixup and cutmix mix them in pairs"),
        (["data.repeats=3"], "data.repeats=3 does not divide optim.batch=8"),
        (["data.size=15"], "is not a multiple of the patch of 2 px"),
        (["evaluation.size=15"], "cannot take B=15"),
        (["data.mean=[0.5]"], "must be one number for each of 3 channels"),
        (["data=/nowhere/at/all"], "/nowhere/at/all"),
        (["data.scale=[0.9,0.1]"], "crop scale"),
        (["model.name=timm/resnet5"], "resnet5"),
        (["curriculum.stages=[{end: 1, bandwidth: 9}]"], "9"),
    ],
)
def test_what_cannot_run_says_so_before_it_starts(images, pretrained, tmp_path, change, message):
    with pytest.raises(ConfigError) as caught:
        finetune_here(images, tmp_path / "run", f"checkpoint={pretrained}", *change)
    assert message in str(caught.value)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_checkpoints_that_do_not_fit_are_refused(images, pretrained, photos, tmp_path):
    with pytest.raises(WeightsError, match=r"cls_token is \[1, 1, 16\] in the file, \[1, 1, 32\] in the model"):
        finetune_here(images, tmp_path / "wide", f"checkpoint={pretrained}", *TINY_VIT, "model.width=32")
    broken = shutil.copytree(pretrained, tmp_path / "broken")
    for file in broken.glob("checkpoints/*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"model\.safetensors: truncated"):
        finetune_here(images, tmp_path / "cut", f"checkpoint={broken}")
    (tmp_path / "notes.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(WeightsError, match=r"notes\.pth"):
        finetune_here(images, tmp_path / "other", f"checkpoint={tmp_path / 'notes.pth'}")
    with pytest.raises(WeightsError, match="does not exist"):
        finetune_here(images, tmp_path / "none", "checkpoint=/nowhere/run")


def test_labels_that_cannot_be_trained_on_are_refused(images, pretrained, tmp_path):
    def refused(name: str, change, message: str) -> None:
        root = shutil.copytree(images, tmp_path / name)
        change(root)
        with pytest.raises(ConfigError, match=message):
            finetune_here(root, tmp_path / f"run-{name}", f"checkpoint={pretrained}")

    refused("other", lambda root: (root / "test" / "red").rename(root / "test" / "rot"), "rot")
    refused("empty", lambda root: [file.unlink() for file in (root / "train" / "red").iterdir()], "red")


def test_another_configuration_is_refused_and_named(images, tuned, pretrained):
    with pytest.raises(ConfigError, match=r"another configuration, by its config\.yaml \(.*augment.mixup: 0.8 -> 0.0"):
        finetune_here(images, tuned, f"checkpoint={pretrained}", "augment.mixup=0")


def test_a_folder_of_another_kind_of_run_is_refused(images, photos, tmp_path):
    run = run_here(photos, tmp_path / "run")
    with pytest.raises(ConfigError, match="configures a pretrain run, and this is for finetune runs"):
        finetune_here(images, run, *TINY_VIT)
