"""The masked autoencoder as a whole: what its loss depends on, its gradients, its initialisation and its size."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers.attention import Attention
from torch import nn

from mae_et.models.encoder import Encoder
from mae_et.models.mae import MAEOutput, MaskedAutoencoder
from mae_et.models.masking import gather_tokens, mask_noise
from mae_et.models.normalised import IMAGENET_MEAN, IMAGENET_STD
from mae_et.models.posembed import sincos_positions
from mae_et.ops import hog_targets, patchify, unpatchify
from mae_et.sizes import ENCODER_SIZES

TARGETS = ["hog", "pixel", "norm_pixel"]
PIXELS = ["pixel", "norm_pixel"]

# (channels, H, W) of the input; the final size is 48 x 64.
INPUTS = [(3, 48, 64), (1, 32, 32), (5, 16, 56)]


def small(target: str = "hog", channels: int = 3, **changes: Any) -> MaskedAutoencoder:
    torch.manual_seed(7)
    sizes: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2}
    sizes |= {"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2, "patch_size": 8, "size": (48, 64)}
    return MaskedAutoencoder(channels=channels, target=target, **sizes | changes)  # pyright: ignore[reportArgumentType]


def picture_batch(channels: int = 3, height: int = 48, width: int = 64, batch: int = 4) -> torch.Tensor:
    shape = (batch, channels, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(11))


def run(model: MaskedAutoencoder, images: torch.Tensor, seeds: torch.Tensor | None = None) -> MAEOutput:
    tokens = images.shape[2] * images.shape[3] // model.patch_size**2
    seeds = torch.arange(len(images)) if seeds is None else seeds
    return model(images, mask_noise(seeds, tokens), tokens // 4)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("channels", "height", "width"), INPUTS)
def test_output(target, channels, height, width):
    model, images = small(target, channels), picture_batch(channels, height, width)
    output = run(model, images)
    tokens = height * width // 64
    values = channels * (9 * 4 if target == "hog" else 64)
    assert output.visible_ids.shape == (4, tokens // 4)
    assert output.masked_ids.shape == (4, tokens - tokens // 4)
    assert output.prediction.shape == output.target.shape == (*output.masked_ids.shape, values)
    assert torch.equal(output.target, gather_tokens(model.targets(images), output.masked_ids))
    # Float64 once more: a mean over up to 30,000 squares in float32 is right to 1e-6.
    expected = (output.prediction.double() - output.target.double()).square().mean()
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("channels", "height", "width"), INPUTS)
def test_gradients_reach_every_parameter(target, channels, height, width):
    model = small(target, channels)
    run(model, picture_batch(channels, height, width)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        # Row by row in matrices. Not in biases: softmax cancels the keys' part of the bias of `qkv`.
        rows = parameter.grad.flatten(1).abs().amax(1) if parameter.ndim > 1 else parameter.grad.abs().max()
        assert (rows > 0).all(), name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("channels", "height", "width"), INPUTS)
@torch.no_grad()
def test_order_of_the_batch_orders_the_output(target, channels, height, width):
    model, images = small(target, channels), picture_batch(channels, height, width)
    order, seeds = torch.tensor([2, 0, 3, 1]), torch.tensor([5, -3, 2**40, 9])
    expected, output = run(model, images, seeds), run(model, images[order], seeds[order])
    for name in ("visible_ids", "masked_ids", "target"):
        assert torch.equal(getattr(output, name), getattr(expected, name)[order]), name
    # Rows of a product may be added in another order at another place: 1e-7 of values of size 1, over four blocks.
    torch.testing.assert_close(output.prediction, expected.prediction[order], rtol=0, atol=2e-6)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-6, atol=0)
    alone = run(model, images[2:3], seeds[2:3])
    assert torch.equal(alone.masked_ids[0], expected.masked_ids[2])
    torch.testing.assert_close(alone.prediction[0], expected.prediction[2], rtol=0, atol=2e-6)


@torch.no_grad()
def test_predictions_see_visible_patches_only():
    model, images = small(), picture_batch()
    output = run(model, images)
    patches = patchify(images, 8)
    at = output.masked_ids[:, :, None].expand(-1, -1, patches.shape[2])
    hidden = unpatchify(patches.scatter(1, at, 255 - patches.gather(1, at)), (6, 8), 8, 3)
    assert torch.equal(run(model, hidden).prediction, output.prediction)
    # One pixel of one visible patch is enough to change every prediction for that image.
    row, column = divmod(int(output.visible_ids[1, 0]), 8)
    images[1, 0, row * 8 + 3, column * 8 + 5] ^= 255
    changed = (run(model, images).prediction != output.prediction).any(dim=2)
    assert changed.tolist() == [[image == 1] * changed.shape[1] for image in range(4)]


@pytest.mark.parametrize("target", PIXELS)
@pytest.mark.parametrize("channels", [1, 3])
@torch.no_grad()
def test_uint8_and_unit_floats_give_one_pixel_loss(target, channels):
    model, images = small(target, channels), picture_batch(channels)
    expected = run(model, images)
    assert torch.equal(run(model, images.float() / 255).loss, expected.loss)
    # Rounded twice, pixels differ by 6e-8, which normalising makes 3e-7 of values of size 1.
    output = run(model, images.double() / 255)
    torch.testing.assert_close(output.target, expected.target, rtol=0, atol=5e-6)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-6, atol=0)


@torch.no_grad()
def test_hog_is_exact_on_uint8_and_unrounded_on_floats():
    model, images = small(), picture_batch()
    floats = images.float() / 255
    exact, unrounded = run(model, images), run(model, floats)
    assert torch.equal(exact.target, gather_tokens(hog_targets(images, 8, 4, 9), exact.masked_ids))
    assert torch.equal(unrounded.target, gather_tokens(hog_targets(floats, 8, 4, 9), exact.masked_ids))
    assert torch.equal(exact.prediction, unrounded.prediction)
    # Gradients of 0 become rounding noise in floats, whose bin is another one: rare in noise, common in flat photos.
    assert 0 < (exact.target - unrounded.target).abs().gt(1e-3).double().mean() < 0.05


def test_compiled_targets_are_the_same_from_one_graph(monkeypatch):
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    model = small()
    batches = [picture_batch(height=side, width=side) for side in (16, 48, 32)]
    expected = [model.targets(images) for images in batches]
    model.compile_targets()
    for images, targets in zip(batches, expected):
        torch.testing.assert_close(model.targets(images), targets)
    assert len(graphs) == 1


@pytest.mark.parametrize(("cell", "bins"), [(2, 9), (8, 12)])
def test_cell_and_bins_are_those_of_the_model(cell, bins):
    model, images = small(cell=cell, bins=bins), picture_batch()
    assert torch.equal(model.targets(images), hog_targets(images, 8, cell, bins))
    assert run(model, images).prediction.shape[2] == 3 * bins * (8 // cell) ** 2


@pytest.mark.parametrize("kind", ["from_final", "native", "interp"])
def test_positions_of_the_decoder_are_of_the_same_kind(kind):
    model = small(positions=kind)
    for grid in [(6, 8), (2, 3), (8, 6), (2, 3)]:
        assert torch.equal(model.decoder_positions(grid)[0], sincos_positions(grid, 16, (6, 8), kind))


@pytest.mark.parametrize("target", TARGETS)
def test_pixel_statistics(target):
    model, images = small(target), picture_batch(height=16, width=16)
    assert model.mean.flatten().tolist() == pytest.approx(IMAGENET_MEAN)
    assert model.std.flatten().tolist() == pytest.approx(IMAGENET_STD)
    other = small(target, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    pixels = images.double().numpy() / 255
    for channel, (mean, std) in enumerate(zip((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))):
        expected = (pixels[:, channel] - mean) / std
        # Values up to 1.8, rounded four times.
        assert abs(other.normalise(images)[:, channel].double().numpy() - expected).max() <= 5e-7
    # The HOG of integers has no use for them.
    same = torch.equal(other.targets(images), model.targets(images))
    assert same == (target == "hog")


@pytest.mark.parametrize("channels", [1, 5])
def test_pixel_statistics_of_other_channels(channels):
    white, black = torch.ones(1, channels, 16, 16), torch.zeros(1, channels, 16, 16)
    model = small(channels=channels)
    assert torch.equal(model.normalise(white), 2 * white)
    assert torch.equal(model.normalise(black), -2 * white)


@pytest.mark.parametrize("target", TARGETS)
def test_loss_and_target_stay_in_float32_under_autocast(target):
    model, images = small(target), picture_batch()
    expected = run(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        output = run(model, images)
        assert model.decoder.head(torch.zeros(1, 16)).dtype == torch.bfloat16
    assert output.loss.dtype == output.prediction.dtype == output.target.dtype == torch.float32
    assert torch.equal(output.target, expected.target)
    assert torch.equal(output.loss, (output.prediction - output.target).square().mean())
    # bfloat16 has 8 bits, 0.4 % of a value; errors of many predictions average out in the loss.
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-3, atol=0)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def check_xavier(weight: torch.Tensor, name: str) -> None:
    """Uniform in +-sqrt(6 / (in + out)): inside, close to the edge, of the right spread."""
    rows = weight.detach().flatten(1)
    bound = math.sqrt(6 / sum(rows.shape))
    assert rows.abs().max() <= bound, name
    # All of n values fall short of 1 - 20 / n of the bound by a chance of e^-20.
    assert rows.abs().max() >= (1 - 20 / rows.numel()) * bound, name
    # Squares of a uniform number have mean 1/3 and variance 4/45 of the bound's square: 5 sigma.
    mean_square = float((rows / bound).square().mean())
    assert abs(mean_square - 1 / 3) <= 5 * math.sqrt(4 / 45 / rows.numel()), name


@pytest.mark.parametrize("channels", [1, 3])
def test_initialisation_is_that_of_mae(channels):
    model = small(channels=channels, width=128, heads=4, decoder_width=64)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            check_xavier(module.weight, name)
            assert module.bias is not None
            assert (module.bias == 0).all(), name
        elif isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name


def test_tokens_start_with_a_spread_of_two_hundredths():
    torch.manual_seed(0)
    model = MaskedAutoencoder((32, 32), width=1024, depth=1, heads=4, decoder_width=1024, decoder_depth=1)
    for token in (model.encoder.cls_token.detach(), model.decoder.mask_token.detach()):
        # 1024 values: sigma of their mean 0.02 / 32, of their spread 0.02 / sqrt(2048); 4 of them.
        assert abs(float(token.mean())) <= 4 * 0.02 / 32
        assert abs(float(token.std()) - 0.02) <= 4 * 0.02 / math.sqrt(2048)


def test_reset_starts_anew():
    model = small()
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    torch.manual_seed(1)
    model.reset_parameters()
    again = model.state_dict()
    assert all(torch.equal(again[name], value) for name, value in initial.items() if value.ndim == 1)
    assert float(again["encoder.cls_token"].detach().abs().max()) < 0.2
    torch.manual_seed(1)
    model.reset_parameters()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_encoder_has_the_keys_of_timm():
    twin = timm.create_model("vit_tiny_patch16_224", num_classes=0, weight_init="skip")
    with torch.device("meta"):
        ours = MaskedAutoencoder(**ENCODER_SIZES["vit_tiny"]._asdict()).encoder
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    assert shapes == {name: value.shape for name, value in twin.state_dict().items()}


# Parameters of timm's models without a classifier, positions included: those of the papers (5.7, 22, 86, 304, 632 M)
# less a head of 1000 (D + 1).
@pytest.mark.parametrize(
    ("name", "patch_size", "expected"),
    [
        ("vit_tiny", 16, 5_524_416),
        ("vit_small", 16, 21_665_664),
        ("vit_base", 16, 85_798_656),
        ("vit_large", 16, 303_301_632),
        ("vit_huge", 14, 630_764_800),
    ],
)
def test_sizes_of_encoders(name, patch_size, expected):
    with torch.device("meta"):
        ours = Encoder(patch_size=patch_size, **ENCODER_SIZES[name]._asdict())
        twin = timm.create_model(f"{name}_patch{patch_size}_224", num_classes=0, weight_init="skip")
    assert sum(p.numel() for p in twin.parameters()) == expected
    assert sum(p.numel() for p in ours.parameters()) + ours.pos_embed.numel() == expected
    # Heads cost no parameters.
    heads = {module.num_heads for module in twin.modules() if isinstance(module, Attention)}
    assert heads == {ENCODER_SIZES[name].heads}


def test_mistakes_are_refused():
    model, images = small(), picture_batch()
    noise = mask_noise(torch.arange(4), 48)
    with pytest.raises(ValueError, match=r"noise of shape \(4, 47\) for 4 images of \(6, 8\) patches"):
        model(images, noise[:, 1:], 12)
    with pytest.raises(ValueError, match=r"noise of shape \(3, 48\)"):
        model(images, noise[1:], 12)
    for visible in (0, 48, 49):
        with pytest.raises(ValueError, match=rf"{visible} of 48 patches visible.*another mask ratio"):
            model(images, noise, visible)
    with pytest.raises(ValueError, match="48x60 do not divide into patches of 8 px"):
        model(images[..., :60], noise[:, :42], 12)


@pytest.mark.parametrize("target", TARGETS)
def test_images_of_other_channels_are_refused(target):
    with pytest.raises(ValueError, match=r"images of 1 channels for a model of 3.*channels=1"):
        run(small(target), picture_batch(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "sift"}, "unknown target 'sift'; known: hog, pixel, norm_pixel"),
        ({"positions": "learned"}, "unknown kind of positions 'learned'"),
        ({"size": (48, 60)}, r"patch of 8 px does not divide the final size \(48, 60\)"),
        ({"cell": 3}, "patch_size 8 is not a multiple of cell 3"),
        ({"cell": 0}, "patch_size 8 is not a multiple of cell 0"),
        ({"patch_size": 1}, "patch_size 1 is not a multiple of cell 0"),
        ({"mean": (0.5,)}, "one number for each of 3 channels"),
        ({"channels": 1, "std": (0.2, 0.2, 0.2)}, "one number for each of 1 channels"),
        ({"width": 30}, "multiple of 4; got 30"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)
