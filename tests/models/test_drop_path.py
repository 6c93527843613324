"""What drop path drops: by whom it is decided, how much, and that only the sample counts."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers.drop import DropPath
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mae_et.models.backbones import build_backbone
from mae_et.models.classifier import Classifier
from mae_et.models.drop_path import MAX_CALLS, SampleDraws, SampleDropPath
from mae_et.models.vit import ViTShape, build_vit

RATES = (0.0, 0.1, 0.35, 0.6)


def paths(*rates: float, scale_by_keep: bool = True) -> nn.Sequential:
    return nn.Sequential(*(DropPath(rate, scale_by_keep) for rate in rates))


def mix64(value: int) -> int:
    """SplitMix64's finaliser, in Python's integers."""
    mask = (1 << 64) - 1
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & mask
    return value ^ value >> 31


def test_factors_are_those_of_the_seeds_stream():
    seeds = [0, 1, 2**62 + 12345, 2**63 - 1]
    found = SampleDraws(paths(*RATES)).factors(torch.tensor(seeds))
    assert found.shape == (len(RATES), MAX_CALLS, len(seeds))
    for module, rate in enumerate(RATES):
        for call in range(MAX_CALLS):
            for sample, seed in enumerate(seeds):
                counter = call * len(RATES) + module + 1
                uniform = mix64((seed + counter * 0x9E3779B97F4A7C15) % 2**64) / 2**64
                expected = 1 / (1 - rate) if uniform < 1 - rate else 0
                assert found[module, call, sample].item() == pytest.approx(expected, rel=1e-6)


def test_branches_are_dropped_at_their_rate_and_independently():
    """Also for seeds that count up, as those of no run do."""
    samples = 40_000
    kept = SampleDraws(paths(*RATES)).factors(torch.arange(samples)).numpy()[:, :2] > 0
    assert kept[0].all()
    for rate, of_rate in zip(RATES, kept):
        # Five deviations of a binomial share: one draw in a million leaves them.
        assert np.abs(of_rate.mean(axis=-1) - (1 - rate)).max() <= 5 * (rate * (1 - rate) / samples) ** 0.5
    streams = kept[1:].reshape(-1, samples).astype(np.float64)
    # Between modules and calls; and of each stream with that of samples nearby. A correlation of independent draws
    # deviates by one over the root of their number.
    correlation = np.corrcoef(streams) - np.eye(len(streams))
    shifted = [np.corrcoef(stream[:-lag], stream[lag:])[0, 1] for stream in streams for lag in (1, 2, 8)]
    assert max(np.abs(correlation).max(), np.abs(shifted).max()) < 5 / samples**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale_by_keep", [True, False])
@pytest.mark.parametrize("shape", [(16, 3), (16, 2, 5, 4)])
def test_it_is_timms_formula_for_the_same_mask(monkeypatch, dtype, scale_by_keep, shape):
    net = paths(0.35, scale_by_keep=scale_by_keep).train()
    theirs = copy.deepcopy(net)
    draws = SampleDraws(net)
    draws.hand_out(torch.arange(16))
    mask = draws.factors(torch.arange(16))[0, 0] > 0
    assert 0 < mask.sum() < 16
    monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda tensor, _keep: tensor.copy_(mask.view(tensor.shape)))
    x = torch.randn(shape, dtype=dtype).requires_grad_()
    weight = torch.randn(shape, dtype=dtype)
    outputs = [module(x) for module in (net, theirs)]
    gradients = [torch.autograd.grad((output * weight).sum(), x)[0] for output in outputs]
    assert outputs[0].dtype == dtype
    # In fp64 the factor 1 / 0.65 is that of fp32.
    tolerance = 1e-7 if dtype == torch.float64 else 0
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=0)
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=0)


def test_each_call_of_one_module_has_a_draw_of_its_own():
    net = paths(0.5).train()
    draws = SampleDraws(net)
    draws.hand_out(torch.arange(32))
    ones = torch.ones(32, 1)
    calls = [net(ones)[:, 0] for _ in range(MAX_CALLS)]
    assert torch.equal(torch.stack(calls), draws.factors(torch.arange(32))[0])
    assert len({tuple(call.tolist()) for call in calls}) == MAX_CALLS
    with pytest.raises(AssertionError, match="more than 8 times"):
        net(ones)
    draws.rewind()
    assert torch.equal(net(ones)[:, 0], calls[0])
    draws.hand_out(None)
    assert net(ones) is ones


def test_parts_of_a_sample_are_dropped_together():
    net = paths(0.5).train()
    draws = SampleDraws(net)
    draws.hand_out(torch.arange(8))
    expected = draws.factors(torch.arange(8))[0, 0]
    assert torch.equal(net(torch.ones(24, 2))[:, 0].view(8, 3), expected[:, None].expand(8, 3))
    with pytest.raises(AssertionError, match="9 rows are no parts of 8 samples"):
        net(torch.ones(9, 2))


VIT = {"depth": 3, "embed_dim": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "deit_tiny_patch16_224": VIT,
    "resnet18": {"base_width": 64},
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32)},
    "swin_tiny_patch4_window7_224": {"depths": (2, 2, 2, 2), "embed_dim": 12},
    "pvt_v2_b0": {"depths": (1, 1, 2, 2), "embed_dims": (8, 16, 40, 64)},
    "caformer_s18": {},
    "convit_tiny": {"depth": 2, "embed_dim": 24, "local_up_to_layer": 1},  # each module called twice
    "coat_mini": {"serial_depths": (1, 1, 1, 1), "parallel_depth": 2, "embed_dims": (8, 24, 24, 24)},  # six times
    "mobilevit_xxs": {},  # patches of an image as so many rows
    "tnt_s_patch16_224": {"depth": 2},  # both
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sample_loses_the_same_branches_in_every_batch(name):
    torch.manual_seed(0)
    side = 224 if name.startswith(("convit", "coat", "tnt")) else 64
    arguments = FAMILIES[name]
    net = build_backbone(name, classes=5, size=(side, side), channels=3, drop_path=0.6, arguments=arguments)
    for module in net.modules():
        for scale in ("gamma", "weight"):
            # Layer scale and norms of residual branches start at or near 0, where nothing dropped would be seen.
            values = getattr(module, scale, None)
            if isinstance(values, nn.Parameter) and values.ndim <= 1:
                nn.init.ones_(values)
    model = Classifier(net, (0.5,) * 3, (0.25,) * 3).train()
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.eval()  # its statistics are of a batch
    assert any(isinstance(module, SampleDropPath) for module in net.modules())
    images, seeds = torch.rand(4, 3, side, side), torch.tensor([5, 6, 7, 8]) * 10**15
    with torch.no_grad():
        together = model(images, seeds)
        halves = torch.cat([model(images[:2], seeds[:2]), model(images[2:], seeds[2:])])
        others = model(images, seeds + 1)
    # fp32 sums in another order, through normalised layers.
    scale = together.abs().max().item()
    torch.testing.assert_close(together, halves, rtol=0, atol=1e-4 * scale)
    assert (together - others).abs().max() > 1e-2 * scale


def vit(depth: int = 4) -> Any:
    torch.manual_seed(0)
    return build_vit(ViTShape((16, 16), 4, 3, width=16, depth=depth, heads=2), classes=5, drop_path=0.5)


@pytest.mark.parametrize("name", ["vit", "cait"])
def test_recomputed_activations_drop_the_same(name):
    """CaiT calls each module twice."""
    gradients = []
    for recompute in (False, True):
        small = {"depth": 3, "embed_dim": 24, "num_heads": 2, "img_size": 32, "init_values": 1.0, "num_classes": 5}
        net: Any = vit() if name == "vit" else timm.create_model("cait_xxs24_224", drop_path_rate=0.5, **small)
        torch.manual_seed(1)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.2)
        net.set_grad_checkpointing(recompute)
        model = Classifier(net, (0.5,) * 3, (0.25,) * 3).train()
        model(torch.rand(6, 3, *((16, 16) if name == "vit" else (32, 32))), torch.arange(6)).square().sum().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients))


def test_a_copy_draws_for_its_own_network():
    model = Classifier(vit(), (0.5,) * 3, (0.25,) * 3).train()
    images, seeds = torch.rand(4, 3, 16, 16), torch.arange(4)
    model(images, seeds)
    other = copy.deepcopy(model)
    theirs = [module.factors for module in other.draws.paths]
    assert torch.equal(model(images, seeds + 4), other(images, seeds + 4))
    inside = {id(module) for module in other.net.modules()}
    assert all(id(module) in inside for module in other.draws.paths)
    assert not any(now.factors is before for now, before in zip(other.draws.paths, theirs))


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own affairs
def test_compiled_blocks_share_graphs_and_see_each_steps_draws():
    """timm's rate is another constant in each block: torch compiles each anew, and after eight no more."""
    torch._dynamo.reset()
    graphs = []

    def as_it_is(graph, _examples):
        graphs.append(graph)
        return graph.forward

    plain = vit(depth=10)
    compiled = copy.deepcopy(plain)
    for block in compiled.blocks:
        block.compile(dynamic=True, backend=as_it_is)
    models = [Classifier(net, (0.5,) * 3, (0.25,) * 3).train() for net in (plain, compiled)]
    counts = []
    for step in range(6):
        # torch takes sizes that are equal at first for equal always: of 5 tokens, 8 calls and 9 images, none are.
        batch, side = 9 + step % 4, (8, 12, 16)[step % 3]
        images, seeds = torch.rand(batch, 3, side, side), torch.arange(batch) + 100 * step
        found = [model(images, seeds) for model in models]
        found[1].sum().backward()
        # The same operations on the same numbers.
        assert torch.equal(*found)
        counts.append(len(graphs))
        assert not torch.equal(models[1](images, seeds + 50), found[1])
    assert counts[-1] == counts[0] <= 2  # the first block drops nothing
    torch._dynamo.reset()
