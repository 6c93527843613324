"""Maps of a plain ViT: those of timm, in windows those of a loop over windows, with and without checkpointing."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from mae_et.models.drop_path import SampleDraws
from mae_et.models.vit import ViTShape, build_vit
from mae_et.models.vit_features import ViTFeatures, Windows, check_vit, spread

SHAPE = ViTShape(size=(32, 32), patch_size=8, width=16, depth=4, heads=2)
GLOBAL = ViTFeatures(taps=(3,))
# The grids of 32x32 (the net's own), 40x56 and 56x24 px are 4x4, 5x7 and 7x3.
SIZES = [(32, 32), (40, 56), (56, 24)]


def vit(drop_path: float = 0.0, **changes) -> VisionTransformer:
    """With weights large enough for attention to look at something, and biases of the keys and values other than 0."""
    torch.manual_seed(1)
    net = build_vit(replace(SHAPE, **changes), 0, "none", drop_path)
    for parameter in net.blocks.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return net.eval()


def images(size: tuple[int, int], count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("changes", [{}, {"layer_scale": True}, {"locality": True}])
def test_the_last_map_is_timms_features(size, changes):
    net = vit(**changes)
    (found,) = GLOBAL(net, images(size))
    assert found.shape == (2, 16, size[0] // 8, size[1] // 8)
    # The same operations in the same order.
    assert torch.equal(found.flatten(2).transpose(1, 2), net.forward_features(images(size)))


def test_class_tokens_take_part_and_are_left_out():
    net = VisionTransformer(
        32, 8, embed_dim=16, depth=2, num_heads=2, num_classes=0, reg_tokens=2, dynamic_img_size=True
    )
    (found,) = ViTFeatures((1,))(net.eval(), images((40, 56)))
    assert torch.equal(found.flatten(2).transpose(1, 2), net.forward_features(images((40, 56)))[:, 3:])


@pytest.mark.parametrize("window", [None, 3])
def test_maps_of_inner_blocks_are_as_they_are(window):
    net, size = vit(), (40, 56)
    maps = ViTFeatures((0, 0, 2, 3), window, (0, 2, 3))(net, images(size))
    assert len(maps) == 4
    assert torch.equal(maps[0], maps[1])
    if window is None:
        inner = net.forward_intermediates(images(size), indices=[0, 2], intermediates_only=True)
        assert torch.equal(maps[0], inner[0])
        assert torch.equal(maps[2], inner[1])
        assert torch.equal(maps[3], GLOBAL(net, images(size))[0])
    else:
        # A map that is taken among windows is the one that a later block with global attention starts from.
        cut = ViTFeatures((1, 3), window, (0, 2, 3))(net, images(size))
        x = net.blocks[2](cut[0].flatten(2).transpose(1, 2))
        assert torch.equal(maps[2].flatten(2).transpose(1, 2), x)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("window", [7, 20])
def test_one_window_over_the_map_is_global_attention(size, window):
    net = vit()
    (found,) = ViTFeatures((3,), window, (1,))(net, images(size))
    assert torch.equal(found, GLOBAL(net, images(size))[0])


def attend(x: torch.Tensor, block) -> torch.Tensor:
    """Attention of [T, D] among all of its rows, head by head."""
    width = x.shape[1]
    qkv = x @ block.attn.qkv.weight.T + block.attn.qkv.bias
    heads = []
    for head in range(2):
        q, k, v = (qkv[:, i * width + head * 8 : i * width + head * 8 + 8] for i in range(3))
        weights = torch.exp(q @ k.T / 8**0.5)
        heads.append(weights / weights.sum(1, keepdim=True) @ v)
    return torch.cat(heads, 1) @ block.attn.proj.weight.T + block.attn.proj.bias


def block_by_loops(x: torch.Tensor, block, window: int) -> torch.Tensor:
    """One block on one map [h, w, D]: attention in every window, cut off where the map ends."""
    width = x.shape[2]
    normed = F.layer_norm(x, (width,), block.norm1.weight, block.norm1.bias, 1e-6)
    attended = torch.zeros_like(x)
    for top in range(0, x.shape[0], window):
        for left in range(0, x.shape[1], window):
            part = normed[top : top + window, left : left + window]
            attended[top : top + window, left : left + window] = attend(part.reshape(-1, width), block).view_as(part)
    x = x + attended
    hidden = F.layer_norm(x, (width,), block.norm2.weight, block.norm2.bias, 1e-6) @ block.mlp.fc1.weight.T
    hidden = hidden + block.mlp.fc1.bias
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    return x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_windows_are_those_of_a_loop_over_windows(size, window, fused):
    net = vit().double()
    for block in net.blocks:
        block.attn.fused_attn = fused
    batch = images(size).double()
    with torch.no_grad():
        (found,) = ViTFeatures((3,), window, (1, 3))(net, batch)
        tokens = net._pos_embed(net.patch_embed(batch))
        for sample, x in zip(found, tokens.unflatten(1, found.shape[2:])):
            for index, block in enumerate(net.blocks):
                x = block_by_loops(x, block, 100 if index in (1, 3) else window)
            expected = F.layer_norm(x, (16,), net.norm.weight, net.norm.bias, 1e-6).permute(2, 0, 1)
            # fp64 sums of some ten terms through four blocks.
            torch.testing.assert_close(sample, expected, rtol=1e-9, atol=1e-9)


def test_without_padding_there_is_no_mask():
    """Fast attention kernels refuse masks."""
    assert Windows((6, 9), 3, 2, torch.device("cpu")).mask is None
    assert Windows((6, 2), 3, 2, torch.device("cpu")).mask is None
    mask = Windows((4, 3), 3, 2, torch.device("cpu")).mask
    assert mask is not None
    # Two windows in each of two samples: a whole one, and one whose first row of three is the map's last.
    assert mask[:, 0, 0].tolist() == 2 * [9 * [True], 3 * [True] + 6 * [False]]


def gradients(net: VisionTransformer, how: ViTFeatures, size=(40, 56)) -> dict[str, torch.Tensor]:
    draws, net = SampleDraws(net), net.train()
    net.zero_grad()
    draws.hand_out(torch.tensor([3, 4]))
    maps = how(net, images(size))
    draws.rewind()
    sum((level**3).sum() for level in maps).backward()  # pyright: ignore[reportAttributeAccessIssue]
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters()}


@pytest.mark.parametrize(("window", "locality"), [(None, False), (None, True), (3, False)])
def test_checkpointing_changes_no_bit(window, locality):
    net, how = vit(drop_path=0.5, locality=locality), ViTFeatures((1, 3), window, (1, 3))
    kept = gradients(net, how)
    calls = []
    # A hook behind the block would not see the second time, which ends once it has what the backward pass needs.
    net.blocks[0].register_forward_pre_hook(lambda *_: calls.append(0))
    recomputed = gradients(net, replace(how, checkpointing=True))
    assert len(calls) == 2
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)
    # Another network without drop path shows that branches were dropped at all.
    plain = gradients(vit(locality=locality), how)
    assert not torch.equal(kept["blocks.3.mlp.fc1.weight"], plain["blocks.3.mlp.fc1.weight"])


@pytest.mark.parametrize("window", [None, 2, 3])
def test_a_sample_loses_the_same_branches_in_any_batch_and_any_window(window):
    net, how, batch = vit(drop_path=0.5).train(), ViTFeatures((3,), window, (1,)), images((40, 56), 4)
    draws, seeds = SampleDraws(net), torch.tensor([3, 4, 5, 6])
    draws.hand_out(seeds)
    together = how(net, batch)[0]
    for index in range(4):
        draws.hand_out(seeds[index : index + 1])
        alone = how(net, batch[index : index + 1])[0]
        # Matrix products of another number of rows; a dropped branch changes values by their own size.
        torch.testing.assert_close(together[index], alone[0], rtol=1e-4, atol=1e-4)
    without = how(copy.deepcopy(net).eval(), batch)[0]
    assert (together - without).abs().amax(dim=(1, 2, 3)).max() > 0.1


@pytest.mark.parametrize(
    ("depth", "parts", "expected"),
    [(12, 4, (2, 5, 8, 11)), (24, 4, (5, 11, 17, 23)), (6, 4, (1, 2, 4, 5)), (2, 4, (0, 0, 1, 1)), (12, 0, ())],
)
def test_blocks_are_spread_evenly(depth, parts, expected):
    assert spread(depth, parts) == expected


@pytest.mark.parametrize(
    ("net", "window", "global_blocks", "message"),
    [
        (lambda: vit(), 0, 1, r"window=0 .* 1 or more"),
        (lambda: vit(), 2, 5, r"global_blocks=5 must be from 0 to the 4 blocks"),
        (lambda: vit(locality=True), 2, 1, r"window=2 .* locality"),
        (lambda: build_vit(SHAPE, 0, "cls"), 2, 1, r"window=2: the 1 class and register tokens"),
        (
            lambda: VisionTransformer(32, 8, embed_dim=16, depth=1, num_heads=2, patch_drop_rate=0.5),
            None,
            1,
            "patch_drop",
        ),
    ],
)
def test_what_a_network_cannot_give_is_refused(net, window, global_blocks, message):
    with pytest.raises(ValueError, match=message):
        check_vit(net(), window, global_blocks)
