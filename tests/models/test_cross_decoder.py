"""CrossMAE's decoder against NumPy, and the masked autoencoder that is made of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers.config import set_fused_attn, use_fused_attn
from torch import Tensor, nn

from mae_et.engine.precision import Precision, choose_attention
from mae_et.models.cross_decoder import CrossBlock, CrossDecoder
from mae_et.models.mae import MAEOutput, MaskedAutoencoder
from mae_et.models.masking import gather_tokens, mask_noise
from mae_et.ops import patchify, unpatchify
from mae_et.sizes import predicted_patches

# float32 against float64 on numbers of size 1 to 5, up to 4 blocks of a few hundred products: 1e-6 seen.
TOLERANCE = 1e-5

erf = np.vectorize(math.erf)

# (samples, queries, source tokens, width, source width, heads, MLP ratio)
SHAPES = [(1, 1, 2, 4, 8, 1, 4.0), (2, 9, 10, 16, 24, 2, 4.0), (3, 27, 10, 24, 16, 3, 2.5), (2, 49, 50, 32, 48, 4, 1.0)]


def randomise(module: nn.Module, seed: int = 0) -> Any:
    """Every parameter gets values of its own, so that none can be left out or mistaken for another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(centre, 0.2, generator=generator)
    return module


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Reference:
    """A module's parameters in float64, and what is done with them, written out."""

    def __init__(self, module: nn.Module):
        self.values = {name: value.double().numpy() for name, value in module.state_dict().items()}

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.values[f"{name}.weight"].T + self.values[f"{name}.bias"]

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * self.values[f"{name}.weight"] + self.values[f"{name}.bias"]

    def block(self, prefix: str, x: np.ndarray, source: np.ndarray, heads: int) -> np.ndarray:
        if f"{prefix}source_norm.weight" in self.values:
            source = self.norm(f"{prefix}source_norm", source)
        queries = self.linear(f"{prefix}attn.q", self.norm(f"{prefix}norm1", x))
        keys, values = np.split(self.linear(f"{prefix}attn.kv", source), 2, axis=-1)
        read = np.empty_like(queries)
        for part in np.split(np.arange(queries.shape[-1]), heads):
            for n in range(len(x)):
                scores = queries[n][:, part] @ keys[n][:, part].T / math.sqrt(len(part))
                weights = np.exp(scores - scores.max(1, keepdims=True))
                weights /= weights.sum(1, keepdims=True)
                read[n][:, part] = weights @ values[n][:, part]
        x = x + self.linear(f"{prefix}attn.proj", read)
        hidden = self.linear(f"{prefix}mlp.fc1", self.norm(f"{prefix}norm2", x))
        return x + self.linear(f"{prefix}mlp.fc2", hidden * (1 + erf(hidden / math.sqrt(2))) / 2)


@pytest.fixture(params=["fused", "products"])
def _attention(request):
    enabled, experimental = use_fused_attn(), use_fused_attn(experimental=True)
    set_fused_attn(request.param == "fused")
    yield
    set_fused_attn(enabled, experimental)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm_source", [True, False])
@pytest.mark.usefixtures("_attention")
@torch.no_grad()
def test_block_is_what_numpy_makes(shape, norm_source):
    samples, queries, keys, width, source_width, heads, ratio = shape
    block = randomise(CrossBlock(width, source_width, heads, ratio, norm_source))
    x, source = tokens(samples, queries, width), tokens(samples, keys, source_width, seed=2)
    expected = Reference(block).block("", x.double().numpy(), source.double().numpy(), heads)
    assert abs(block(x, source).double().numpy() - expected).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("samples", "predicted", "visible", "depth", "encoder_depth"), [(1, 1, 3, 1, 2), (3, 9, 9, 3, 4)]
)
@pytest.mark.parametrize("inter_block", [True, False])
@torch.no_grad()
def test_decoder_is_what_numpy_makes(samples, predicted, visible, depth, encoder_depth, inter_block):
    decoder = randomise(CrossDecoder(24, encoder_depth, 7, 16, depth, 2, 3.0, inter_block))
    levels = [tokens(samples, 1 + visible, 24, seed=level) for level in range(1 + encoder_depth)]
    positions, ids = tokens(1, 37, 16, seed=50), mask_noise(torch.arange(samples), 36).argsort(dim=1)[:, :predicted]
    reference, place = Reference(decoder), positions[0, 1:].double().numpy()
    given = [level.double().numpy() for level in levels]
    x = reference.values["mask_token"][0] + place[ids.numpy()]
    for number in range(depth):
        source = given[-1]
        if inter_block:
            source = sum(weight * level for weight, level in zip(reference.values["level_weights"][number], given))
        x = reference.block(f"blocks.{number}.", x, np.asarray(source), heads=2)
    expected = reference.linear("head", reference.norm("norm", x))
    assert abs(decoder(levels, positions, ids).double().numpy() - expected).max() <= TOLERANCE


def small(prediction_ratio: float | None = 0.25, **changes: Any) -> MaskedAutoencoder:
    torch.manual_seed(7)
    sizes: dict[str, Any] = {"size": (48, 64), "patch_size": 8, "width": 32, "depth": 3, "heads": 2}
    sizes |= {
        "decoder_width": 16,
        "decoder_depth": 2,
        "decoder_heads": 2,
        "target": "norm_pixel",
        "decoder": "crossmae",
    }
    return MaskedAutoencoder(prediction_ratio=prediction_ratio, **sizes | changes)


def picture_batch(batch: int = 4) -> Tensor:
    return torch.randint(0, 256, (batch, 3, 48, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(11))


def run(model: MaskedAutoencoder, images: Tensor, seeds: Tensor | None = None, predict_all: bool = False) -> MAEOutput:
    seeds = torch.arange(len(images)) if seeds is None else seeds
    return model(images, mask_noise(seeds, 48), 12, predict_all)


@pytest.mark.parametrize(("ratio", "predicted"), [(None, 36), (0.25, 12), (0.01, 1), (0.5, 24), (0.75, 36), (1.0, 36)])
def test_output_says_what_is_predicted(ratio, predicted):
    model, images = small(ratio), picture_batch()
    output = run(model, images)
    assert output.masked_ids.shape == (4, 36)
    assert torch.equal(output.predicted_ids, output.masked_ids[:, :predicted])
    assert output.prediction.shape == output.target.shape == (4, predicted, 192)
    assert torch.equal(output.target, gather_tokens(model.targets(images), output.predicted_ids))
    expected = (output.prediction.double() - output.target.double()).square().mean()
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-6, atol=0)


def test_what_is_predicted_is_a_function_of_the_sample_alone():
    model, images = small(), picture_batch()
    order, seeds = torch.tensor([2, 0, 3, 1]), torch.tensor([5, -3, 2**40, 9])
    expected, output, alone = (
        run(model, images, seeds),
        run(model, images[order], seeds[order]),
        run(model, images[2:3], seeds[2:3]),
    )
    assert torch.equal(output.predicted_ids, expected.predicted_ids[order])
    assert torch.equal(alone.predicted_ids[0], expected.predicted_ids[2])
    assert len({tuple(ids) for ids in expected.predicted_ids.tolist()}) == 4
    # Rows of a product may be added in another order at another place: 1e-7 of values of size 1, over five blocks.
    torch.testing.assert_close(output.prediction, expected.prediction[order], rtol=0, atol=2e-6)
    torch.testing.assert_close(alone.prediction[0], expected.prediction[2], rtol=0, atol=2e-6)


@torch.no_grad()
def test_a_prediction_does_not_depend_on_what_else_is_predicted():
    model, images = randomise(small()), picture_batch()
    some, whole = run(model, images), run(model, images, predict_all=True)
    assert whole.prediction.shape[1] == 36
    assert torch.equal(whole.predicted_ids, whole.masked_ids)
    torch.testing.assert_close(some.prediction, whole.prediction[:, :12], rtol=0, atol=5e-6)


def test_only_predicted_patches_give_gradients():
    model, images = small(), picture_batch(1)
    places = model.decoder_positions((6, 8)).requires_grad_()
    output = run(model, images)
    output.loss.backward()
    assert places.grad is not None
    reached = places.grad[0, 1:].abs().amax(dim=1).nonzero().flatten()
    assert torch.equal(reached, output.predicted_ids[0].sort().values)


@torch.no_grad()
def test_the_loss_sees_visible_and_predicted_patches_only():
    model, images = small(), picture_batch()
    output = run(model, images)

    def loss_without(ids: Tensor) -> Tensor:
        patches = patchify(images, 8)
        at = ids[:, :, None].expand(-1, -1, patches.shape[2])
        return run(model, unpatchify(patches.scatter(1, at, 255 - patches.gather(1, at)), (6, 8), 8, 3)).loss

    assert torch.equal(loss_without(output.masked_ids[:, 12:]), output.loss)
    assert not torch.equal(loss_without(output.predicted_ids[:, :1]), output.loss)
    assert not torch.equal(loss_without(output.visible_ids[:, :1]), output.loss)


@pytest.mark.parametrize("inter_block", [True, False])
@pytest.mark.parametrize("ratio", [None, 0.25])
def test_gradients_reach_every_parameter(inter_block, ratio):
    model = small(ratio, inter_block=inter_block)
    run(model, picture_batch()).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        rows = parameter.grad.flatten(1).abs().amax(1) if parameter.ndim > 1 else parameter.grad.abs().max()
        assert (rows > 0).all(), name


def test_blocks_attend_to_every_level_or_to_the_last():
    assert small().get_parameter("decoder.level_weights").shape == (2, 4)
    assert not [name for name, _ in small(inter_block=False).named_parameters() if "level" in name or "source" in name]


@torch.no_grad()
def test_levels_of_the_encoder_end_in_its_output():
    encoder, images, levels = small().encoder, tokens(2, 3, 48, 64), []
    output = encoder(images, None, levels)
    assert torch.equal(output, encoder(images))
    assert torch.equal(levels[-1], output)
    assert len(levels) == 4
    first, second, third = encoder.blocks
    assert torch.equal(first(levels[0]), levels[1])
    assert torch.equal(second(levels[1]), levels[2])
    assert torch.equal(encoder.norm(third(levels[2])), output)


def test_initialisation():
    model = small(decoder_width=64, decoder_depth=40, depth=12)
    weights = model.get_parameter("decoder.level_weights").detach()
    # 40 x 13 normal values: their mean within 5 deviations of 0, their spread within 5 of 1 / sqrt(13).
    assert abs(float(weights.mean())) <= 5 / math.sqrt(13 * weights.numel())
    assert float(weights.std()) == pytest.approx(1 / math.sqrt(13), rel=5 / math.sqrt(2 * weights.numel()))
    kv = model.get_parameter("decoder.blocks.0.attn.kv.weight").detach()
    bound = math.sqrt(6 / sum(kv.shape))
    assert 0.99 * bound <= float(kv.abs().max()) <= bound
    assert float(model.decoder.mask_token.detach().std()) == pytest.approx(0.02, rel=0.4)


@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_the_choice_of_attention_changes_rounding_only(name):
    model, precision = small(), Precision.choose(name, torch.device("cpu"))
    losses = []
    for _ in range(2):
        with precision.autocast():
            output = run(model, picture_batch())
        assert output.loss.dtype == output.prediction.dtype == torch.float32
        losses.append(output.loss.item())
        choose_attention(model, precision)
    flags = {module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")}
    assert flags == {name == "fp32"}
    # bf16 keeps 8 bits of a product: 0.4 % each, averaged over thousands of outputs.
    assert losses[0] == pytest.approx(losses[1], rel=1e-6 if name == "fp32" else 5e-3)
    assert losses[0] == pytest.approx(run(small(), picture_batch()).loss.item(), rel=5e-3)


def test_a_part_is_predicted_by_this_decoder_alone():
    with pytest.raises(ValueError, match=r"prediction_ratio=0.25 needs the decoder crossmae"):
        small(0.25, decoder="mae")


@pytest.mark.parametrize(
    ("count", "visible", "ratio", "predicted"),
    [
        # CrossMAE's released code at a mask ratio of 0.75: L - int(L / 4) - int(L * (0.75 - ratio)).
        *((196, 49, 0.25, 49), (100, 25, 0.25, 25), (36, 9, 0.25, 9), (10, 2, 0.25, 3), (196, 49, 0.75, 147)),
        # In floating point 100 * 0.07 is above 7.
        *((100, 25, 0.07, 7), (36, 9, None, 27), (36, 30, 0.5, 6), (36, 9, 1e-9, 1)),
    ],
)
def test_predicted_patches(count, visible, ratio, predicted):
    assert predicted_patches(count, visible, ratio) == predicted


# Made before there was a choice of decoders. Their bits were the same then; other processors add in another order,
# so 1e-5 here, where another draw or another step of the computation shows at 1e-2.
@pytest.mark.parametrize(
    ("target", "loss", "prediction", "gradient", "squares"),
    [
        ("hog", 0.33941179513931274, [0.2823412, -0.1244701, -0.3614560], 0.015886051580309868, 888.8752226014159),
        ("norm_pixel", 1.146308422088623, [0.3141600, 0.0500447, 0.0624861], 0.005903816316276789, 892.9213886075555),
    ],
)
def test_the_default_decoder_is_untouched(target, loss, prediction, gradient, squares):
    torch.manual_seed(7)
    model = MaskedAutoencoder((48, 64), 8, 3, 32, 2, 2, 4.0, 16, 2, 2, target)
    total = sum(p.detach().double().square().sum().item() for p in model.parameters())
    assert total == pytest.approx(squares, rel=1e-6)
    output = run(model, picture_batch())
    output.loss.backward()
    assert output.loss.item() == pytest.approx(loss, rel=1e-5)
    assert output.prediction[1, 2, :3].tolist() == pytest.approx(prediction, abs=1e-5)
    reached = model.get_parameter("encoder.blocks.0.attn.qkv.weight").grad
    assert reached is not None
    assert reached.norm().item() == pytest.approx(gradient, rel=1e-4)
    assert torch.equal(output.predicted_ids, output.masked_ids)
