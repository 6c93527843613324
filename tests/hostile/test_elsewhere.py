"""Files from a stranger: what they hold reads nothing that lies elsewhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.io
import torch

from mae_et.config import ConfigError, load_config
from mae_et.data.published import read_dogs_list
from mae_et.data.sources import open_source
from mae_et.exchange.weights import WeightsError, open_weights
from tests.hostile.small import BACKBONE


@pytest.mark.parametrize(
    "text",
    ["run: ${oc.env:A_SECRET}", "tracking: {tags: ['${oc.env:A_SECRET}']}", "data: {root: '${seed}'}", "${seed}: 1"],
)
def test_no_value_of_the_environment_gets_into_a_configuration(tmp_path, monkeypatch, pretrained, text):
    monkeypatch.setenv("A_SECRET", "hunter2")
    path = pretrained / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml: .*write the value itself") as refused:
        load_config(path)
    assert "hunter2" not in str(refused.value)
    with pytest.raises(WeightsError, match=r"config\.yaml: .*write the value itself"):
        open_weights(pretrained)
    with pytest.raises(ConfigError, match="write the value itself"):
        load_config(None, ["run=${oc.env:A_SECRET}"])


def test_arguments_of_timm_name_no_files(tmp_path, tuned):
    weights = tmp_path / "secret.pth"
    torch.save({}, weights)
    for arguments in (
        {"checkpoint_path": str(weights)},
        {"pretrained_cfg": {"file": str(weights)}},
        {"cache_dir": "/"},
    ):
        backbone = replace(BACKBONE, shape=None, model="timm/resnet18", arguments=arguments)
        with pytest.raises(ConfigError, match=f"'{next(iter(arguments))}', with which timm would read"):
            backbone.build(2)
        (tuned / "backbone.json").write_text(backbone.to_json())
        with pytest.raises(WeightsError, match=r"backbone\.json: does not describe a backbone"):
            open_weights(tuned)


@pytest.mark.parametrize("name", ["hf-hub:a/b", "local-dir:{}", "hf_hub:a/b", "resnet18.hf-hub:a/b"])
def test_names_of_timm_are_no_addresses(tmp_path, name):
    name = name.format(tmp_path)
    with pytest.raises(WeightsError, match=r"no such model|could not be had"):
        open_weights(f"timm/{name}")
    with pytest.raises(ConfigError, match="timm has no"):
        replace(BACKBONE, shape=None, model=f"timm/{name}").build(2)


@pytest.mark.parametrize("file", ["config.yaml", "run_id.txt", "backbone.json"])
def test_records_that_are_links_are_not_passed_on(tmp_path, pretrained, tuned, file):
    run = tuned if file == "backbone.json" else pretrained
    secret = tmp_path / "token"
    (run / file).rename(secret)
    (run / file).symlink_to(secret)
    with pytest.raises(WeightsError, match=rf"{file} is a link"):
        open_weights(run)


def test_a_run_id_is_an_id(pretrained):
    (pretrained / "run_id.txt").write_text("machine api.wandb.ai login user password 0123")
    with pytest.raises(WeightsError, match=r"run_id\.txt: holds no run's id") as refused:
        open_weights(pretrained)
    assert "password" not in str(refused.value)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "link"])
def test_onnx_reads_no_data_elsewhere(tmp_path, location):
    onnx = pytest.importorskip("onnx")
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_bytes(bytes(4 * 16 * 3 * 4 * 4))
    (tmp_path / "model" / "link").symlink_to(tmp_path / "secret")
    tensor = onnx.TensorProto(
        name="patch_embed.proj.weight", data_type=1, dims=[16, 3, 4, 4], data_location=onnx.TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value=location)
    graph = onnx.helper.make_graph([], "g", [], [], [tensor])
    (tmp_path / "model" / "net.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(WeightsError, match="it is truncated or not an ONNX file"):
        open_weights(tmp_path / "model" / "net.onnx")


def test_a_graph_without_its_convolution(tmp_path):
    onnx = pytest.importorskip("onnx")
    kernel = onnx.numpy_helper.from_array(np.zeros((16, 3, 4, 4), np.float32), "patch_embed.proj.weight")
    for nodes in ([], [onnx.helper.make_node("Identity", [], ["x"])]):
        graph = onnx.helper.make_graph(nodes, "g", [], [], [kernel])
        (tmp_path / "net.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
        with pytest.raises(WeightsError, match="no vision transformer is in it"):
            open_weights(tmp_path / "net.onnx")


@pytest.mark.parametrize("image", ["../../secret", "/etc/secret", "a/../../secret"])
def test_lists_name_no_images_elsewhere(tmp_path, image):
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "classes.txt").write_text(f"{image.partition('/')[0] or 'x'}\na\n\n..\n")
    (tmp_path / "meta" / "train.txt").write_text(f"{image}\n")
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match=r"train\.txt.*(lies outside|class '' is none)"):
        open_source("food101", tmp_path, download=False)
    cells = np.empty((1, 1), dtype=object)
    cells[0, 0] = "../secret.jpg"
    scipy.io.savemat(tmp_path / "train_list.mat", {"file_list": cells, "labels": [[1]]})
    with pytest.raises(ValueError, match="lies outside"):
        read_dogs_list(tmp_path / "train_list.mat")
