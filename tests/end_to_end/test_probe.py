"""Probes and nearest neighbours of a checkpoint, whole; and exports from the command line."""

from __future__ import annotations

import json

import pytest
import torch

from mae_et.__main__ import main
from mae_et.config import ConfigError, ProbeConfig, load_config
from mae_et.engine.checkpoint import latest_checkpoint
from mae_et.exchange.backbone import choose_backbone
from mae_et.exchange.matching import load_weights
from mae_et.exchange.weights import WeightsError, open_weights
from mae_et.probing import frozen_encoder, pooled
from mae_et.tracking import read_metrics
from tests.end_to_end.labelled import finetune_here, probe_here, write_classes
from tests.end_to_end.tiny import history, run_here, weights


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def pretrained(photos, tmp_path_factory):
    return run_here(photos, tmp_path_factory.mktemp("pretrained") / "run")


def scores(run):
    return json.loads((run / "scores.json").read_text())


MAE = ["epochs=12", "optim.batch=9", "optim.base_lr=100", "model.pooling=mean", "data.scale=[0.5,1]"]


def test_mae_protocol_trains_the_head_alone(images, pretrained, tmp_path):
    run = probe_here(images, tmp_path / "run", f"checkpoint={pretrained}", *MAE, "data.holdout=0.25")
    checkpoint, source = latest_checkpoint(run / "checkpoints"), open_weights(str(pretrained)).tensors
    assert checkpoint is not None
    model = checkpoint.tensors["model"]
    for name, tensor in source.items():
        assert torch.equal(model[f"net.net.{name}"], tensor), name
    assert set(model) - {f"net.net.{name}" for name in source} == {
        *("net.head.weight", "net.head.bias", "net.normalise_features.num_batches_tracked"),
        *("net.normalise_features.running_mean", "net.normalise_features.running_var"),
    }
    report = json.loads((run / "report.json").read_text())
    assert report["test"]["top1"] > 0.6
    assert history(run)[0]["parent/path"].endswith(f"step-{latest_step(pretrained):08}")


def latest_step(run):
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    return checkpoint.step


def test_mae_protocol_continues_to_the_bit(images, pretrained, tmp_path):
    changes = [f"checkpoint={pretrained}", *MAE]
    whole = probe_here(images, tmp_path / "whole", *changes, "saving.steps=4", "saving.keep=100")
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "plan.json", "metrics.jsonl", "backbone.json"):
        (run / name).write_bytes((whole / name).read_bytes())
    (run / "checkpoints" / "step-00000008").symlink_to(whole / "checkpoints" / "step-00000008")
    probe_here(images, run, *changes)
    assert weights(run) == weights(whole)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("protocol", ["grid", "logistic"])
def test_probes_on_cached_features(images, pretrained, tmp_path, protocol, pooling):
    said: list[str] = []
    changes = [f"protocol={protocol}", f"model.pooling={pooling}", "grid.least_steps=200", "grid.epochs=1"]
    run = probe_here(images, tmp_path / "run", f"checkpoint={pretrained}", *changes, said=said.append)
    found = scores(run)
    assert found["images"] == {"train": 36, "test": 18}
    assert found["scores"]["top1"] > 0.6
    assert said[0].startswith(f"protocol {protocol}: ")
    rows = read_metrics(run / "metrics.jsonl")
    assert rows[0]["parent/run_id"] == (pretrained / "run_id.txt").read_text().strip()
    assert rows[-1]["probe/top1"] == found["scores"]["top1"]


def test_nearest_neighbours_from_the_command_line(images, pretrained, tmp_path, capsys):
    run = tmp_path / "knn"
    line = ["knn", f"checkpoint={pretrained}", f"data={images}", f"run={run}", "neighbours.k=[1,5]"]
    assert main([*line, "engine.device=cpu", "model.pooling=mean", "evaluation.crop_fraction=1.0"]) == 0
    assert "1-NN top-1" in capsys.readouterr().out
    found = scores(run)
    assert set(found["scores"]) == {"top1_k1", "top1_k5"}
    assert found["scores"]["top1_k5"] > 0.6
    assert read_metrics(run / "metrics.jsonl")[-1]["knn/top1_k5"] == found["scores"]["top1_k5"]
    assert load_config(run / "config.yaml", schema=ProbeConfig).neighbours.k == [1, 5]
    with pytest.raises(ConfigError, match="holds a training run"):
        probe_here(images, pretrained, f"checkpoint={pretrained}", knn=True)


def test_a_tuned_classifier_is_probed_through_its_own_norm(images, pretrained, tmp_path):
    """Mean pooling has its norm after the pooling: its features are what the head was trained on."""
    tuned = finetune_here(images, tmp_path / "tuned", f"checkpoint={pretrained}", "epochs=1")
    changes = [f"checkpoint={tuned}", "model.pooling=mean"]
    run = probe_here(images, tmp_path / "run", *changes, "protocol=logistic")
    assert scores(run)["scores"]["top1"] > 0.6
    weights_of = open_weights(str(tuned))
    settings = load_config(None, changes, ProbeConfig)
    backbone = choose_backbone(settings.model, settings.data, weights_of)
    encoder = frozen_encoder(backbone, weights_of, settings.model, lambda _line: None).eval()
    whole = backbone.build(3, "mean").eval()
    load_weights(whole, weights_of)
    pixels = torch.randn(4, 3, 16, 16)
    expected = whole(pixels)
    logits = pooled(encoder, pixels, "mean") @ whole.head.weight.T + whole.head.bias
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-5)


def test_few_shots_cut_what_probes_learn_from(images, pretrained, tmp_path):
    run = probe_here(images, tmp_path / "run", f"checkpoint={pretrained}", "protocol=logistic", "data.shots=3")
    assert scores(run)["images"] == {"train": 9, "test": 18}


def test_what_cannot_be_probed_says_so(images, pretrained, tmp_path):
    for protocol in ("mae", "grid"):
        with pytest.raises(ConfigError, match="checkpoint is not set"):
            probe_here(images, tmp_path / "run", f"protocol={protocol}")
    with pytest.raises(WeightsError, match="does not exist"):
        probe_here(images, tmp_path / "run", "protocol=grid", "checkpoint=/nowhere")
    with pytest.raises(ConfigError, match="protocol='knn' is not one of mae, grid, logistic"):
        probe_here(images, tmp_path / "run", f"checkpoint={pretrained}", "protocol=knn")


@pytest.mark.parametrize("form", ["timm", "onnx", "hf"])
def test_export_of_encoders(pretrained, tmp_path, form, capsys):
    pytest.importorskip({"timm": "timm", "onnx": "onnxscript", "hf": "transformers"}[form])
    folder = tmp_path / "out"
    assert main(["export", str(pretrained), "--to", form, "--folder", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "opened again: features differ by at most" in printed
    assert any(folder.iterdir())
    assert main(["export", str(pretrained), "--to", form, "--folder", str(folder)]) == 1
    assert str(folder) in capsys.readouterr().err


def test_export_of_a_classifier_keeps_its_classes(images, pretrained, tmp_path):
    import timm

    run = finetune_here(images, tmp_path / "run", f"checkpoint={pretrained}", "epochs=0.5")
    assert main(["export", str(run), "--to", "timm", "--folder", str(tmp_path / "out")]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["label_names"] == ["blue", "green", "red"]
    assert config["mae_et"]["sha256"] == open_weights(str(run)).origin.sha256
    ours = open_weights(str(run)).tensors
    assert all(torch.equal(tensor, ours[name]) for name, tensor in model.state_dict().items())
