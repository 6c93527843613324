"""Files from a stranger: nothing in them runs."""

from __future__ import annotations

import warnings

import pytest
import torch

from mae_et.config import ConfigError, load_config, task_of
from mae_et.data.sources import open_source
from mae_et.engine.checkpoint import CheckpointError, load_checkpoint
from mae_et.exchange.weights import WeightsError, open_weights
from tests.engine.test_checkpoint import rewrite_manifest
from tests.hostile.small import write_payload


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("form", ["pickle", "torch", "legacy", "npy"])
def test_no_file_of_a_checkpoint_is_unpickled(tmp_path, sentinel, pretrained, file, form):
    path = pretrained / "checkpoints" / "step-00000004" / file
    path.unlink()
    write_payload(path, sentinel, form)
    if file != "manifest.json":
        rewrite_manifest(path.parent)
    for opened in (load_checkpoint, open_weights):
        with pytest.raises((CheckpointError, WeightsError), match=file):
            opened(path.parent)
    with pytest.raises(WeightsError, match=file):
        open_weights(path)
    assert not sentinel.exists()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors", ".onnx"])
@pytest.mark.parametrize("form", ["pickle", "torch", "legacy", "npy", "tar", "zip in zip"])
def test_no_file_of_weights_is_unpickled(tmp_path, sentinel, suffix, form):
    if suffix == ".onnx":
        pytest.importorskip("onnx")
    path = tmp_path / f"weights{suffix}"
    write_payload(path, sentinel, form)
    with pytest.raises(WeightsError, match=f"cannot use {path}"):
        open_weights(path)
    assert not sentinel.exists()


def test_a_torchscript_program_is_not_loaded(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has deprecated what the attacker uses
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "program.pt")
    with pytest.raises(WeightsError, match=r"program\.pt"):
        open_weights(tmp_path / "program.pt")


@pytest.mark.parametrize("name", ["train_list.mat", "setid.mat"])
@pytest.mark.parametrize("form", ["pickle", "npy", "torch"])
def test_no_list_of_a_data_set_is_unpickled(tmp_path, sentinel, name, form):
    write_payload(tmp_path / name, sentinel, form)
    source = "stanford_dogs" if name == "train_list.mat" else "flowers102"
    (tmp_path / "Images").mkdir()
    (tmp_path / "test_list.mat").touch()
    with pytest.raises(ValueError, match=name):
        open_source(source, tmp_path, download=False)
    assert not sentinel.exists()


TAGS = ["!!python/object/apply:os.system ['touch {}']", "!!python/object/new:pathlib.Path.touch ['{}']"]


@pytest.mark.parametrize("tag", TAGS)
def test_tags_of_yaml_do_not_run(tmp_path, sentinel, pretrained, tag):
    path = pretrained / "config.yaml"
    path.write_text("run: " + tag.format(sentinel))
    for opened in (load_config, task_of):
        with pytest.raises(ConfigError, match=f"{path} cannot be read as YAML"):
            opened(path)
    with pytest.raises(WeightsError, match=f"{path} cannot be read as YAML"):
        open_weights(pretrained)
    assert not sentinel.exists()
