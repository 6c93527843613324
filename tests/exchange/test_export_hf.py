"""Export to transformers: its own classes open the folder and give the source's tokens, logits and pixels."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from mae_et.data.transforms import EvalTransform
from mae_et.exchange.export import ExportError, ExportFacts, export
from mae_et.models.vit import ViTShape, build_vit

transformers = pytest.importorskip("transformers", reason="needs the extra mae_et[export]")

GREY = ViTShape((28, 28), 2, 1, 48, 3, 3)
RECTANGLE = ViTShape((32, 48), 16, 3, 64, 2, 2, mlp_ratio=3.0)
SQUARE = ViTShape((32, 32), 16, 3, 48, 2, 3)

# transformers multiplies by three matrices where timm has one, and may choose another kernel for attention: sums of
# 16 to 200 terms in another order, on features of size 1 to 5, as the 3e-6 of ONNX. (Where both take the same kernels
# the two are equal to the bit.) The exporter itself allows 1e-4.
TOLERANCE = 3e-5


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(shape: ViTShape, classes: int = 0, pooling: Any = "cls") -> tuple[Any, ExportFacts]:
    net: Any = build_vit(shape, classes, pooling)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1, generator=generator)
    names = tuple(f"class {i}" for i in range(classes))
    mean, std = (0.3, 0.4, 0.5)[: shape.channels], (0.2, 0.25, 0.3)[: shape.channels]
    return net.eval(), ExportFacts(shape, pooling, names, mean, std, 0.875, {"run": "abc123"})


@pytest.mark.parametrize("shape", [GREY, RECTANGLE])
@torch.no_grad()
def test_encoder(tmp_path, shape):
    net, facts = network(shape)
    exported = export(net, facts, "hf", tmp_path / "out")
    assert exported.files == ("README.md", "config.json", "model.safetensors", "preprocessor_config.json")
    assert exported.difference < TOLERANCE
    model, loading = transformers.ViTModel.from_pretrained(
        exported.folder, add_pooling_layer=False, output_loading_info=True
    )
    assert not any(loading.values())
    for batch in (1, 3):
        images = torch.randn(batch, *facts.input_size)
        found = model.eval()(images).last_hidden_state
        torch.testing.assert_close(found, net.forward_features(images), rtol=0, atol=TOLERANCE)
    assert json.loads((exported.folder / "config.json").read_text())["mae_et"] == {"run": "abc123"}


@pytest.mark.parametrize("names", [(), ("bag", "coat", "shirt")])
@torch.no_grad()
def test_classifier(tmp_path, names):
    net, facts = network(GREY, classes=3)
    exported = export(net, replace(facts, classes=names), "hf", tmp_path / "out")
    model, loading = transformers.ViTForImageClassification.from_pretrained(exported.folder, output_loading_info=True)
    assert not any(loading.values())
    images = torch.randn(3, 1, 28, 28)
    torch.testing.assert_close(model.eval()(images).logits, net(images), rtol=0, atol=TOLERANCE)
    assert tuple(model.config.id2label.values()) == (names or ("LABEL_0", "LABEL_1", "LABEL_2"))
    encoder = transformers.ViTModel.from_pretrained(exported.folder, add_pooling_layer=False)
    found = encoder.eval()(images).last_hidden_state
    torch.testing.assert_close(found, net.forward_features(images), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shape", [GREY, SQUARE])
def test_preprocessing_is_ours(tmp_path, shape):
    net, facts = network(shape)
    exported = export(net, facts, "hf", tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(exported.folder)
    # Smooth, so that two bicubic resizes differ by rounding only: one level in 255, divided by std.
    rows, columns = torch.meshgrid(torch.linspace(0, 3, 60), torch.linspace(0, 4, 80), indexing="ij")
    image = torch.stack([127 + 120 * torch.sin(rows * columns + i) for i in range(shape.channels)]).to(torch.uint8)
    found = torch.as_tensor(processor(image, input_data_format="channels_first", return_tensors="pt")["pixel_values"])
    mean, std = (torch.tensor(values)[:, None, None] for values in (facts.mean, facts.std))
    expected = (EvalTransform(shape.size, 0.875)(image) / 255 - mean) / std
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1.01 / 255 / min(facts.std))


@pytest.mark.parametrize(
    ("shape", "pooling", "message"),
    [
        (GREY, "mean", "no mean pooling"),
        (replace(GREY, class_token=False), "mean", "no form without a class token"),
        (replace(GREY, layer_scale=True), "cls", "no layer scale"),
    ],
)
def test_what_transformers_lacks(tmp_path, shape, pooling, message):
    net, facts = network(shape, 3, pooling)
    with pytest.raises(ExportError, match=f"{message}.*export to timm instead"):
        export(net, facts, "hf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("field", "value"), [("depth", 3), ("heads", 4), ("width", 32)])
def test_facts_of_another_shape(tmp_path, field, value):
    net, facts = network(SQUARE)
    wrong = replace(facts, shape=replace(SQUARE, **{field: value}))
    with pytest.raises(ExportError, match="removed"):
        export(net, wrong, "hf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("classes", [0, 3])
@torch.no_grad()
def test_the_alternative_that_the_errors_name(tmp_path, classes):
    """A folder for timm opens in transformers too, mean pooling and layer scale included."""
    net, facts = network(replace(RECTANGLE, layer_scale=True, class_token=False), classes, "mean")
    exported = export(net, facts, "timm", tmp_path / "out")
    images = torch.randn(3, *facts.input_size)
    if classes:
        found = transformers.AutoModelForImageClassification.from_pretrained(exported.folder).eval()(images).logits
    else:
        found = transformers.AutoModel.from_pretrained(exported.folder).eval()(images).pooler_output
    torch.testing.assert_close(found, net(images), rtol=0, atol=TOLERANCE)


def test_the_voice_of_transformers_is_given_back(tmp_path, capfd):
    logs = transformers.utils.logging
    before = logs.get_verbosity(), logs.is_progress_bar_enabled()
    export(*network(SQUARE), "hf", tmp_path / "out")
    assert (logs.get_verbosity(), logs.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")
