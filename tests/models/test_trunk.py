"""Trunks of every kind of network: shapes of their maps, gradients of all that requires one, cost, refusals."""

from __future__ import annotations

import copy
import operator
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mae_et.models.backbones import build_backbone
from mae_et.models.drop_path import SampleDraws
from mae_et.models.trunk import Trunk, build_trunk, check_trunk, trunk_multiply_adds
from mae_et.models.vit import ViTShape, build_vit
from mae_et.models.windows import WindowBlock

SWIN = {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2), "window_size": 2}
RESNET = {"channels": (8, 8, 16, 16)}
PVT = {"depths": (1, 1, 1, 1), "embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2)}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2}
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet18": RESNET,
    "convnext_atto": CONVNEXT,
    "swin_tiny_patch4_window7_224": SWIN,
    "pvt_v2_b0": PVT,
    "mobilenetv3_small_050": {},  # its last convolution is behind the last map
    "vit_tiny_patch16_224": TINY,  # has a class token
    "eva02_tiny_patch14_224": TINY,  # a plain transformer that is no `VisionTransformer`
    "samvit_base_patch16": TINY | {"global_attn_indexes": (1,)},  # its last map is of other channels than it says
}


def vit(patch: int = 16, side: int = 4, drop_path: float = 0.0, depth: int = 4) -> nn.Module:
    torch.manual_seed(0)
    shape = ViTShape(size=(side * patch, side * patch), patch_size=patch, width=16, depth=depth, heads=2)
    return build_vit(shape, 0, "none", drop_path)


def network(name: str, drop_path: float = 0.0, size: tuple[int, int] = (64, 64)) -> nn.Module:
    torch.manual_seed(0)
    size = (56, 56) if "patch14" in name else size
    return build_backbone(name, classes=0, size=size, channels=3, drop_path=drop_path, arguments=NETWORKS[name])


def images(size: tuple[int, int], count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(2))


def total(maps: list[torch.Tensor]) -> torch.Tensor:
    """A sum that depends on every cell; the plain sum behind a LayerNorm is constant."""
    return torch.stack([(level * torch.linspace(0, 1, level.numel()).view_as(level)).sum() for level in maps]).sum()


def check_maps(trunk: Trunk, size: tuple[int, int]) -> None:
    """The promise about shapes, and about gradients."""
    maps = trunk(images(size))
    assert [tuple(level.shape) for level in maps] == [
        (2, trunk.channels, size[0] // stride, size[1] // stride) for stride in trunk.strides
    ]
    assert list(trunk.strides) == sorted(trunk.strides)
    assert all(side % stride == 0 for side in size for stride in trunk.strides)
    total(maps).backward()
    for name, parameter in trunk.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name


@pytest.mark.parametrize("name", NETWORKS)
def test_timms_networks(name):
    net = network(name)
    own = set(net.state_dict())
    trunk = build_trunk(net, channels=12, frozen_norm=False)
    check_maps(trunk, (trunk.grain, 2 * trunk.grain))
    assert {f"net.{key}" for key in own} <= set(trunk.state_dict())
    assert trunk.grain == (56 if "patch14" in name else 32)
    for norm in trunk.modules():
        if isinstance(norm, _BatchNorm):
            assert norm.training


@pytest.mark.parametrize("patch", [2, 4, 8, 14, 16, 32])
def test_strides_and_grain_of_patches(patch):
    trunk = build_trunk(vit(patch), channels=12)
    assert trunk.grain == trunk.strides[3] == 8 * trunk.strides[0]
    assert trunk.grain % patch == 0
    check_maps(trunk, (2 * trunk.grain, trunk.grain))


@pytest.mark.parametrize(
    "arguments",
    [
        {"kind": "map"},
        {"taps": "spread"},
        {"window": 3, "global_blocks": 2},
        {"window": 3, "global_blocks": 0, "checkpointing": True},
        {"kind": "map", "window": 2, "global_blocks": 1},
    ],
)
def test_kinds_of_trunks_of_a_vit(arguments):
    trunk = build_trunk(vit(), channels=12, **arguments)
    check_maps(trunk, (32, 96))
    if arguments.get("kind") == "map":
        assert (trunk.channels, trunk.strides, trunk.grain) == (16, (16,), 16)
        check_maps(trunk, (48, 16))


def test_the_map_of_a_network_with_stages_is_its_last():
    net = network("resnet18").eval()
    trunk = build_trunk(net, kind="map").eval()
    assert (trunk.channels, trunk.strides) == (16, (32,))
    assert torch.equal(trunk(images((64, 96)))[0], net.forward_features(images((64, 96))))


def test_each_level_of_spread_taps_is_of_its_quarter():
    trunk = build_trunk(vit(depth=8), channels=12, taps="spread")
    for level in range(4):
        trunk.zero_grad()
        total(trunk(images((32, 32)))[level : level + 1]).backward()
        reached = [block.mlp.fc1.weight.grad is not None for block in trunk.net.blocks]
        assert reached == [block <= 2 * level + 1 for block in range(8)]


def test_stages_are_those_of_timms_features():
    net = network("resnet18").eval()
    listed = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3, 4), **RESNET).eval()
    listed.load_state_dict(net.state_dict(), strict=False)
    trunk = build_trunk(net, channels=12).eval()
    for found, expected in zip(trunk.features(net, images((64, 64))), listed(images((64, 64)))):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [(64, 96), (32, 32), (160, 96)])
def test_swin_takes_sizes_that_its_windows_do_not_divide(size):
    check_maps(build_trunk(network("swin_tiny_patch4_window7_224", size=(96, 96))), size)


def test_frozen_batch_norm_stays_as_it_was():
    trunk = build_trunk(network("resnet18"), channels=12).train()
    before = copy.deepcopy({name: value for name, value in trunk.state_dict().items() if ".bn" in name})
    check_maps(trunk, (64, 64))
    assert len(before) > 50
    assert all(torch.equal(value, trunk.state_dict()[name]) for name, value in before.items())
    assert not any(p.requires_grad for m in trunk.modules() if isinstance(m, _BatchNorm) for p in m.parameters())
    free = build_trunk(network("resnet18"), channels=12, frozen_norm=False).train()
    free(images((64, 64)))
    assert not torch.equal(before["net.bn1.running_mean"], free.state_dict()["net.bn1.running_mean"])


@pytest.mark.parametrize("name", ["vit", "swin_tiny_patch4_window7_224", "pvt_v2_b0", "convnext_atto", "resnet18"])
def test_checkpointing_gives_the_same_gradients(name):
    found, calls = [], [0, 0]
    for checkpointing in (False, True):
        net = vit(drop_path=0.5) if name == "vit" else network(name, drop_path=0.5)
        trunk = build_trunk(net, channels=12, checkpointing=checkpointing)
        torch.nn.init.normal_(next(p for n, p in reversed(list(net.named_parameters())) if n.endswith("weight")))
        draws = SampleDraws(trunk)
        assert draws.paths
        for path in draws.paths:
            path.register_forward_pre_hook(lambda *_, now=checkpointing: operator.setitem(calls, now, calls[now] + 1))
        draws.hand_out(torch.tensor([3, 4]))
        maps = trunk(images((64, 64)))
        draws.rewind()
        total(maps).backward()
        found.append({name: p.grad for name, p in trunk.named_parameters() if p.requires_grad})
    # Timm leaves single blocks out, and what a block ends with may not be needed again.
    assert calls[1] >= 1.5 * calls[0]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_cost_of_a_vit_by_hand():
    trunk = build_trunk(vit(), kind="map", window=2, global_blocks=1)
    tokens, width = 4 * 6, 16
    linear = 3 * 16 * 16 * tokens * width + 4 * 12 * tokens * width**2
    attention = 2 * tokens * width * (tokens + 3 * 4)
    assert trunk_multiply_adds(trunk, (64, 96), 3) == linear + attention


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_cost_of_stages_grows_with_the_map(name):
    trunk = build_trunk(network(name), channels=12)
    # Whole windows of Swin, which are the same at both sizes.
    small, large = (trunk_multiply_adds(trunk, (side, 64), 3) for side in (64, 128))
    assert small > 0
    assert large == 2 * small


def test_swin_has_the_same_windows_at_all_sizes():
    trunk = build_trunk(network("swin_tiny_patch4_window7_224"), channels=12)
    blocks = [module for module in trunk.net.modules() if isinstance(module, WindowBlock)]
    assert blocks
    for grid in ((16, 16), (32, 44), (9, 7)):
        assert {block.layout(grid, torch.device("cpu")).window for block in blocks} == {(2, 2)}
    assert blocks[0].layout((1, 9), torch.device("cpu")).window == (1, 2)


@pytest.mark.parametrize("name", ["vit", "resnet18"])
def test_levels_that_a_head_has_no_use_for_are_left_out(name):
    """And have no parameters, whose gradients DDP would wait for."""
    build = (lambda: vit(depth=4)) if name == "vit" else (lambda: network(name))
    whole, coarse = (build_trunk(build(), channels=12, least_stride=stride) for stride in (1, 6))
    assert whole.strides[0] < 6
    assert coarse.strides == tuple(stride for stride in whole.strides if stride >= 6)
    maps = coarse(torch.zeros(1, 3, 64, 64))
    assert [64 // level.shape[2] for level in maps] == list(coarse.strides)
    total(maps).backward()
    assert all(parameter.grad is not None for parameter in coarse.parameters() if parameter.requires_grad)


def test_sizes_that_do_not_fit_are_refused():
    trunk = build_trunk(vit())
    with pytest.raises(ValueError, match=r"images of .*48.* px do not fit the model: choose multiples of 32"):
        trunk(images((48, 64)))
    check_trunk(trunk, [(32, 64), (96, 32)], 3)
    with pytest.raises(ValueError, match=r"VisionTransformer gives no maps of images of .*40.* px: .* multiples of 32"):
        check_trunk(trunk, [(64, 64), (40, 64)], 3)
    with pytest.raises(ValueError, match=r"VisionTransformer gives no maps of images of .*40.* px"):
        build_trunk(vit(), size=(40, 40))


@pytest.mark.parametrize(
    ("net", "arguments", "message"),
    [
        (lambda: nn.Linear(3, 3), {}, "Linear gives no maps"),
        (vit, {"kind": "map", "taps": "spread"}, 'kind="map" takes taps="last"'),
        (vit, {"window": 0}, "window=0"),
        (lambda: network("resnet18"), {"window": 7}, "window=7 is for plain ViTs, and this is resnet18"),
        (lambda: network("resnet18"), {"taps": "spread"}, 'taps="spread" is for plain ViTs, and this is resnet18'),
    ],
)
def test_what_does_not_go_together_is_refused(net, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_trunk(net(), **arguments)
