"""Runs of networks with a convolution in their feed-forward layers: trained, continued, opened, and where refused."""

from __future__ import annotations

import json
import shutil

import pytest

from mae_et.config import ConfigError
from mae_et.exchange.export import ExportError
from mae_et.exchange.shapes import infer_shape
from mae_et.exchange.weights import WeightsError, open_weights
from mae_et.exporting import export_checkpoint
from tests.end_to_end.labelled import TINY_CONVNET, TINY_VIT, finetune_here, probe_here, write_classes
from tests.end_to_end.tiny import history, run_here, weights

LOCAL_VIT = [*TINY_VIT, "model.locality=true", "curriculum.preset=efficienttrain_pp", "epochs=3"]
LOCAL_DEIT = [
    "model.name=timm/deit_tiny_patch16_224",
    "model.arguments={patch_size: 2, embed_dim: 16, depth: 2, num_heads: 2}",
    *("model.locality=true", "epochs=1"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def local(images, tmp_path_factory):
    run = tmp_path_factory.mktemp("local") / "run"
    return finetune_here(images, run, *LOCAL_VIT, "optim.ema=0.5", "saving.steps=1", "saving.keep=1000")


@pytest.fixture(scope="module")
def deit(images, tmp_path_factory):
    return finetune_here(images, tmp_path_factory.mktemp("deit") / "run", *LOCAL_DEIT)


def report(run):
    return json.loads((run / "report.json").read_text())


def test_it_trains_through_all_stages(local):
    rows = [row for row in history(local) if "train/loss" in row]
    assert len({row["stage/bandwidth"] for row in rows}) == 3
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


def test_a_resumed_run_has_the_same_bits(images, local, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "plan.json", "metrics.jsonl", "backbone.json", "run_id.txt"):
        shutil.copy(local / name, run)
    shutil.copytree(local / "checkpoints" / "step-00000004", run / "checkpoints" / "step-00000004")
    finetune_here(images, run, *LOCAL_VIT, "optim.ema=0.5", "saving.steps=1", "saving.keep=1000")
    assert weights(run) == weights(local)
    assert report(run) == report(local)


def test_evaluation_alone_repeats_the_report(images, local, tmp_path):
    run = shutil.copytree(local, tmp_path / "run")
    (run / "report.json").unlink()
    finetune_here(images, run, *LOCAL_VIT, "optim.ema=0.5", "saving.steps=1", "saving.keep=1000", only_evaluate=True)
    assert report(run) == report(local)


def test_a_checkpoint_tells_that_it_has_locality(local, tmp_path):
    assert json.loads((local / "backbone.json").read_text())["shape"]["locality"]
    found = open_weights(str(local))
    assert found.shape is not None
    assert found.shape.locality
    inferred = infer_shape(found.tensors, heads=2)  # as of a state dict, without the run
    assert inferred == found.shape


def test_it_can_be_tuned_and_probed_from_its_checkpoint_alone(images, local, tmp_path):
    tuned = finetune_here(images, tmp_path / "tuned", f"checkpoint={local}", "epochs=0.5")
    assert open_weights(str(tuned)).shape == open_weights(str(local)).shape
    named = finetune_here(images, tmp_path / "named", f"checkpoint={local}", *TINY_VIT, "epochs=0.5")
    assert json.loads((named / "backbone.json").read_text())["shape"]["locality"]
    probed = probe_here(images, tmp_path / "probe", f"checkpoint={local}", "protocol=logistic")
    assert (probed / "scores.json").exists()


def test_models_of_timm_keep_it_too(images, deit, tmp_path):
    kept = json.loads((deit / "backbone.json").read_text())
    assert kept["shape"] is None
    assert kept["locality"]
    tuned = finetune_here(images, tmp_path / "tuned", f"checkpoint={deit}", "epochs=0.5")
    assert json.loads((tuned / "backbone.json").read_text())["locality"]
    assert "blocks.1.mlp.conv.weight" in open_weights(str(tuned)).tensors


@pytest.mark.parametrize("form", ["timm", "hf", "onnx"])
@pytest.mark.parametrize("kind", ["local", "deit"])
def test_it_is_not_exported(request, kind, form, tmp_path):
    run = request.getfixturevalue(kind)
    with pytest.raises(ExportError, match="a convolution in its feed-forward layers"):
        export_checkpoint(str(run), form, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_other_networks_are_refused(images, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.locality=true replaces .* this is a ConvNeXt"):
        finetune_here(images, tmp_path / "run", *TINY_CONVNET, "data.size=32", "model.locality=true")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_masked_pretraining_is_refused_and_so_is_its_checkpoint(images, photos, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.locality=true: its convolution needs every patch"):
        run_here(photos, tmp_path / "masked", "model.locality=true")
    pretrained = run_here(photos, tmp_path / "pretrained")
    with pytest.raises(ConfigError, match="was trained without, and its feed-forward layers do not fit"):
        finetune_here(images, tmp_path / "run", f"checkpoint={pretrained}", "model.locality=true")


def test_a_backbone_that_denies_it_is_refused(local, tmp_path):
    run = shutil.copytree(local, tmp_path / "run")
    facts = json.loads((run / "backbone.json").read_text())
    facts["shape"]["locality"] = False
    (run / "backbone.json").write_text(json.dumps(facts))
    with pytest.raises(WeightsError, match="its tensors are not those of the shape that the run states"):
        open_weights(str(run))
