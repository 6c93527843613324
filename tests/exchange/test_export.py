"""Export to timm, and what all exports share: timm itself opens the folder; nothing wrong is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import nn

from mae_et.exchange import export_folder, export_timm
from mae_et.exchange.export import ExportError, ExportFacts, export
from mae_et.models.backbones import build_backbone
from mae_et.models.vit import ViTShape, build_vit

SHAPES = {
    "grey": ViTShape((28, 28), 2, 1, 96, 6, 3),
    "rectangle": ViTShape((32, 48), 16, 3, 64, 2, 2, mlp_ratio=3.0),
    "layer_scale": ViTShape((32, 32), 16, 3, 48, 2, 3, layer_scale=True),
    "no_class_token": ViTShape((32, 32), 16, 3, 48, 2, 3, class_token=False),
    "named": ViTShape((32, 32), 16, 3, 192, 12, 3),
}
SOURCE = {"run": "abc123", "step": 12, "folder": SHAPES}  # the last is nothing that JSON knows


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def facts_of(shape: ViTShape, classes: int = 0, pooling: Any = "cls") -> ExportFacts:
    names = tuple(f"class {i}" for i in range(classes))
    mean, std = (0.3, 0.4, 0.5)[: shape.channels], (0.2, 0.25, 0.3)[: shape.channels]
    return ExportFacts(shape, pooling, names, mean, std, 0.875, SOURCE)


def random_net(shape: ViTShape, classes: int = 0, pooling: Any = "cls") -> nn.Module:
    return randomise(build_vit(shape, classes, pooling))


def randomise(net: nn.Module) -> nn.Module:
    """Values of its own for every parameter, so that none can be left out; in train mode, as after training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.normal_(1.0 if "gamma" in name or "norm" in name else 0.0, 0.1, generator=generator)
    return net.train()


def images_of(facts: ExportFacts, batch: int) -> torch.Tensor:
    return torch.randn(batch, *facts.input_size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize(
    ("kind", "pooling"),
    [("grey", "cls"), ("rectangle", "mean"), ("layer_scale", "cls"), ("no_class_token", "mean")],
)
@torch.no_grad()
def test_timm_opens_what_was_exported(tmp_path, kind, pooling, classes):
    shape = SHAPES[kind]
    net, facts = random_net(shape, classes, pooling), facts_of(shape, classes, pooling)
    exported = export(net, facts, "timm", tmp_path / "out")
    assert net.training, "the source stays as it is"
    assert exported.folder == tmp_path / "out"
    assert exported.files == ("README.md", "config.json", "model.safetensors")
    assert sorted(path.name for path in exported.folder.iterdir()) == list(exported.files)
    assert exported.difference == 0  # one library, one machine, one order of sums

    opened = timm.create_model(f"local-dir:{exported.folder}", pretrained=True).eval()
    net.eval()
    for batch in (1, 3):
        images = images_of(facts, batch)
        torch.testing.assert_close(opened(images), net(images), rtol=0, atol=0)
    double = torch.randn(1, shape.channels, 2 * shape.size[0], 2 * shape.size[1])
    torch.testing.assert_close(opened(double), net(double), rtol=0, atol=0)
    data = resolve_model_data_config(opened)
    assert data["input_size"] == (shape.channels, *shape.size)
    assert data["mean"] == list(facts.mean)
    assert data["std"] == list(facts.std)
    assert data["crop_pct"] == 0.875
    assert data["interpolation"] == "bicubic"


def test_config_names_the_source_and_the_classes(tmp_path):
    net, facts = random_net(SHAPES["named"], 2), facts_of(SHAPES["named"], 2)
    exported = export(net, facts, "timm", tmp_path / "out")
    config = json.loads((exported.folder / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert config["label_names"] == ["class 0", "class 1"]
    assert config["mae_et"]["run"] == "abc123"
    assert config["mae_et"]["step"] == 12
    card = (exported.folder / "README.md").read_text()
    assert '"run": "abc123"' in card
    assert "mean 0.3, 0.4, 0.5" in card


@torch.no_grad()
def test_user_arguments_go_first(tmp_path):
    exported = export(random_net(SHAPES["named"], 2), facts_of(SHAPES["named"], 2), "timm", tmp_path / "out")
    opened = timm.create_model(f"local-dir:{exported.folder}", pretrained=True, num_classes=7, img_size=64)
    assert opened(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


@pytest.mark.parametrize(
    ("model", "arguments", "size"),
    [
        ("timm/test_resnet.r160_in1k", {}, (32, 64)),
        ("test_vit", {"depth": 2}, (64, 64)),
        ("timm/swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 2]}, (64, 64)),
    ],
)
@torch.no_grad()
def test_other_timm_models(tmp_path, model, arguments, size):
    net = build_backbone(model, classes=3, size=size, channels=1, drop_path=0.0, arguments=arguments)
    net.train()(torch.randn(4, 1, *size))  # statistics of batch norms away from their start
    facts = ExportFacts(None, None, (), (0.5,), (0.2,), 1.0, {}, model, arguments, size)
    exported = export(net, facts, "timm", tmp_path / "out")
    opened = timm.create_model(f"local-dir:{exported.folder}", pretrained=True).eval()
    images = images_of(facts, 3)
    torch.testing.assert_close(opened(images), net.eval()(images), rtol=0, atol=1e-5)  # windows in another order
    tuned = timm.create_model(f"local-dir:{exported.folder}", pretrained=True, num_classes=0).eval()
    assert tuned(images).shape == (3, net.num_features)


def test_an_empty_folder_is_taken_and_a_full_one_is_not(tmp_path):
    net, facts = random_net(SHAPES["layer_scale"]), facts_of(SHAPES["layer_scale"])
    (tmp_path / "empty").mkdir()
    export(net, facts, "timm", tmp_path / "empty")
    before = {path.name: path.read_bytes() for path in (tmp_path / "empty").iterdir()}
    with pytest.raises(ExportError, match="exists and is no empty folder"):
        export(net, facts, "timm", tmp_path / "empty")
    assert {path.name: path.read_bytes() for path in (tmp_path / "empty").iterdir()} == before
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ExportError, match="exists and is no empty folder"):
        export(net, facts, "timm", tmp_path / "file")
    with pytest.raises(ExportError, match="cannot write"):
        export(net, facts, "timm", tmp_path / "file" / "below")


def test_missing_parents_are_made(tmp_path):
    exported = export(random_net(SHAPES["layer_scale"]), facts_of(SHAPES["layer_scale"]), "timm", tmp_path / "a" / "b")
    assert exported.folder.is_dir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors | {"blocks.1.norm1.bias": tensors["blocks.1.norm1.bias"] + 0.01}, "differs .* by 0"),
        (lambda tensors: tensors | {"patch_embed.proj.bias": tensors["patch_embed.proj.bias"] / 0}, "by nan"),
        (lambda tensors: {name: value for name, value in tensors.items() if name != "cls_token"}, "opened again"),
    ],
)
def test_a_wrong_file_is_found_and_removed(tmp_path, monkeypatch, change, message):
    write = export_timm.save_file
    monkeypatch.setattr(export_timm, "save_file", lambda tensors, *path, **more: write(change(tensors), *path, **more))
    with pytest.raises(ExportError, match=message):
        export(random_net(SHAPES["layer_scale"]), facts_of(SHAPES["layer_scale"]), "timm", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_folder, "largest_difference", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(random_net(SHAPES["layer_scale"]), facts_of(SHAPES["layer_scale"]), "timm", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_facts_of_another_network(tmp_path):
    net, facts = random_net(SHAPES["rectangle"], 5), facts_of(SHAPES["rectangle"], 5)
    assert facts.shape
    for wrong in (replace(facts, pooling="mean"), replace(facts, shape=replace(facts.shape, depth=3))):
        with pytest.raises(ExportError, match="opened again"):
            export(net, wrong, "timm", tmp_path / "out")
    for change, message in (
        ({"classes": ("a", "b")}, "2 class names for 5 outputs"),
        ({"mean": (0.5,), "std": (0.5,)}, r"mean=\(0.5,\) for images of 3"),
        ({"std": (0.5,)}, r"std=\(0.5,\) has not as many"),
        ({"crop_fraction": 0}, "crop_fraction=0"),
        ({"shape": None}, "shape=None"),
    ):
        with pytest.raises(ValueError, match=message):
            export(net, replace(facts, **change), "timm", tmp_path / "out")
    with pytest.raises(ValueError, match="unknown form 'tf'"):
        export(net, facts, "tf", tmp_path / "out")  # pyright: ignore[reportArgumentType]
    assert not list(tmp_path.iterdir())


def test_optional_libraries_are_imported_late_and_named_when_absent():
    code = (
        "import sys; import mae_et.exchange.export as e;"
        "late = {'transformers', 'onnx', 'onnxruntime', 'onnxscript'};"
        "assert not late & set(sys.modules), late & set(sys.modules);"
        "sys.modules.update(dict.fromkeys(late));"
        "from mae_et.models.vit import ViTShape, build_vit;"
        "shape = ViTShape((32, 32), 16, 3, 16, 1, 1);"
        "facts = e.ExportFacts(shape, 'cls', (), (.5,) * 3, (.5,) * 3, 1.0, {});"
        "net = build_vit(shape, 0, 'cls')\n"
        "for form, name in (('hf', 'transformers'), ('onnx', 'onnxruntime')):\n"
        "    try: e.export(net, facts, form, '/nonexistent/out')\n"
        "    except e.ExportError as error:\n"
        "        assert name in str(error) and 'mae_et[export]' in str(error), error\n"
        "    else: raise SystemExit('no error')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
