"""Models of timm at every B, what they cost there, and what is said of those that cannot."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers.drop import DropPath
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import nn

from mae_et.curriculum.cost import TransformerShape
from mae_et.models.backbones import build_backbone, check_sizes, multiply_adds, scaled_drop_path, stride

SIDES = (96, 128, 160, 192, 224)
SIZES = [(side, side) for side in SIDES]

# Multiply-adds at 224 px in units of 1e9, as the models' papers give them.
PUBLISHED = {
    "resnet50": 4.1,
    "convnext_tiny": 4.5,
    "deit_small_patch16_224": 4.6,
    "swin_tiny_patch4_window7_224": 4.5,
    "pvt_v2_b1": 2.1,
    "caformer_s18": 4.1,
}
SMALL = {
    "resnet50": {"layers": (1, 1, 1, 1), "base_width": 8},
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32)},
    "deit_tiny_patch16_224": {"depth": 2, "embed_dim": 24},
    "swin_tiny_patch4_window7_224": {"depths": (2, 2, 2, 2), "embed_dim": 12},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 40, 64)},
    "caformer_s18": {},
}


def build(name: str, size=(224, 224), channels=3, drop_path=0.0, pretrained=False, classes=10, **arguments):
    return build_backbone(
        name,
        classes=classes,
        size=size,
        channels=channels,
        drop_path=drop_path,
        arguments=arguments,
        pretrained=pretrained,
    )


def without_data(name: str, **arguments) -> nn.Module:
    with torch.device("meta"):
        return build(name, **arguments)


def images_of(side: int, channels: int = 3) -> torch.Tensor:
    return torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(side))


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_of_the_paper_take_every_size(name):
    model = without_data(name, classes=1000)
    check_sizes(model, SIZES, 3)
    counts = multiply_adds(model, [(96, 96), (224, 224)], 3)
    # Papers round to 0.1 G, and some count norms and biases: up to 1 G, half a unit of the last digit is already 5 %.
    assert counts[224, 224] / 1e9 == pytest.approx(PUBLISHED[name], rel=0.05, abs=0.05)
    # Area is the paper's estimate of cost; attention over all tokens makes the small sizes cheaper than that.
    for size, count in counts.items():
        assert 0.85 < count / counts[224, 224] * 224**2 / size[0] ** 2 < 1.03


@pytest.mark.parametrize("name", SMALL)
def test_one_set_of_parameters_learns_at_every_size(name):
    model = build(name, channels=1, **SMALL[name])
    before = [id(parameter) for parameter in model.parameters()]
    state = {key: value.shape for key, value in model.state_dict().items()}
    for side in SIDES if SMALL[name] else (96, 128):
        model.zero_grad()
        output = model.train()(images_of(side, 1))
        assert output.shape == (2, 10)
        output.square().sum().backward()
        # ConvNeXt and CAFormer start some scales at or near 0; all get a gradient.
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert [id(parameter) for parameter in model.parameters()] == before
    assert {key: value.shape for key, value in model.state_dict().items()} == state


def test_vit_is_timms_with_positions_resampled():
    small = SMALL["deit_tiny_patch16_224"]
    ours = build("timm/deit_tiny_patch16_224", **small).eval()
    for side in (224, 96):
        theirs = timm.create_model("deit_tiny_patch16_224", num_classes=10, img_size=side, **small).eval()
        tensors = ours.state_dict()
        grid = side // 16
        tensors["pos_embed"] = resample_abs_pos_embed(tensors["pos_embed"], [grid, grid], [14, 14])
        theirs.load_state_dict(tensors, strict=True)
        with torch.no_grad():
            # The same operations on the same numbers.
            torch.testing.assert_close(ours(images_of(side)), theirs(images_of(side)), atol=1e-6, rtol=0)


def test_drop_path_reaches_the_last_block():
    model = build("convnext_tiny", drop_path=0.3, **SMALL["convnext_tiny"])
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert max(rates) == pytest.approx(0.3)
    # Swin's own default is 0.1.
    swin = build("swin_tiny_patch4_window7_224", **SMALL["swin_tiny_patch4_window7_224"])
    assert not any(isinstance(module, DropPath) for module in swin.modules())


def test_weights_of_another_size_and_other_channels(tmp_path):
    name = "swin_tiny_patch4_window7_224"
    source = timm.create_model(name, num_classes=1000, **SMALL[name])
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    arguments = {**SMALL[name], "pretrained_cfg_overlay": {"file": str(tmp_path / "weights.pth")}}
    large = build(name, classes=1000, pretrained=True, **arguments).eval()
    assert all(torch.equal(value, large.state_dict()[key]) for key, value in source.state_dict().items())
    small = build(name, classes=1000, size=(192, 192), pretrained=True, **{**arguments, "window_size": 6}).eval()
    assert small.state_dict()["layers.0.blocks.1.attn.relative_position_bias_table"].shape == (121, 3)
    with torch.no_grad():
        torch.testing.assert_close(small(images_of(192)), large(images_of(192)), atol=1e-6, rtol=0)
    grey = build(name, classes=4, channels=1, pretrained=True, **arguments).state_dict()
    kernel = source.state_dict()["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(grey["patch_embed.proj.weight"], kernel)
    assert grey["head.fc.weight"].shape[0] == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swin_tiny", r"no model 'swin_tiny'; nearest names: swin_tiny_patch4_window7_224"),
        ("resnet5O", r"nearest names: resnet50"),
        ("timm/qqqqqqqq", r"nearest names: none"),
        ("", r"no model ''"),
        ("CSWin_64_12211_tiny_224", r"no CSWin, .* choose swin_tiny"),
        ("pvt_small", r"no PVT \(the first version\), .* choose pvt_v2_b1"),
        ("resnet50.nothing", r"no weights 'nothing' of resnet50; it has .*a1_in1k"),
    ],
)
def test_names_that_timm_lacks(name, message):
    with pytest.raises(ValueError, match=message):
        build(name)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vgg11", {"drop_path": 0.1}, "vgg11 takes no drop path"),
        ("resnet50", {"depth": 3}, "resnet50 does not know the arguments depth"),
        ("caformer_s18", {"window": 3}, "caformer_s18 does not know the arguments window"),
        ("caformer_s18", {"depths": (1, 1, 1, 1)}, "caformer_s18 has its own arguments depths"),
        ("resnet50", {"num_classes": 3}, "set `classes` instead"),
        ("resnet50", {"img_size": 3}, "set `size` instead"),
    ],
)
def test_arguments_that_a_model_lacks(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(name, **arguments)


def test_a_model_without_drop_path_is_built_at_zero():
    assert without_data("vgg11").num_classes == 10


@pytest.mark.parametrize(
    ("name", "arguments", "side", "message"),
    [
        ("deit_tiny_patch16_224", {}, 100, r"B=100: .*divisible by patch size.*; choose multiples of 16$"),
        ("deit_tiny_patch16_224", {"dynamic_img_size": False}, 96, r"B=96: .*match model.*it takes \(224\)$"),
        ("test_maxvit", {}, 96, r"test_maxvit cannot take B=96: .*window.*it takes \(224\)$"),
        ("convnext_tiny", SMALL["convnext_tiny"], 16, r"B=16: .*; choose multiples of 32$"),
        ("deit_tiny_patch16_224", {"global_pool": ""}, 96, r"output for 2 images is \[2, 197, 10\], not \[2, 10\]"),
    ],
)
def test_sizes_that_a_model_cannot_take(name, arguments, side, message):
    model = without_data(name, **arguments)
    with pytest.raises(ValueError, match=message):
        check_sizes(model, [(224, 224), (side, side)], 3)


class Odd(nn.Module):
    """Looks at values, which a model without data cannot; gives two outputs in training; knows no stride."""

    num_classes = 4

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.head = kind, nn.Linear(3, 4)

    def forward(self, images):
        if self.kind == "values" and images.mean().item() > 1e6:
            raise RuntimeError("too bright")
        if images.shape[-1] < 8:
            raise RuntimeError("too\nsmall")
        output = self.head(images.mean((2, 3)))
        return (output, output) if self.kind == "pair" and self.training else output


def test_models_that_need_values_are_run_on_zeros():
    model = Odd("values")
    check_sizes(model, [(16, 16)], 3)
    assert multiply_adds(model, [(16, 16)], 3) == {(16, 16): 12}
    with pytest.raises(ValueError, match=r"model Odd cannot take B=16x4: too; choose .* takes \(16\)"):
        check_sizes(model, [(16, 16), (16, 4)], 3)


def test_outputs_of_training_count_as_well():
    with pytest.raises(ValueError, match="gives a tuple, not one tensor"):
        check_sizes(Odd("pair"), [(16, 16)], 3)
    with pytest.raises(ValueError, match="model Odd states no stride"):
        stride(Odd("pair"))


def test_checks_leave_no_trace():
    model = build("resnet50", **SMALL["resnet50"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    check_sizes(model, [(64, 64)], 3)
    multiply_adds(model, [(64, 64)], 3)
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.training
    assert not any(value.is_meta for value in model.state_dict().values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("side", [96, 224])
def test_multiply_adds_of_a_vit_are_those_of_the_cost_model(side):
    model = without_data("deit_tiny_patch16_224", classes=7)
    patches = (side // 16) ** 2
    expected = patches * 768 * 192 + TransformerShape(192, 12).multiply_adds(patches + 1) + 192 * 7
    # Every product is in the formula, so the tolerance is zero.
    assert multiply_adds(model, [(side, side)], 3) == {(side, side): expected}
    assert all(module.fused_attn for module in model.modules() if hasattr(module, "fused_attn"))


@pytest.mark.parametrize(
    ("name", "arguments", "wanted"),
    [
        ("resnet50", {}, 32),
        ("resnet50", {"output_stride": 16}, 16),
        ("convnext_tiny", {}, 32),
        ("convnext_tiny", {"patch_size": 2}, 32),
        ("deit_tiny_patch16_224", {"patch_size": 8}, 8),
        ("vit_small_r26_s32_224", {}, 32),
        ("swin_tiny_patch4_window7_224", {}, 32),
        ("swin_tiny_patch4_window7_224", {"patch_size": 2}, 16),
        ("pvt_v2_b1", {}, 32),
        ("caformer_s18", {}, 32),
    ],
)
def test_stride_is_pixels_per_cell_of_the_last_map(name, arguments, wanted):
    model = without_data(name, **arguments)
    assert stride(model) == wanted
    features = model.forward_features(torch.empty(1, 3, 192, 192, device="meta"))
    cells = features.numel() // model.num_features - getattr(model, "num_prefix_tokens", 0)
    assert cells == (192 // wanted) ** 2


@pytest.mark.parametrize(("epochs", "wanted"), [(200, 0.2), (300, 0.3), (100, 0.1), (0, 0.0)])
def test_drop_path_grows_with_the_budget(epochs, wanted):
    assert scaled_drop_path(0.2, epochs) == pytest.approx(wanted)


def test_drop_path_is_a_probability():
    with pytest.raises(ValueError, match=r"drop path 0\.5 of 200 epochs is 1 at 400 epochs"):
        scaled_drop_path(0.5, 400)
