"""Segmenters over a tiny trunk: UperNet against an independent reference, the loss, and what each sample decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn

from mae_et.models.segmentation import _drop_channels, build_segmenter, segmentation_loss, segmenter_multiply_adds

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.2)


class Stub(nn.Module):
    """Maps of pooled pixels: one convolution a level, with a drop path."""

    def __init__(self, channels: int = 16, strides: tuple[int, ...] = (4, 8, 16, 32), drop_path: float = 0.0):
        super().__init__()
        self.channels, self.strides, self.grain = channels, strides, strides[-1]
        self.levels = nn.ModuleList(nn.Conv2d(3, channels, stride, stride) for stride in strides)
        self.path = DropPath(drop_path)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.path(F.gelu(level(images))) for level in self.levels]


def build(kind: str = "upernet", classes: int = 5, seed: int = 0, drop_path: float = 0.0, **options):
    torch.manual_seed(seed)
    trunk = Stub(strides=(4, 8, 16, 32) if kind == "upernet" else (4,), drop_path=drop_path)
    return build_segmenter(trunk, kind, classes, MEAN, STD, **{"channels": 16} | options)


def photos(count: int = 2, size: tuple[int, int] = (64, 96), seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, *size)).astype(np.uint8))


def masks(count: int = 2, size: tuple[int, int] = (64, 96), classes: int = 5, seed: int = 1) -> Tensor:
    truth = np.random.default_rng(seed).integers(0, classes + 1, (count, *size)).astype(np.uint8)
    truth[truth == classes] = 255
    return torch.from_numpy(truth)


def randomised(segmenter: nn.Module) -> nn.Module:
    """Norms and biases off 1 and 0, so that forgetting one shows; classifiers that matter."""
    generator = torch.Generator().manual_seed(3)
    for parameter in segmenter.parameters():
        if parameter.ndim == 1 or parameter.shape[2:] == (1, 1):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return segmenter


@pytest.mark.parametrize("kind", ["upernet", "linear"])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_shapes_and_types(kind, norm):
    segmenter = build(kind, norm=norm)
    outputs = segmenter(photos())
    assert {name: (list(x.shape), x.dtype) for name, x in outputs.items()} == {
        "logits": ([2, 5, 16, 24], torch.float32)
    }
    logits = segmenter.eval()(photos())
    assert (list(logits.shape), logits.dtype) == ([2, 5, 64, 96], torch.float32)
    torch.testing.assert_close(segmenter(photos().float() / 255), logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert segmenter(photos()).dtype == torch.float32
        assert segmenter.train()(photos())["logits"].dtype == torch.float32


# UperNet, written a second time on plain arrays


def reference(state: dict[str, np.ndarray], maps: list[np.ndarray], groups: int) -> np.ndarray:
    def block(name: str, x: np.ndarray) -> np.ndarray:
        weight = state[f"{name}.0.weight"]
        pad = weight.shape[-1] // 2
        x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(2, 3))
        x = np.einsum("nchwij,ocij->nohw", windows, weight)
        parts = x.reshape(len(x), groups, -1)
        parts = (parts - parts.mean(2, keepdims=True)) / np.sqrt(parts.var(2, keepdims=True) + 1e-5)
        scale, shift = state[f"{name}.1.weight"], state[f"{name}.1.bias"]
        return np.maximum(parts.reshape(x.shape) * scale[:, None, None] + shift[:, None, None], 0)

    def pool(x: np.ndarray, bins: int) -> np.ndarray:
        height, width = x.shape[2:]
        cells = np.empty((*x.shape[:2], bins, bins))
        for i in range(bins):
            for j in range(bins):
                rows = slice(i * height // bins, -(-(i + 1) * height // bins))
                columns = slice(j * width // bins, -(-(j + 1) * width // bins))
                cells[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
        return cells

    def weights(old: int, new: int) -> np.ndarray:
        centre = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        return np.maximum(0, 1 - np.abs(centre[:, None] - np.arange(old)))  # triangles of width 1

    def enlarge(x: np.ndarray, like: np.ndarray) -> np.ndarray:
        rows, columns = weights(x.shape[2], like.shape[2]), weights(x.shape[3], like.shape[3])
        return np.einsum("rh,nchw,sw->ncrs", rows, x, columns)

    top = maps[3]
    pooled = [enlarge(block(f"pooled.{k}", pool(top, bins)), top) for k, bins in enumerate((1, 2, 3, 6))]
    p5 = block("pooling", np.concatenate([top, *pooled], 1))
    lateral4 = block("laterals.2", maps[2]) + enlarge(p5, maps[2])
    lateral3 = block("laterals.1", maps[1]) + enlarge(lateral4, maps[1])
    lateral2 = block("laterals.0", maps[0]) + enlarge(lateral3, maps[0])
    p4, p3, p2 = block("smoothing.2", lateral4), block("smoothing.1", lateral3), block("smoothing.0", lateral2)
    fused = block("fusion", np.concatenate([p2, *(enlarge(level, p2) for level in (p3, p4, p5))], 1))
    weight, bias = state["classifier.weight"][:, :, 0, 0], state["classifier.bias"]
    return np.einsum("nchw,oc->nohw", fused, weight) + bias[:, None, None]


def test_upernet_is_the_reference():
    segmenter = randomised(build()).double().eval()
    head = segmenter.head
    maps = [torch.randn(2, 16, 224 // stride, 160 // stride).double() for stride in (4, 8, 16, 32)]
    state = {name: tensor.detach().numpy() for name, tensor in head.state_dict().items()}
    # 16 channels make two groups of 8. Both are fp64, in other orders of summation.
    wanted = reference(state, [level.numpy() for level in maps], groups=2)
    np.testing.assert_allclose(head(maps, None).detach().numpy(), wanted, rtol=1e-10, atol=1e-11)


def test_the_pooled_map_of_one_cell_matters():
    """A GroupNorm of one channel a group would make it 0."""
    head = build(channels=32).head
    pooled = head.pooled[0](torch.randn(1, 16, 1, 1))
    assert pooled.std() > 0.1


def test_published_channels_have_32_groups():
    with torch.device("meta"):
        segmenter = build_segmenter(Stub(), "upernet", 150, MEAN, STD, auxiliary=0.4)
    norms = [module for module in segmenter.modules() if isinstance(module, nn.GroupNorm)]
    assert {norm.num_channels: norm.num_groups for norm in norms} == {512: 32, 256: 32}


def test_the_auxiliary_head_reads_stride_16():
    segmenter = build(auxiliary=0.4).train()
    outputs = segmenter(photos())
    assert outputs["auxiliary"].shape == (2, 5, 4, 6)
    outputs["auxiliary"].sum().backward()
    assert [level.weight.grad is not None for level in segmenter.trunk.levels] == [False, False, True, False]


# The loss


@pytest.mark.parametrize("auxiliary", [0.0, 0.4])
def test_loss_is_the_mean_over_all_pixels(auxiliary):
    outputs = {"logits": torch.randn(2, 5, 16, 24), "auxiliary": torch.randn(2, 5, 4, 6)}
    truth = masks()
    wanted = 0.0
    for name, weight in (("logits", 1.0), ("auxiliary", auxiliary)):
        logits = F.interpolate(
            outputs[name].double(), scale_factor=64 // outputs[name].shape[2], mode="bilinear"
        ).numpy()
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        labelled = truth.numpy() != 255
        n, row, column = np.nonzero(labelled)
        wanted -= weight * log_p[n, truth.numpy()[labelled], row, column].sum() / truth.numel()
    # float32 sums of 12,288 terms
    assert segmentation_loss(outputs, truth, auxiliary).item() == pytest.approx(wanted, rel=1e-5)


def test_nothing_labelled_is_no_loss():
    segmenter = build(auxiliary=0.4).train()
    loss = segmentation_loss(segmenter(photos()), torch.full((2, 64, 96), 255, dtype=torch.uint8), 0.4)
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in segmenter.parameters())


@pytest.mark.parametrize("kind", ["upernet", "linear"])
def test_a_batch_may_be_divided(kind):
    """Loss and gradients with drop path and dropout, of four images together or one by one; labels unevenly spread."""
    segmenter = build(kind, drop_path=0.5, dropout=0.5, auxiliary=0.4 if kind == "upernet" else 0.0).double().train()
    images, truth, seeds = photos(4, (32, 64)).double() / 255, masks(4, (32, 64)), torch.tensor([3, 1, 4, 15])
    truth[1, :20], truth[2] = 255, 255
    found = []
    for size in (4, 1):
        segmenter.zero_grad()
        total = torch.zeros(())
        for start in range(0, 4, size):
            part = slice(start, start + size)
            loss = segmentation_loss(segmenter(images[part], seeds[part]), truth[part], 0.4) * size / 4
            loss.backward()
            total += loss.detach()
        found.append([total, *(parameter.grad.clone() for parameter in segmenter.parameters())])
    # Logits are float32, whatever the model is.
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    assert found[0][0] > 0.1


# Dropout


def test_dropout_follows_the_seeds():
    x, seeds = torch.ones(3, 4000, 2, 2), torch.tensor([5, 6, 5])
    dropped = _drop_channels(x, seeds, 0.25, salt=9)
    assert torch.equal(dropped[0], dropped[2])
    assert not torch.equal(dropped[0], dropped[1])
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    # 4,000 draws: a deviation of 0.007 in the share
    assert (dropped[:2] == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert (dropped == dropped[:, :, :1, :1]).all()
    assert not torch.equal(dropped, _drop_channels(x, seeds, 0.25, salt=8))


@pytest.mark.parametrize("options", [{"drop_path": 0.5, "dropout": 0.0}, {"dropout": 0.5}])
def test_randomness_is_of_training_with_seeds(options):
    segmenter = build(**options).train()
    first, second, other = (segmenter(photos(), torch.tensor(s))["logits"] for s in ([1, 2], [1, 2], [3, 2]))
    assert torch.equal(first, second)
    assert not torch.equal(first[0], other[0])
    assert torch.equal(first[1], other[1])
    plain = segmenter(photos())["logits"]
    assert not torch.equal(plain, first)
    segmenter.eval()
    assert torch.equal(segmenter(photos(), torch.tensor([1, 2])), segmenter(photos()))
    torch.testing.assert_close(segmenter(photos()), F.interpolate(plain, (64, 96), mode="bilinear"))


# Learning, cost and mistakes


@pytest.mark.parametrize("kind", ["upernet", "linear"])
def test_one_image_is_learnt(kind):
    """Colours say the class of three, of eight px blocks; IoU above 0.95 of each."""
    grid = torch.from_numpy(np.random.default_rng(2).integers(0, 3, (8, 8)))
    truth = grid.repeat_interleave(8, 0).repeat_interleave(8, 1)[None].byte()
    colours = torch.tensor([[220, 30, 30], [30, 220, 30], [30, 30, 220]], dtype=torch.uint8)
    image = colours[truth.long()].permute(0, 3, 1, 2)
    segmenter = build(kind, classes=3).train()
    optimizer = torch.optim.AdamW(segmenter.parameters(), 1e-2)
    for step in range(60):
        optimizer.zero_grad()
        segmentation_loss(segmenter(image, torch.tensor([step])), truth).backward()
        optimizer.step()
    predicted = segmenter.eval()(image).argmax(1)
    for number in range(3):
        ours, theirs = predicted == number, truth == number
        assert (ours & theirs).sum() / (ours | theirs).sum() > 0.95


def test_multiply_adds_are_counted_by_hand():
    segmenter = build("linear")
    # A 4x4 convolution of 3 channels to 16, and 16 to 5 classes, on 16 x 24 cells.
    assert segmenter_multiply_adds(segmenter, (64, 96)) == 16 * 24 * (48 * 16 + 16 * 5)
    segmenter = build(auxiliary=0.4)
    cells = {stride: 64 // stride * 96 // stride for stride in (4, 8, 16, 32)}
    wanted = sum(cells[s] * s * s * 3 * 16 for s in cells)  # trunk
    wanted += (1 + 4 + 9 + 36) * 16 * 16 + cells[32] * 9 * 80 * 16  # pooling
    wanted += sum(cells[s] * (1 + 9) * 16 * 16 for s in (4, 8, 16))  # laterals, smoothing
    wanted += cells[4] * (9 * 64 * 16 + 16 * 5)  # fusion, classifier
    assert segmenter_multiply_adds(segmenter, (64, 96)) == wanted


def test_batch_norm_needs_two_images():
    segmenter = build(norm="batch").train()
    with pytest.raises(ValueError, match=r"norm=batch cannot train on one image at a time.*norm=group"):
        segmenter(photos(1))
    segmenter(photos(2))
    assert segmenter.eval()(photos(1)).shape[0] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "fcn"}, "head 'fcn' is unknown: there are upernet, linear"),
        ({"norm": "layer"}, "norm='layer' is unknown"),
        ({"classes": 1}, "1 classes: a segmenter tells 2 to 255"),
        ({"classes": 256}, "256 classes"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
        ({"auxiliary": -0.1}, r"auxiliary=-0\.1"),
        ({"channels": 0}, "channels=0"),
        ({"kind": "linear", "auxiliary": 0.4}, "no level for an auxiliary one"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_heads_and_trunks_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"this trunk has 4: build it with kind='map'"):
        build_segmenter(Stub(), "linear", 5, MEAN, STD)
    with pytest.raises(ValueError, match=r"this trunk has one: build it with kind='pyramid'"):
        build_segmenter(Stub(strides=(4,)), "upernet", 5, MEAN, STD)
