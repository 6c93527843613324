"""What is copied, what is resampled, what is said, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_et.exchange.matching import load_weights
from mae_et.exchange.weights import Origin, Weights, WeightsError
from mae_et.models.vit import ViTShape, build_vit

SHAPE = ViTShape((32, 48), patch_size=8, width=24, depth=2, heads=3, mlp_ratio=2.0)


def randomised(net: Any, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return net.eval()


def weights_of(
    net: nn.Module, shape: ViTShape | None = SHAPE, dropped: tuple[str, ...] = (), **changes: Any
) -> Weights:
    tensors = {**{name: tensor.clone() for name, tensor in net.state_dict().items()}, **changes}
    return Weights(tensors, shape, None, None, None, Origin("state_dict", "net.pth", None), dropped=dropped)


def without(weights: Weights, *names: str) -> Weights:
    return replace(weights, tensors={name: t for name, t in weights.tensors.items() if not name.startswith(names)})


def pictures(size: tuple[int, int] = SHAPE.size, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_same_shape_is_copied_bit_by_bit():
    source, net = randomised(build_vit(SHAPE, pooling="cls")), randomised(build_vit(SHAPE, pooling="cls"), 2)
    match = load_weights(net, weights_of(source))
    assert torch.equal(net(pictures()), source(pictures()))
    assert set(match.loaded) == set(net.state_dict())
    assert (match.resampled, match.fresh, match.unused) == ((), (), ())
    assert match.text() == "net.pth: 30 tensors loaded"


@torch.no_grad()
def test_fine_tuning_head_and_norm_start_anew():
    source, net = randomised(build_vit(SHAPE, pooling="cls")), randomised(build_vit(SHAPE, classes=7), 2)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    decoder = tuple(f"decoder_blocks.{i}.norm1.weight" for i in range(9))
    match = load_weights(net, weights_of(source, dropped=("mask_token", *decoder)))
    assert set(match.fresh) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert set(match.unused) == {"norm.weight", "norm.bias", "mask_token", *decoder}
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name] if name in match.fresh else source.state_dict()[name])
    assert match.text().splitlines() == [
        "net.pth: 28 tensors loaded",
        "  new in this model: fc_norm.weight, fc_norm.bias, head.weight, head.bias",
        "  in the file, not used: norm.weight, norm.bias, mask_token, decoder_blocks.* (9)",
        "  (mean pooling has a norm of its own, fc_norm, which starts anew as in MAE's fine-tuning)",
    ]


@torch.no_grad()
def test_the_final_norm_for_frozen_features():
    source, net = randomised(build_vit(SHAPE, pooling="cls")), randomised(build_vit(SHAPE), 2)
    match = load_weights(net, weights_of(source), norm_to_fc_norm=True)
    assert not match.fresh
    assert not match.unused
    assert torch.equal(net.fc_norm.weight, source.norm.weight)
    assert torch.equal(net.fc_norm.bias, source.norm.bias)
    # A fine-tuned file has an fc_norm, which is then the one; a model with the class token keeps its norm.
    tuned = randomised(build_vit(SHAPE), 3)
    load_weights(net, weights_of(tuned), norm_to_fc_norm=True)
    assert torch.equal(net.fc_norm.weight, tuned.fc_norm.weight)
    pooled = randomised(build_vit(SHAPE, pooling="cls"), 4)
    load_weights(pooled, weights_of(source), norm_to_fc_norm=True)
    assert torch.equal(pooled.norm.weight, source.norm.weight)
    with pytest.raises(WeightsError, match=r"lack 2 tensors of the model VisionTransformer: fc_norm\.weight"):
        load_weights(net, without(weights_of(source), "norm."), norm_to_fc_norm=True)


@torch.no_grad()
def test_heads_of_other_classes_are_left_out_and_equal_ones_loaded():
    source = randomised(build_vit(SHAPE, classes=5))
    other, same = build_vit(SHAPE, classes=7), build_vit(SHAPE, classes=5)
    match = load_weights(other, weights_of(source))
    assert set(match.fresh) == set(match.unused) == {"head.weight", "head.bias"}
    assert "fc_norm.weight" in match.loaded
    assert not load_weights(same, weights_of(source)).fresh
    assert torch.equal(same.head.weight, source.head.weight)
    assert set(load_weights(build_vit(SHAPE), weights_of(source)).unused) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("size", [(64, 64), (16, 24), (48, 32), (24, 64)])
@torch.no_grad()
def test_positions_go_to_the_grid(size):
    source = randomised(build_vit(SHAPE, pooling="cls"))
    net = build_vit(replace(SHAPE, size=size), pooling="cls").eval()
    match = load_weights(net, weights_of(source))
    assert match.resampled == ("pos_embed",)
    patches = source.pos_embed[:, 1:].reshape(1, 4, 6, 24).permute(0, 3, 1, 2)
    expected = F.interpolate(patches, (size[0] // 8, size[1] // 8), mode="bicubic", antialias=True)
    torch.testing.assert_close(net.pos_embed[:, 1:], expected.flatten(2).mT, rtol=0, atol=0)
    assert torch.equal(net.pos_embed[:, :1], source.pos_embed[:, :1])
    # The model that was loaded does the same on its way through such an image.
    torch.testing.assert_close(net(pictures(size)), source(pictures(size)), rtol=0, atol=1e-6)


@torch.no_grad()
def test_grids_of_unknown_shape():
    square = replace(SHAPE, size=(32, 32))
    source = randomised(build_vit(square, pooling="cls"))
    net, known = (build_vit(replace(SHAPE, size=(64, 64)), pooling="cls") for _ in range(2))
    load_weights(net, weights_of(source, shape=None))
    load_weights(known, weights_of(source, shape=square))
    assert torch.equal(net.pos_embed, known.pos_embed)
    rectangle = randomised(build_vit(SHAPE, pooling="cls"))
    assert not load_weights(build_vit(SHAPE, pooling="cls"), weights_of(rectangle, shape=None)).resampled
    with pytest.raises(WeightsError, match="its 25 positions are not those of a square grid"):
        load_weights(net, weights_of(rectangle, shape=None))


@torch.no_grad()
def test_positions_of_a_model_without_class_token():
    plain = replace(SHAPE, class_token=False)
    source = randomised(build_vit(plain))
    net = build_vit(replace(plain, size=(16, 24))).eval()
    load_weights(net, weights_of(source, shape=plain))
    torch.testing.assert_close(net(pictures((16, 24))), source(pictures((16, 24))), rtol=0, atol=1e-6)
    # Into a model with one: nothing can be said of the token, but of the positions.
    token = randomised(build_vit(SHAPE), 2)
    match = load_weights(token, weights_of(source, shape=plain), fresh=("cls_token",))
    assert (match.fresh, match.resampled) == (("cls_token",), ("pos_embed",))
    assert torch.equal(token.pos_embed[:, 1:], source.pos_embed)
    assert not token.pos_embed[:, :1].any()
    # And back.
    match = load_weights(source, weights_of(token))
    assert set(match.unused) == {"cls_token"}
    assert torch.equal(source.pos_embed, token.pos_embed[:, 1:])


@torch.no_grad()
def test_class_tokens_with_and_without_a_position_are_one_function():
    """timm's DeiT III adds positions to patches alone."""
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    shape = ViTShape((32, 32), patch_size=8, width=24, depth=2, heads=3)
    patches_only = randomised(timm.models.VisionTransformer(**arguments, no_embed_class=True))
    net = build_vit(shape, pooling="cls").eval()
    load_weights(net, weights_of(patches_only, shape=shape), fresh=())
    # The same sums in another order.
    torch.testing.assert_close(net(pictures((32, 32))), patches_only(pictures((32, 32))), rtol=0, atol=1e-6)
    source = randomised(build_vit(shape, pooling="cls"), 5)
    match = load_weights(patches_only, weights_of(source, shape=shape), fresh=())
    assert set(match.resampled) == {"pos_embed", "cls_token"}
    torch.testing.assert_close(patches_only(pictures((32, 32))), source(pictures((32, 32))), rtol=0, atol=1e-6)


def test_patch_kernels_answer_to_resized_patches_as_before():
    """FlexiViT: the new kernel applied to an upsampled patch gives what the old one gave on the patch."""
    source = randomised(build_vit(SHAPE, pooling="cls"))
    net = build_vit(replace(SHAPE, size=(64, 96), patch_size=16), pooling="cls")
    match = load_weights(net, weights_of(source))
    assert match.resampled == ("patch_embed.proj.weight",)
    patch = pictures((8, 8)).double()
    up = F.interpolate(patch, (16, 16), mode="bicubic", antialias=True).numpy()
    kernels = [model.patch_embed.proj.weight.detach().double().numpy() for model in (source, net)]
    before = np.einsum("ncij,dcij->nd", patch.numpy(), kernels[0])
    after = np.einsum("ncij,dcij->nd", up, kernels[1])
    # The pseudo-inverse is taken in fp32.
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
@torch.no_grad()
def test_grey_and_colour(channels):
    ours, theirs = replace(SHAPE, channels=channels), replace(SHAPE, channels=4 - channels)
    source, net = randomised(build_vit(theirs, pooling="cls")), build_vit(ours, pooling="cls").eval()
    match = load_weights(net, weights_of(source, shape=theirs))
    assert match.resampled == ("patch_embed.proj.weight",)
    grey = pictures(channels=1)
    images = {1: grey, 3: grey.expand(-1, 3, -1, -1)}
    # A kernel of sums of three numbers.
    torch.testing.assert_close(net(images[channels]), source(images[4 - channels]), rtol=0, atol=1e-5)


@torch.no_grad()
def test_convolutions_of_timm():
    source, net = randomised(timm.create_model("resnet10t", num_classes=5)), timm.create_model("resnet10t", in_chans=1)
    old = without(weights_of(source, shape=None), "bn1.num_batches_tracked")
    match = load_weights(net, old, fresh=("fc.",))
    assert match.resampled == ("conv1.0.weight",)
    assert set(match.fresh) == {"fc.weight", "fc.bias", "bn1.num_batches_tracked"}
    grey = pictures((64, 64), channels=1)
    features = source.forward_features(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(net.eval().forward_features(grey), features, rtol=1e-4, atol=1e-5)
    with pytest.raises(WeightsError, match=r"do not fit the model resnet10t: fc\.weight is \[5, 512\] in the file"):
        load_weights(net, old)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 48}, r"cls_token is \[1, 1, 24\] in the file, \[1, 1, 48\] in the model"),
        ({"mlp_ratio": 4.0}, r"blocks\.0\.mlp\.fc1\.weight is \[48, 24\] in the file, \[96, 24\] in the model"),
        ({"depth": 3}, r"lack 12 tensors of the model VisionTransformer: blocks\.2\.norm1\.weight, .*\.\.\."),
        ({"depth": 1}, r"it has no blocks\.1\."),
        ({"heads": 2}, r"they are for 3 attention heads, the model has 2"),
        ({"layer_scale": True}, r"lack 4 tensors of the model VisionTransformer: blocks\.0\.ls1\.gamma"),
        ({"channels": 4}, r"patch_embed\.proj\.weight is \[24, 3, 8, 8\] in the file, \[24, 4, 8, 8\] in the model"),
    ],
)
def test_other_models_are_refused_and_left_as_they_were(change, message):
    source, net = randomised(build_vit(SHAPE)), randomised(build_vit(replace(SHAPE, **change)), 2)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(WeightsError, match=rf"net\.pth.*{message}"):
        load_weights(net, weights_of(source))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_scales_that_the_model_lacks_are_refused():
    shape = replace(SHAPE, layer_scale=True)
    with pytest.raises(WeightsError, match=r"it has no blocks\.0\.ls1\.gamma"):
        load_weights(build_vit(SHAPE), weights_of(build_vit(shape), shape))


def test_mean_pooled_weights_for_the_class_token():
    with pytest.raises(WeightsError, match=r"norm\.weight, norm\.bias; choose mean pooling"):
        load_weights(build_vit(SHAPE, pooling="cls"), weights_of(build_vit(SHAPE)))


def test_nothing_that_matches():
    net = build_vit(SHAPE, classes=5)
    for name in ("model.patch_embed.proj.weight", "head.weight"):
        weights = replace(weights_of(net), tensors={name: torch.zeros(5, 24)})
        with pytest.raises(WeightsError, match=rf"nothing in .*net\.pth matches .*VisionTransformer: they hold {name}"):
            load_weights(net, weights)
