"""What opens, what it is taken for, and what is refused."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path

import pytest
import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from mae_et.engine.checkpoint import save_checkpoint
from mae_et.exchange.weights import Weights, WeightsError, open_weights
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.vit import ViTShape, build_vit

SHAPE = ViTShape((32, 48), patch_size=8, channels=1, width=24, depth=2, heads=3, mlp_ratio=2.0)
NOT_OURS = ("class_token", "layer_scale", "locality")  # choices that pretraining does not have
SQUARE = ViTShape((32, 32), patch_size=8, width=64, depth=2, heads=1)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CONFIG = {
    "task": "pretrain",
    "model": {"name": "vit_tiny", "patch_size": 8, "width": 24, "depth": 2, "heads": 3, "mlp_ratio": 2.0},
    "data": {"size": [32, 48], "channels": 1, "mean": None, "std": None},
}


def autoencoder(shape: ViTShape = SHAPE) -> MaskedAutoencoder:
    """With parameters of their own, so that none can be mistaken for another."""
    numbers = {name: value for name, value in asdict(shape).items() if name not in NOT_OURS}
    decoder = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    return randomised(MaskedAutoencoder(**numbers, **decoder, target="pixel"))


def randomised(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return net.eval()


def pictures(*shape: int) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(2))


def pretraining_run(folder: Path, steps: tuple[int, ...] = (4,), config: dict | None = None) -> MaskedAutoencoder:
    model = autoencoder()
    folder.mkdir()
    OmegaConf.save(config or CONFIG, folder / "config.yaml")
    (folder / "run_id.txt").write_text("abc123\n")
    for step in steps:
        save_checkpoint(folder / "checkpoints", step, {"model": model.state_dict(), "optimizer": {}}, {"step": step})
        nn.init.normal_(model.encoder.cls_token)
    return model


def downstream_run(folder: Path, config: dict, average: bool = False) -> dict[str, Tensor]:
    tensors = randomised(build_vit(SHAPE, classes=5)).state_dict()
    groups = {"model": {f"net.{name}": tensor for name, tensor in tensors.items()}}
    if average:
        groups["average"] = {name: tensor + 1 for name, tensor in groups["model"].items()}
    save_checkpoint(folder / "checkpoints", 1, groups, {"step": 1})
    OmegaConf.save(config, folder / "config.yaml")
    return tensors


def mae_tensors(part: str) -> OrderedDict[str, Tensor]:
    """The names of MAE's state dicts (facebookresearch/mae, models_mae.py and models_vit.py), encoder first."""
    model = autoencoder(SQUARE)
    tensors = OrderedDict(model.encoder.state_dict())
    if part == "full":
        block = {name.replace("blocks", "decoder_blocks"): t for name, t in tensors.items() if "blocks.0." in name}
        ends = ("mask_token", "decoder_pos_embed", "decoder_embed.weight", "decoder_norm.bias", "decoder_pred.bias")
        tensors |= block | {name: torch.zeros(3) for name in ends}
    if part == "finetuned":
        tensors |= {name.replace("norm", "fc_norm"): tensors.pop(name) for name in ("norm.weight", "norm.bias")}
        tensors |= {"head.weight": torch.randn(5, 64), "head.bias": torch.randn(5)}
    return tensors


def mae_file(path: Path, part: str) -> OrderedDict[str, Tensor]:
    """A checkpoint as MAE's util/misc.py saves it."""
    tensors = mae_tensors(part)
    optimizer = torch.optim.AdamW([nn.Parameter(tensor) for tensor in tensors.values()])
    content = {
        "model": tensors,
        "optimizer": optimizer.state_dict(),
        "epoch": 399,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
        "args": argparse.Namespace(model="mae_vit_base_patch16", mask_ratio=0.75, lr=None, betas=(0.9, 0.95)),
    }
    torch.save(content, path)
    return tensors


def assert_same(found: Weights, expected: dict[str, Tensor]) -> None:
    assert found.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found.tensors[name], tensor), name
        assert found.tensors[name].dtype == torch.float32


@torch.no_grad()
def test_our_run_in_timm(tmp_path):
    model = pretraining_run(tmp_path / "run", steps=())
    folder = save_checkpoint(tmp_path / "run" / "checkpoints", 7, {"model": model.state_dict()}, {"step": 7})
    found = open_weights(str(tmp_path / "run"))
    net = build_vit(SHAPE, pooling="cls").eval()
    net.load_state_dict(found.tensors, strict=True)
    images = pictures(1, 32, 48)
    # One function written twice; fp32 rounding of features of size 1.
    torch.testing.assert_close(net.forward_features(images), model.encoder(images), rtol=0, atol=1e-6)
    assert (found.shape, found.mean, found.std) == (SHAPE, (0.5,), (0.25,))
    assert set(found.dropped) == {name for name in model.state_dict() if name.startswith("decoder.")}
    manifest = json.loads((folder / "manifest.json").read_text())
    origin = found.origin
    assert (origin.kind, origin.step, origin.run_id, origin.config) == ("run", 7, "abc123", CONFIG)
    assert (origin.path, origin.sha256) == (str(folder), manifest["files"]["model.safetensors"]["sha256"])
    assert json.dumps(origin.config)


def test_checkpoints_of_a_run_by_every_name(tmp_path, monkeypatch, capsys):
    pretraining_run(tmp_path / "run", steps=(4, 8))
    run, four = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000004"
    newest = open_weights(run)
    older = open_weights(four)
    assert (newest.origin.step, older.origin.step) == (8, 4)
    assert not torch.equal(newest.tensors["cls_token"], older.tensors["cls_token"])
    assert_same(open_weights(run / "checkpoints"), newest.tensors)
    assert_same(open_weights(four / "model.safetensors"), older.tensors)
    monkeypatch.chdir(four)
    assert open_weights(".").origin.config == CONFIG
    file = run / "checkpoints" / "step-00000008" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert open_weights(run).origin.step == 4
    assert "step-00000008 is broken" in capsys.readouterr().err
    with pytest.raises(WeightsError, match=r"step-00000008.*model\.safetensors: truncated"):
        open_weights(file.parent)


def test_checkpoint_without_its_run(tmp_path):
    save_checkpoint(tmp_path, 3, {"model": autoencoder(SQUARE).state_dict()}, {})
    found = open_weights(tmp_path / "step-00000003")
    assert (found.shape, found.origin.config, found.mean) == (SQUARE, None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 48}, r"blocks\.0\.|cls_token is \[1, 1, 24\], not \[1, 1, 48\]"),
        ({"depth": 3}, r"blocks\.2\.norm1\.weight is missing"),
        ({"depth": 1}, r"blocks\.1\.\S+ belongs to another model"),
        ({"mlp_ratio": 4.0}, r"blocks\.0\.mlp\.fc1\.weight is \[48, 24\], not \[96, 24\]"),
        ({"patch_size": 4}, r"patch_embed\.proj\.weight is \[24, 1, 8, 8\], not \[24, 1, 4, 4\]"),
        ({"name": "vit_enormous"}, "does not describe a pretraining run"),
    ],
)
def test_configuration_of_another_model(tmp_path, change, message):
    pretraining_run(tmp_path / "run", config={**CONFIG, "model": {**CONFIG["model"], **change}})
    with pytest.raises(WeightsError, match=message):
        open_weights(tmp_path / "run")


def test_configuration_of_another_size(tmp_path):
    pretraining_run(tmp_path / "run", config={**CONFIG, "data": {"size": 32, "channels": 1}})
    with pytest.raises(WeightsError, match=r"pos_embed is \[1, 25, 24\], not \[1, 17, 24\]"):
        open_weights(tmp_path / "run")


def test_folders_without_weights(tmp_path):
    with pytest.raises(WeightsError, match=r"nowhere: it does not exist; give a run's folder"):
        open_weights(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="not the folder of a run"):
        open_weights(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"did you mean .*model\.safetensors"):
        open_weights(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(WeightsError, match="has not saved a checkpoint yet"):
        open_weights(tmp_path)
    (tmp_path / "weights.h5").touch()
    with pytest.raises(WeightsError, match=r"'\.h5' are not read"):
        open_weights(tmp_path / "weights.h5")


@pytest.mark.parametrize("average", [False, True])
def test_fine_tuned_run(tmp_path, average):
    tensors = downstream_run(tmp_path, {"model": {"name": None}}, average)
    facts = {"shape": asdict(SHAPE), "model": None, "arguments": {}, "mean": [0.3], "std": [0.2]}
    (tmp_path / "backbone.json").write_text(json.dumps(facts))
    found = open_weights(tmp_path)
    assert_same(found, {name: tensor + average for name, tensor in tensors.items()})
    assert {"head.weight", "fc_norm.weight"} < found.tensors.keys()
    assert (found.shape, found.mean, found.std, found.model) == (SHAPE, (0.3,), (0.2,), None)
    manifest = json.loads((tmp_path / "checkpoints" / "step-00000001" / "manifest.json").read_text())
    group = "average.safetensors" if average else "model.safetensors"
    assert found.origin.sha256 == manifest["files"][group]["sha256"]

    (tmp_path / "backbone.json").write_text(json.dumps({**facts, "shape": {**facts["shape"], "depth": 5}}))
    with pytest.raises(WeightsError, match=r"blocks\.2\.norm1\.weight is missing"):
        open_weights(tmp_path)
    (tmp_path / "backbone.json").write_text("{")
    with pytest.raises(WeightsError, match=r"backbone\.json: does not describe a backbone"):
        open_weights(tmp_path)


def test_supervised_run_of_a_timm_model(tmp_path):
    net = timm.create_model("resnet10t", num_classes=3)
    save_checkpoint(tmp_path / "checkpoints", 1, {"model": {f"net.{n}": t for n, t in net.state_dict().items()}}, {})
    OmegaConf.save({"model": {"name": "timm/resnet10t"}}, tmp_path / "config.yaml")
    found = open_weights(tmp_path)
    assert (found.model, found.shape) == ("timm/resnet10t", None)
    net.load_state_dict(found.tensors, strict=True)
    facts = {"shape": None, "model": "timm/resnet10t", "arguments": {"output_stride": 16}, "mean": None, "std": None}
    (tmp_path / "backbone.json").write_text(json.dumps(facts))
    assert open_weights(tmp_path).arguments == {"output_stride": 16}


def test_fine_tuned_run_by_its_configuration(tmp_path):
    shape = ViTShape((32, 32), patch_size=8, channels=1, width=24, depth=1, heads=3)
    tensors = {f"net.{name}": t for name, t in build_vit(shape, classes=2).state_dict().items()}
    save_checkpoint(tmp_path / "checkpoints", 1, {"model": tensors}, {})
    OmegaConf.save({"model": {"name": "vit_tiny", "heads": 3}}, tmp_path / "config.yaml")
    assert open_weights(tmp_path).shape == shape
    OmegaConf.save({"model": {"name": None, "heads": None}}, tmp_path / "config.yaml")
    with pytest.raises(WeightsError, match=r"heads of a ViT of width 24 cannot be inferred; give model\.heads"):
        open_weights(tmp_path)
    assert open_weights(tmp_path, heads=3).shape == shape


@pytest.mark.parametrize("part", ["encoder", "full", "finetuned"])
@torch.no_grad()
def test_mae_files(tmp_path, part):
    tensors = mae_file(tmp_path / "mae.pth", part)
    found = open_weights(str(tmp_path / "mae.pth"))
    assert found.shape == SQUARE
    assert (found.origin.kind, (found.mean, found.std)) == ("mae", IMAGENET)
    assert len(found.origin.sha256 or "") == 64
    decoder = [name for name in tensors if name.startswith("decoder_") or name == "mask_token"]
    assert (found.dropped, bool(decoder)) == (tuple(decoder), part == "full")
    net = build_vit(SQUARE, classes=5 * (part == "finetuned"), pooling="mean" if part == "finetuned" else "cls")
    net.load_state_dict(found.tensors, strict=True)
    if part != "finetuned":
        encoder = autoencoder(SQUARE).encoder
        images = pictures(3, 32, 32)
        features = net.eval().forward_features(images)
        torch.testing.assert_close(features, encoder(images), rtol=0, atol=1e-6)


def test_mae_encoder_alone_is_known_by_its_positions(tmp_path):
    torch.save({"model": mae_tensors("encoder")}, tmp_path / "mae.pth")
    assert open_weights(tmp_path / "mae.pth").origin.kind == "mae"
    learned = mae_tensors("encoder")
    learned["pos_embed"] = torch.randn(1, 17, 64)
    torch.save({"model": learned}, tmp_path / "other.pth")
    found = open_weights(tmp_path / "other.pth")
    assert (found.origin.kind, found.mean) == ("state_dict", None)


@pytest.mark.parametrize("wrapper", ["", "model", "state_dict", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_state_dicts_in_their_wrappings(tmp_path, wrapper, prefix):
    tensors = build_vit(SQUARE, classes=4).state_dict()
    content = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    other = {"state_dict": {"a": torch.zeros(1)}} if wrapper == "model" else {}
    torch.save({wrapper: content, **other, "epoch": 3} if wrapper else content, tmp_path / "net.pt")
    found = open_weights(tmp_path / "net.pt")
    assert_same(found, tensors)
    assert (found.shape, found.origin.kind) == (SQUARE, "state_dict")


def test_safetensors_in_half_precision(tmp_path):
    shape = ViTShape((28, 28), 14, width=128, depth=1, heads=2, class_token=False, layer_scale=True)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in randomised(build_vit(shape)).state_dict().items()}
    save_file(tensors, tmp_path / "net.safetensors")
    found = open_weights(tmp_path / "net.safetensors")
    assert_same(found, {name: tensor.float() for name, tensor in tensors.items()})
    assert found.shape == shape
    (tmp_path / "net.safetensors").write_bytes(b"")
    assert_same(found, {name: tensor.float() for name, tensor in tensors.items()})


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (1152, 16), (1280, 16), (320, 5)])
def test_heads_by_width(tmp_path, width, heads):
    shape = ViTShape((4, 4), 2, width=width, depth=1, heads=heads, mlp_ratio=0.5)
    save_file(build_vit(shape).state_dict(), tmp_path / "net.safetensors")
    assert open_weights(tmp_path / "net.safetensors").shape == shape


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet10t", {}),
        ("deit_tiny_distilled_patch16_224", {"depth": 1, "embed_dim": 48}),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "embed_dim": 24, "num_heads": (1, 2)}),
    ],
)
def test_other_models_have_no_shape(tmp_path, name, arguments):
    net = timm.create_model(name, **arguments)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    found = open_weights(tmp_path / "net.safetensors")
    assert found.shape is None
    net.load_state_dict(found.tensors, strict=True)


def test_rectangles_and_unusual_widths_need_words(tmp_path):
    path = tmp_path / "net.safetensors"
    save_file(build_vit(ViTShape((32, 40), 8, width=64, depth=1, heads=1)).state_dict(), path)
    with pytest.raises(WeightsError, match=r"net\.safetensors: its 21 positions are not those of a square grid"):
        open_weights(path)
    save_file(build_vit(ViTShape((32, 32), 8, width=40, depth=1, heads=5)).state_dict(), path)
    with pytest.raises(WeightsError, match=r"width 40 cannot be inferred; give model\.heads"):
        open_weights(path)
    assert open_weights(path, heads=5).shape == ViTShape((32, 32), 8, width=40, depth=1, heads=5)


def test_a_rectangle_is_not_taken_for_a_square_without_a_class_token(tmp_path):
    shape = ViTShape((32, 48), 8, width=64, depth=1, heads=1)
    save_file(build_vit(shape).state_dict(), tmp_path / "net.safetensors")
    assert open_weights(tmp_path / "net.safetensors").shape is None  # 4 x 6 + 1 = 5 x 5


@pytest.mark.parametrize("legacy", [False, True])
def test_malicious_pickles_do_not_run(tmp_path, legacy):
    sentinel = tmp_path / "executed"

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {sentinel}",)

    path = tmp_path / "net.pth"
    content = {"model": build_vit(SQUARE).state_dict(), "extra": Payload()}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match=rf"{path}: refused, because it asks to run or build posix\.system"):
        open_weights(path)
    assert not sentinel.exists()
    torch.load(path, weights_only=False)
    assert sentinel.exists(), "the payload would not have run anywhere, so the test shows nothing"


def test_plain_pickles_and_whole_modules_do_not_load(tmp_path):
    (tmp_path / "plain.bin").write_bytes(pickle.dumps({"a": 1}, protocol=4))
    with pytest.raises(WeightsError, match=r"plain\.bin: it is truncated or not a file of torch\.save"):
        open_weights(tmp_path / "plain.bin")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(WeightsError, match=r"asks to run or build torch\.nn\.modules\.linear\.Linear"):
        open_weights(tmp_path / "module.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(WeightsError, match="holds a list, not a state dict"):
        open_weights(tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(WeightsError, match="holds no tensors"):
        open_weights(tmp_path / "empty.pt")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("left", [0.0, 0.001, 0.3, 0.7, 0.999])
def test_truncated_files_are_named(tmp_path, kind, left):
    path = tmp_path / ("net.safetensors" if kind == "safetensors" else "net.pth")
    if kind == "safetensors":
        save_file(build_vit(SQUARE).state_dict(), path)
    else:
        torch.save({"model": build_vit(SQUARE).state_dict()}, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content))])
    with pytest.raises(WeightsError, match=rf"{path}: it is truncated"):
        open_weights(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers(tmp_path, value):
    tensors = build_vit(SQUARE).state_dict()
    tensors["blocks.1.mlp.fc1.bias"][3] = value
    save_file(tensors, tmp_path / "net.safetensors")
    with pytest.raises(WeightsError, match=r"net\.safetensors: tensor 'blocks\.1\.mlp\.fc1\.bias' holds NaN or inf"):
        open_weights(tmp_path / "net.safetensors")


def test_tensors_that_are_no_arrays(tmp_path):
    torch.save({"a": torch.zeros(2, 2).to_sparse()}, tmp_path / "sparse.pt")
    with pytest.raises(WeightsError, match="tensor 'a' is not a plain array"):
        open_weights(tmp_path / "sparse.pt")


@pytest.fixture
def published(monkeypatch):
    """timm as if it had downloaded weights, of one block where it has several."""
    create, made = timm.create_model, []

    def create_model(name: str, pretrained: bool, num_classes: int) -> nn.Module:
        assert pretrained
        arguments = {"depth": 1} if "vit" in name or "deit" in name else {}
        made.append(create(name, pretrained=False, num_classes=num_classes, **arguments))
        return made[-1]

    monkeypatch.setattr(timm, "create_model", create_model)
    return made


def test_published_weights_of_timm(published):
    found = open_weights("timm/vit_tiny_patch16_224")
    assert found.shape == ViTShape((224, 224), width=192, heads=3, depth=1)
    assert (found.origin.kind, found.origin.sha256) == ("timm", None)
    assert found.model == found.origin.path == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert (found.mean, found.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert_same(found, published[0].state_dict())


def test_positions_of_patches_alone_are_still_a_plain_vit(published):
    shape = ViTShape((224, 224), width=384, heads=6, depth=1, layer_scale=True)
    assert open_weights("timm/deit3_small_patch16_224").shape == shape
    assert published[0].pos_embed.shape[1] == 14 * 14


# Convolutions; registers; a norm before the blocks, with and without another GELU.
@pytest.mark.parametrize(
    "name",
    ["resnet10t", "vit_wee_patch16_reg1_gap_256", "vit_base_patch32_clip_quickgelu_224", "vit_xsmall_patch16_clip_224"],
)
@pytest.mark.usefixtures("published")
def test_what_of_timm_is_no_plain_vit(name):
    assert open_weights(f"timm/{name}").shape is None


def test_unknown_names_of_timm():
    with pytest.raises(WeightsError, match=r"no such model; nearest: .*vit_tiny_patch16_224"):
        open_weights("timm/vit_tiny_patch61_224")


def test_without_internet(monkeypatch):
    def offline(*_args, **_kwargs):
        raise FileNotFoundError("An error happened while trying to locate the file on the Hub\nmore")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(WeightsError, match="connect to the internet, or copy a file") as caught:
        open_weights("timm/vit_tiny_patch16_224")
    assert "\n" not in str(caught.value)


def test_tags_that_timm_does_not_have():
    with pytest.raises(WeightsError, match=r"Invalid pretrained tag \(nonsense\)"):
        open_weights("timm/vit_tiny_patch16_224.nonsense")
