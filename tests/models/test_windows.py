"""Swin at every B: windows and masks against their definitions, the whole against timm's model built for that B."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_simple
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer import WindowAttention as TimmWindowAttention
from torch import nn

from mae_et.models.backbones import build_backbone, check_sizes
from mae_et.models.windows import (
    WindowBlock,
    bicubic_weights,
    join,
    padded,
    partition,
    resample_table,
    resampling,
    scaled_window,
    shift_mask,
    spread_biases,
)

NAME = "swin_tiny_patch4_window7_224"
SMALL = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4)}


def swin(size: tuple[int, int] = (224, 224), **arguments: object) -> nn.Module:
    model = build_backbone(
        NAME, classes=5, size=size, channels=3, drop_path=0.0, arguments={**SMALL, **arguments}
    ).eval()
    # Tables of a fresh model are near 0, and a wrong one would hardly show.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_position_bias_table" in name:
                parameter.normal_(std=2.0)
    return model


@pytest.mark.parametrize("side", [96, 128, 160, 192, 224, 288])
@pytest.mark.parametrize("final_grid", [56, 28, 14, 7])
def test_windows_are_a_thirty_second_of_b(side, final_grid):
    grid = side * final_grid // 224
    assert scaled_window((7, 7), (final_grid, final_grid), (grid, grid)) == (side // 32, side // 32)


@pytest.mark.parametrize(
    ("window", "final", "grid", "wanted"),
    [
        ((7, 7), (56, 56), (28, 56), (3, 7)),
        ((4, 2), (4, 2), (2, 5), (2, 5)),
        ((7, 7), (56, 56), (4, 4), (1, 1)),
    ],
)
def test_windows_by_rows_and_columns(window, final, grid, wanted):
    assert scaled_window(window, final, grid) == wanted


def cubic(distance: float) -> float:
    """Keys' kernel with torch's a = -0.75."""
    x, a = abs(distance), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


@pytest.mark.parametrize(("length", "wanted"), [(13, 5), (13, 9), (13, 17), (7, 1)])
def test_bicubic_weights_are_the_cubic_kernel(length, wanted):
    expected = np.zeros((wanted, length))
    for i in range(wanted):
        place = (i + 0.5) * length / wanted - 0.5
        for tap in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            expected[i, min(max(tap, 0), length - 1)] += cubic(place - tap)
    # Weights of about 1 in float32.
    np.testing.assert_allclose(bicubic_weights(length, wanted).numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("wanted", [(3, 3), (5, 5), (9, 9), (3, 5), (1, 7)])
def test_table_is_resampled_as_timm_does(wanted):
    table = torch.randn(169, 4, generator=torch.Generator().manual_seed(0))
    ours = resample_table(table, (7, 7), resampling((7, 7), wanted)).flatten(1).T
    theirs = resize_rel_pos_bias_table_simple(table, wanted, tuple(ours.shape))
    # float32 sums of 16 products of order 1, in another order.
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [(3, 3), (2, 4), (1, 5)])
def test_biases_belong_to_displacements(window):
    rows, columns = window
    table = torch.arange(2.0 * (2 * rows - 1) * (2 * columns - 1)).reshape(2, 2 * rows - 1, 2 * columns - 1)
    spread = spread_biases(table, window)
    assert spread.shape == (2, rows * columns, rows * columns)
    for query in range(rows * columns):
        for key in range(rows * columns):
            down, right = query // columns - key // columns, query % columns - key % columns
            assert torch.equal(spread[:, query, key], table[:, rows - 1 + down, columns - 1 + right])


@pytest.mark.parametrize(
    ("size", "window", "shift"), [((6, 6), (3, 3), (1, 1)), ((8, 12), (4, 6), (2, 3)), ((3, 10), (3, 5), (0, 2))]
)
def test_mask_separates_what_the_roll_joined(size, window, shift):
    """Tokens of a window see each other where both came round an edge in the roll, or neither did."""
    row = torch.arange(size[0])[:, None].expand(size)
    column = torch.arange(size[1]).expand(size)
    came_round = torch.stack([row, column], dim=-1) + torch.tensor(shift) >= torch.tensor(size)
    sides = partition(came_round[None], window)[0]
    expected = (sides[:, :, None] == sides[:, None]).all(-1)
    assert torch.equal(shift_mask(size, window, shift) == 0, expected)
    assert not expected.all()


def test_partition_and_join():
    x = torch.arange(2.0 * 6 * 8 * 3).reshape(2, 6, 8, 3)
    windows = partition(x, (3, 2))
    assert torch.equal(windows[1, 5].reshape(3, 2, 3), x[1, 3:6, 2:4])
    assert torch.equal(join(windows, (3, 2), (6, 8)), x)
    assert padded((25, 12), (7, 3)) == (28, 12)


def test_swin_tiny_at_the_final_size_is_timms():
    """Fails when timm changes what `follow_windows` relies on: names, windows, shifts, masks, order of positions."""
    ours = build_backbone(NAME, classes=7, size=(224, 224), channels=3, drop_path=0.0, arguments={}).eval()
    theirs = timm.create_model(NAME, num_classes=7).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert ours.no_weight_decay() == theirs.no_weight_decay()  # pyright: ignore[reportCallIssue]
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # float32 logits of order 1 after 12 blocks.
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=0)
    assert sum(isinstance(module, WindowBlock) for module in ours.modules()) == 12
    assert not any(isinstance(module, SwinTransformerBlock | TimmWindowAttention) for module in ours.modules())


@pytest.mark.parametrize("size", [(200, 200), (112, 224), (28, 28)])
def test_final_sizes_of_padded_or_covering_windows_are_timms(size):
    ours = swin(size)
    theirs = timm.create_model(NAME, num_classes=5, img_size=size, **SMALL).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(96, 96), (128, 128), (160, 160), (192, 192), (288, 288), (96, 160)])
def test_other_sizes_are_timms_model_built_for_them(size):
    ours = swin()
    window = (size[0] // 32, size[1] // 32)
    theirs = timm.create_model(NAME, num_classes=5, img_size=size, window_size=window, **SMALL).eval()
    tensors = ours.state_dict()
    for name, wanted in theirs.state_dict().items():
        if "relative_position_bias_table" in name:
            tensors[name] = resize_rel_pos_bias_table_simple(tensors[name], window, tuple(wanted.shape))
    theirs.load_state_dict(tensors, strict=True)
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=0)


def test_tables_learn_at_every_size():
    model = swin().train()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    for side in (96, 160, 224, 96):
        model.zero_grad()
        model(torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))).square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        for name, parameter in model.named_parameters():
            if "relative_position_bias_table" in name and parameter.shape[0] > 1:
                assert parameter.grad.abs().sum() > 0, (side, name)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


def test_training_follows_inference_and_copies_stand_alone():
    model = swin()
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(images).clone()
    output = model.train()(images)
    output.sum().backward()
    assert torch.equal(output, expected)
    half = copy.deepcopy(model).half()(images.half())
    assert half.dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        # bfloat16 holds 8 bits; logits are of order 1.
        torch.testing.assert_close(model(images).float(), output, atol=0.1, rtol=0)


def test_windows_that_never_follow_are_refused():
    with pytest.raises(ValueError, match="always_partition"):
        swin(always_partition=True)


def test_sizes_without_whole_patches_are_refused():
    with pytest.raises(ValueError, match=r"swin_tiny.* cannot take B=98: .*98.*patch size.*choose multiples of 32"):
        check_sizes(swin(), [(224, 224), (98, 98)], 3)
