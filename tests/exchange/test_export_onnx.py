"""Export to ONNX: onnxruntime gives the source's features from plain pixels, at any batch."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from mae_et.exchange.export import ExportError, ExportFacts, export
from mae_et.models.vit import ViTShape, build_vit

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra mae_et[export]")
pytest.importorskip("onnxscript", reason="needs the extra mae_et[export]")

GREY = ViTShape((28, 28), 2, 1, 48, 1, 3)
RECTANGLE = ViTShape((32, 48), 16, 3, 64, 1, 2, layer_scale=True, class_token=False)

# Other kernels, so sums of 16 to 200 terms in another order, on features of size 1 to 5: 3e-6 seen.
TOLERANCE = 3e-5


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(shape: ViTShape, classes: int = 0, pooling: Any = "cls") -> tuple[nn.Module, ExportFacts]:
    net = build_vit(shape, classes, pooling)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.normal_(1.0 if "norm" in name or "gamma" in name else 0.0, 0.1, generator=generator)
    names = tuple(f"class {i}" for i in range(classes))
    mean, std = (0.3, 0.4, 0.5)[: shape.channels], (0.2, 0.25, 0.3)[: shape.channels]
    return net.eval(), ExportFacts(shape, pooling, names, mean, std, 0.875, {"run": "abc123"})


@torch.no_grad()
def assert_runs(folder: Any, net: nn.Module, facts: ExportFacts, output: str) -> Any:
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert [node.name for node in session.get_inputs()] == ["pixels"]
    assert [node.name for node in session.get_outputs()] == [output]
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (facts.mean, facts.std))
    for batch in (1, 3):
        pixels = np.random.default_rng(batch).random((batch, *facts.input_size), np.float32)
        expected = net(torch.from_numpy((pixels - mean) / std)).numpy()
        np.testing.assert_allclose(session.run([output], {"pixels": pixels})[0], expected, rtol=0, atol=TOLERANCE)
    return session


@pytest.mark.parametrize(("shape", "classes", "pooling"), [(GREY, 0, "cls"), (RECTANGLE, 4, "mean")])
def test_onnxruntime_opens_what_was_exported(tmp_path, capfd, shape, classes, pooling):
    net, facts = network(shape, classes, pooling)
    exported = export(net, facts, "onnx", tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    assert exported.files == ("README.md", "model.onnx")
    assert exported.difference < TOLERANCE
    session = assert_runs(exported.folder, net, facts, "logits" if classes else "features")
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["mae_et"]) == {"run": "abc123"}
    assert json.loads(metadata["classes"]) == list(facts.classes)
    assert json.loads(metadata["crop_fraction"]) == 0.875


def test_other_timm_models(tmp_path):
    net = timm.create_model("test_resnet", num_classes=3, in_chans=1)
    net.train()(torch.randn(4, 1, 32, 32))  # statistics of batch norms away from their start
    facts = ExportFacts(None, None, (), (0.5,), (0.2,), 1.0, {}, "timm/test_resnet", {}, (32, 32))
    exported = export(net, facts, "onnx", tmp_path / "out")
    assert_runs(exported.folder, net.eval(), facts, "logits")


def test_facts_of_another_network(tmp_path):
    net, facts = network(GREY, 0, "cls")
    wrong = ExportFacts(GREY, "mean", (), facts.mean, facts.std, 1.0, {})
    with pytest.raises(ExportError, match="another network's"):
        export(net, wrong, "onnx", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_network_that_cannot_be_traced(tmp_path):
    class Looks(nn.Module):
        num_classes = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3)) if x.sum().item() > 0 else x.amax((2, 3))

    facts = ExportFacts(None, None, (), (0.5,), (0.2,), 1.0, {}, "looks", {}, (8, 8))
    with pytest.raises(ExportError, match=r"torch\.onnx cannot export this network"):
        export(Looks(), facts, "onnx", tmp_path / "out")
    assert not list(tmp_path.iterdir())
