"""The encoder against timm's VisionTransformer: the same keys, the same weights, the same features."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae_et.models.encoder import Encoder
from mae_et.models.posembed import sincos_positions
from mae_et.sizes import ENCODER_SIZES

# timm's convolution and our product of flattened patches add in another order: 1e-7 on tokens of size 1, which 12
# blocks carry on. The features come out of a LayerNorm, so are of size 1 to 5; 3e-6 seen.
TOLERANCE = 2e-5

RECTANGLE: dict[str, Any] = {"patch_size": 14, "depth": 3, "mlp_ratio": 3.0}


@pytest.fixture(scope="module", params=["vit_tiny", "vit_small", "rectangle"])
def pair(request) -> tuple[Encoder, VisionTransformer]:
    """Ours and timm's model of one size."""
    if request.param == "rectangle":
        ours = Encoder(size=(28, 70), channels=5, width=48, heads=3, **RECTANGLE)
        twin = VisionTransformer((28, 70), in_chans=5, embed_dim=48, num_heads=3, num_classes=0, **RECTANGLE)
    else:
        pixels = {"vit_tiny": 160, "vit_small": 64}[request.param]
        ours = Encoder((pixels, pixels), **ENCODER_SIZES[request.param]._asdict())
        name = f"{request.param}_patch16_224"
        twin = timm.create_model(name, num_classes=0, img_size=pixels, weight_init="skip")
        assert isinstance(twin, VisionTransformer)
    return ours, twin.eval()


def randomise(module: Any, seed: int) -> Any:
    """Give every parameter values of its own, so that none can be left out or mistaken for another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(centre, 0.05, generator=generator)
    return module


def pictures(model: Encoder, size: tuple[int, int] | None = None, batch: int = 2) -> torch.Tensor:
    channels = model.patch_embed.proj.in_channels
    return torch.randn(batch, channels, *(size or model.size), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_weights_go_to_timm(pair):
    ours, twin = randomise(pair[0], 1), pair[1]
    twin.load_state_dict(ours.state_dict(), strict=True)
    images = pictures(ours)
    torch.testing.assert_close(ours(images), twin.forward_features(images), rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_weights_come_from_timm(pair):
    ours, twin = pair[0], randomise(pair[1], 2)
    images = pictures(ours)
    before = ours(images)
    ours.load_state_dict(twin.state_dict(), strict=True)
    expected = twin.forward_features(images)
    torch.testing.assert_close(ours(images), expected, rtol=0, atol=TOLERANCE)
    assert (before - expected).abs().max() > 0.1


@pytest.mark.parametrize("size", [(96, 96), (160, 160), (64, 112)])
@torch.no_grad()
def test_other_grids_equal_timm_models_of_that_size(size):
    ours = randomise(Encoder((224, 224), width=48, depth=3, heads=3), 4)
    twin = VisionTransformer(size, embed_dim=48, depth=3, num_heads=3, num_classes=0).eval()
    grid = (size[0] // 16, size[1] // 16)
    twin.load_state_dict(ours.state_dict() | {"pos_embed": sincos_positions(grid, 48, (14, 14))[None]}, strict=True)
    images = pictures(ours, size)
    torch.testing.assert_close(ours(images), twin.forward_features(images), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["from_final", "native", "interp"])
def test_kind_of_positions(kind):
    model = Encoder((64, 96), width=16, depth=1, heads=2, positions=kind)
    for grid in [(4, 6), (2, 3), (6, 4), (2, 3)]:
        assert torch.equal(model.positions_for(grid)[0], sincos_positions(grid, 16, (4, 6), kind))


@pytest.mark.parametrize("size", [(64, 64), (32, 80)])
@torch.no_grad()
def test_visible_patches_are_all_that_the_blocks_see(size):
    model = randomise(Encoder((64, 64), width=48, depth=3, heads=3), 5)
    twin = VisionTransformer(size, embed_dim=48, depth=3, num_heads=3, num_classes=0).eval()
    positions = model.positions_for((size[0] // 16, size[1] // 16))
    twin.load_state_dict(model.state_dict() | {"pos_embed": positions})
    images = pictures(model, size, batch=3)
    ids = torch.tensor([[7, 0, 3], [1, 2, 8], [9, 5, 4]])

    tokens = twin.patch_embed(images) + positions[:, 1:]
    cls = (twin.cls_token + positions[:, :1])[0]
    chosen = torch.stack([torch.cat([cls, image[row]]) for image, row in zip(tokens, ids)])
    expected = twin.norm(twin.blocks(chosen))
    torch.testing.assert_close(model(images, ids), expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_all_patches_in_any_order_are_the_whole_image():
    model = randomise(Encoder((64, 64), width=48, depth=3, heads=3), 6)
    images = pictures(model)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    features = model(images, order.expand(2, -1))
    whole = model(images)
    torch.testing.assert_close(features[:, 1:], whole[:, 1:][:, order], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(features[:, 0], whole[:, 0], rtol=0, atol=TOLERANCE)


def test_positions_are_no_parameters_and_follow_the_dtype():
    model = Encoder((64, 64), width=16, depth=1, heads=2)
    assert "pos_embed" not in dict(model.named_parameters())
    model(torch.zeros(1, 3, 32, 32))
    for dtype in (torch.bfloat16, torch.float64):
        model.to(dtype)
        for side in (32, 64):
            assert model(torch.zeros(1, 3, side, side, dtype=dtype)).dtype == dtype


def test_positions_made_for_scoring_serve_training():
    model = Encoder((64, 64), width=16, depth=1, heads=2)
    with torch.inference_mode():
        model(torch.zeros(1, 3, 32, 32))
    model(torch.rand(1, 3, 32, 32)).square().sum().backward()
    assert isinstance(model.cls_token, nn.Parameter)
    assert model.cls_token.grad is not None


@pytest.mark.parametrize("size", [(64, 60), (70, 64), (8, 64)])
def test_sizes_that_the_patch_does_not_divide_are_refused(size):
    with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]} do not divide into patches of 16 px"):
        Encoder((64, 64), width=16, depth=1, heads=2)(torch.zeros(1, 3, *size))


def test_other_channels_do_not_pass_unseen():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Encoder((64, 64), width=16, depth=1, heads=2)(torch.zeros(1, 1, 64, 64))
