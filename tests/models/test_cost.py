"""The cost model against the matrix products that torch counts on the real model."""

from __future__ import annotations

import pytest
import torch
from timm.layers.config import set_fused_attn, use_fused_attn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mae_et.curriculum.cost import (
    TRAINING_FLOPS_PER_MULTIPLY_ADD,
    CrossDecoderShape,
    Geometry,
    MAECost,
    TransformerShape,
)
from mae_et.curriculum.stage import visible_tokens
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.masking import mask_noise
from mae_et.sizes import ENCODER_SIZES, target_values

# name: final side, patch, channels, (width, depth, heads), decoder's, MLP ratio
MODELS = {
    "96 wide": (28, 2, 1, (96, 6, 4), (64, 2, 4), 4.0),
    "patch 14": (70, 14, 5, (48, 2, 3), (32, 3, 2), 2.5),
    "vit_tiny": (224, 16, 3, ENCODER_SIZES["vit_tiny"], (512, 8, 16), 4.0),
    "vit_base": (224, 16, 3, ENCODER_SIZES["vit_base"], (512, 8, 16), 4.0),
}


@pytest.fixture(autouse=True)
def _attention_as_products():
    """The counter misses a part of fused attention on a CPU; the model is built without it."""
    enabled, experimental = use_fused_attn(), use_fused_attn(experimental=True)
    set_fused_attn(False)
    yield
    set_fused_attn(enabled, experimental)


def build(name: str, target: str) -> tuple[MaskedAutoencoder, MAECost]:
    side, patch, channels, encoder, decoder, ratio = MODELS[name]
    model = MaskedAutoencoder(
        *((side, side), patch, channels, *encoder, ratio, *decoder),
        target=target,  # pyright: ignore[reportArgumentType]
    )
    values = target_values(model.target, patch, channels)
    shapes = (TransformerShape(width, depth, ratio) for width, depth, _ in (encoder, decoder))
    return model, MAECost(*shapes, patch_values=channels * patch**2, target_values=values)


def build_cross(name: str, inter_block: bool, prediction_ratio: float | None) -> tuple[MaskedAutoencoder, MAECost]:
    side, patch, channels, encoder, decoder, ratio = MODELS[name]
    model = MaskedAutoencoder(
        *((side, side), patch, channels, *encoder, ratio, *decoder),
        decoder="crossmae",
        inter_block=inter_block,
        prediction_ratio=prediction_ratio,
    )
    shape = CrossDecoderShape(decoder[0], decoder[1], ratio, inter_block)
    values = target_values("hog", patch, channels)
    cost = MAECost(
        TransformerShape(encoder[0], encoder[1], ratio), shape, channels * patch**2, values, prediction_ratio
    )
    return model, cost


def geometry_of(model: MaskedAutoencoder, size: tuple[int, int], ratio: float) -> Geometry:
    tokens = size[0] * size[1] // model.patch_size**2
    return Geometry(size, tokens, visible_tokens(tokens, ratio))


def counted(model: MaskedAutoencoder, geometry: Geometry, batch: int, backward: bool = False) -> int:
    """FLOPs of the products in one pass; the counter takes a multiply-add for two."""
    images = torch.zeros(batch, model.channels, *geometry.bandwidth, dtype=torch.uint8)
    noise = mask_noise(torch.arange(batch), geometry.tokens)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        loss = model(images, noise, geometry.visible).loss
        if backward:
            loss.backward()
    return counter.get_total_flops()


# What the model multiplies is what the formula counts, so the tolerance is zero: one missing product would show.
@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("96 wide", (side, side)) for side in (12, 20, 28)),
        ("patch 14", (28, 70)),
        ("patch 14", (98, 14)),
    ],
)
@pytest.mark.parametrize("target", ["hog", "pixel"])
def test_forward_takes_the_multiply_adds_of_the_cost_model(name, size, target):
    model, cost = build(name, target)
    geometry = geometry_of(model, size, 0.75)
    assert counted(model, geometry, batch=1) == 2 * cost(geometry)


@pytest.mark.parametrize(
    ("name", "size"),
    [*(("vit_tiny", (side, side)) for side in (96, 160, 224)), ("vit_tiny", (64, 160)), ("vit_base", (160, 160))],
)
def test_forward_of_large_models(name, size):
    # Tensors without data: the same operations on the same shapes, and none of their time.
    with FakeTensorMode():
        model, cost = build(name, "hog")
        geometry = geometry_of(model, size, 0.75)
        assert counted(model, geometry, batch=1) == 2 * cost(geometry)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
def test_other_mask_ratios(ratio):
    model, cost = build("patch 14", "norm_pixel")
    geometry = geometry_of(model, (70, 70), ratio)
    assert counted(model, geometry, batch=3) == 3 * 2 * cost(geometry)


@pytest.mark.parametrize(("name", "side"), [("96 wide", 20), ("patch 14", 70)])
def test_training_takes_three_forwards(name, side):
    model, cost = build(name, "hog")
    geometry = geometry_of(model, (side, side), 0.75)
    # Images need no gradient: of all products in the backward pass only that one is not made.
    images_gradient = 2 * geometry.visible * cost.patch_values * cost.encoder.width
    full = TRAINING_FLOPS_PER_MULTIPLY_ADD * cost(geometry)
    assert counted(model, geometry, batch=1, backward=True) == full - images_gradient


@pytest.mark.parametrize("inter_block", [True, False])
@pytest.mark.parametrize("prediction_ratio", [None, 0.1, 0.25, 0.9])
@pytest.mark.parametrize(
    ("name", "size", "ratio"),
    [
        ("96 wide", (12, 12), 0.75),
        ("96 wide", (28, 28), 0.75),
        ("patch 14", (28, 70), 0.5),
        ("patch 14", (98, 14), 0.3),
    ],
)
def test_cross_attention_and_what_it_predicts(name, size, ratio, prediction_ratio, inter_block):
    model, cost = build_cross(name, inter_block, prediction_ratio)
    geometry = geometry_of(model, size, ratio)
    assert counted(model, geometry, batch=2) == 2 * 2 * cost(geometry)


@pytest.mark.parametrize("inter_block", [True, False])
@pytest.mark.parametrize("side", [96, 224])
def test_cross_attention_of_large_models(side, inter_block):
    with FakeTensorMode():
        model, cost = build_cross("vit_base", inter_block, 0.25)
        geometry = geometry_of(model, (side, side), 0.75)
        assert counted(model, geometry, batch=1) == 2 * cost(geometry)


@pytest.mark.parametrize("inter_block", [True, False])
def test_training_with_cross_attention_takes_three_forwards(inter_block):
    model, cost = build_cross("patch 14", inter_block, 0.25)
    geometry = geometry_of(model, (70, 70), 0.75)
    images_gradient = 2 * geometry.visible * cost.patch_values * cost.encoder.width
    full = TRAINING_FLOPS_PER_MULTIPLY_ADD * cost(geometry)
    assert counted(model, geometry, batch=1, backward=True) == full - images_gradient
