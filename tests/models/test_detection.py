"""Detectors: equal to torchvision's own, deaf to padding and to the rest of the batch, and able to learn."""

from __future__ import annotations

import math
from collections import OrderedDict

import pytest
import torch
from timm.layers.drop import DropPath
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import box_iou

from mae_et.models.anchors import LevelAnchors
from mae_et.models.detection import _LOSSES, _pool, head_multiply_adds
from mae_et.models.sampling import SeededSampler
from tests.models.detectors import KINDS, REGION_KINDS, ConvTrunk, detector, excite, nothing, picture, train_on

ALL = 10**6


class Levels(nn.Module):
    """Our trunk and the levels that a head adds, as torchvision's models have them."""

    out_channels = 32

    def __init__(self, model):
        super().__init__()
        self.model, self.dense = model, hasattr(model.head, "used")

    def forward(self, pixels):
        maps = self.model.trunk(pixels)
        levels = self.model.head._levels(maps)
        named = enumerate(levels) if self.dense else levels.items()
        return OrderedDict((str(name), level) for name, level in named)


def torchvisions(kind, model):
    """torchvision's own full model with our model's weights, taking every anchor and proposal."""
    common = {"min_size": 128, "max_size": 128, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    if kind == "retinanet":
        sizes = tuple(tuple(4 * stride * 2 ** (step / 3) for step in range(3)) for stride in (8, 16, 32, 64, 128))
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)  # pyright: ignore[reportArgumentType]
        full = RetinaNet(Levels(model), 3, anchor_generator=anchors, detections_per_img=ALL, **common)
        full.head.load_state_dict(model.head.layers.state_dict())
        return full
    common |= {
        "rpn_anchor_generator": AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5),
        "box_head": TwoMLPHead(32 * 49, 32),
        "box_predictor": FastRCNNPredictor(32, 4),
        "rpn_batch_size_per_image": ALL,
        "box_batch_size_per_image": ALL,
    }
    if kind == "mask_rcnn":
        masks = {"mask_head": MaskRCNNHeads(32, [16] * 4, 1), "mask_predictor": MaskRCNNPredictor(16, 16, 4)}
        full = MaskRCNN(Levels(model), **masks, **common)
    else:
        full = FasterRCNN(Levels(model), **common)
    full.rpn.load_state_dict(model.head.rpn.state_dict())
    full.roi_heads.load_state_dict(model.head.roi_heads.state_dict())
    return full


@pytest.fixture
def _everywhere(monkeypatch):
    """Anchors in the padding count, as they do in torchvision."""
    forward = LevelAnchors.forward

    def unbounded(self, image_list, feature_maps):
        anchors = forward(self, image_list, feature_maps)
        self.inside = torch.ones_like(self.inside)
        return anchors

    monkeypatch.setattr(LevelAnchors, "forward", unbounded)


@pytest.mark.usefixtures("_everywhere")
@pytest.mark.parametrize("kind", ["retinanet", "faster_rcnn", "mask_rcnn"])
def test_equals_torchvisions_own_model(kind):
    model = detector(kind)
    excite(model)
    full = torchvisions(kind, model)
    for sampler in getattr(model.head, "samplers", ()):
        sampler.count, sampler.positives = ALL, int(ALL * (0.5 if sampler is model.head.samplers[0] else 0.25))
    sizes = [(128, 128), (104, 128)]
    images = torch.zeros(2, 3, 128, 128)
    targets = []
    for index, (height, width) in enumerate(sizes):
        image, target = picture(128, index)
        images[index, :, :height, :width] = image[:, :height, :width] / 255
        targets.append(target)

    ours = model(images, sizes, targets, torch.tensor([1, 2]))
    cropped = [image[:, :height, :width] for image, (height, width) in zip(images, sizes)]
    # torchvision resizes masks with their images, and pads nothing: they are cut for it.
    cut = [{**t, "masks": t["masks"][:, :height, :width]} for t, (height, width) in zip(targets, sizes)]
    labelled = [{**t, "labels": t["labels"] + (kind != "retinanet")} for t in cut]
    theirs = {_LOSSES[name]: loss for name, loss in full(cropped, labelled).items()}
    assert ours.keys() == theirs.keys()
    for name, loss in ours.items():
        # Sums of the same numbers in another order.
        torch.testing.assert_close(loss, theirs[name], rtol=1e-5, atol=1e-6)

    model.eval(), full.eval()
    with torch.no_grad():
        found = model(images, sizes)
        # Masks as the head gives them; the full model pastes them into the image.
        expected = full(cropped) if kind == "retinanet" else full.roi_heads(*regions(full, images, sizes))[0]
    for mine, other in zip(found, expected):
        assert len(mine["boxes"]) > 20
        solid = (other["boxes"][:, 2:] > other["boxes"][:, :2]).all(1)
        for name in mine:
            value = other[name][solid] - (1 if name == "labels" and kind != "retinanet" else 0)
            value = value.squeeze(1) if name == "masks" else value
            torch.testing.assert_close(mine[name], value[: len(mine[name])], rtol=1e-4, atol=1e-4)


def regions(full, images, sizes):
    pixels = (images - 0.5) / 0.25
    for image, (height, width) in zip(pixels, sizes):
        image[:, height:], image[:, :, width:] = 0, 0
    levels = full.backbone(pixels)
    return levels, full.rpn(ImageList(pixels, sizes), levels)[0], sizes


@pytest.mark.parametrize("kind", KINDS)
def test_padding_cannot_change_what_is_found(kind):
    """Neither what it holds nor how much there is of it; nor is anything found in it."""
    model = detector(kind).eval()
    excite(model)
    image, _ = picture(64)
    sizes = [(64, 64), (40, 56)]
    outputs = []
    for padded, filling in ((96, 0), (96, 255), (160, 90)):
        images = torch.full((2, 3, padded, padded), filling, dtype=torch.uint8)
        for index, (height, width) in enumerate(sizes):
            images[index, :, :height, :width] = image[:, :height, :width]
        with torch.no_grad():
            outputs.append(model(images, sizes))
    for index, (height, width) in enumerate(sizes):
        boxes = outputs[0][index]["boxes"]
        assert len(boxes) > 10
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes[:, 2:] <= torch.tensor([width, height])).all()
        for other in outputs[1:]:
            for name, value in outputs[0][index].items():
                # Convolutions of another size may add in another order.
                torch.testing.assert_close(other[index][name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["retinanet", "mask_rcnn"])
def test_padding_cannot_change_losses(kind):
    image, target = picture(64)
    losses = []
    for padded in (96, 160):
        model = detector(kind)
        images = torch.full((1, 3, padded, padded), padded, dtype=torch.uint8)
        images[..., :64, :64] = image
        if kind == "mask_rcnn":  # the draw is by the anchor's number, which is another where there are more
            for sampler in model.head.samplers:
                sampler.count = sampler.positives = ALL
        target["boxes"] = target["boxes"].clamp(max=64)
        masks = nn.functional.pad(target["masks"], (0, padded - 64, 0, padded - 64))
        losses.append(model(images, [(64, 64)], [{**target, "masks": masks}], torch.tensor([3])))
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strides", [(4, 8, 16, 32, 64), (7, 14, 28, 56, 112)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_anchors_stand_at_the_strides_of_their_levels(strides, dtype):
    """Also where a level reaches beyond the image, and beyond 256 px in half precision."""
    size, inner = (7 * 56, 10 * 56), (300, 111)
    anchors = LevelAnchors(strides, [[8 * stride] for stride in strides])
    maps = [
        torch.zeros(2, 1, math.ceil(size[0] / stride), math.ceil(size[1] / stride), dtype=dtype) for stride in strides
    ]
    of_first, of_second = anchors(ImageList(torch.zeros(2, 3, *size), [size, inner]), maps)
    expected, inside = [], []
    for stride, level in zip(strides, maps):
        for row in range(level.shape[2]):
            for column in range(level.shape[3]):
                for ratio in (0.5, 1.0, 2.0):
                    width, height = 8 * stride / ratio**0.5, 8 * stride * ratio**0.5
                    x, y = column * stride, row * stride
                    expected.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
                    inside.append(x < inner[1] and y < inner[0])
    assert of_first.dtype == torch.float32
    # torchvision rounds half sides to whole px.
    torch.testing.assert_close(of_first, torch.tensor(expected), rtol=0, atol=0.5)
    torch.testing.assert_close(of_second, of_first)
    assert anchors.inside[1].tolist() == inside


@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (7, 14, 28, 56), (16,)])
def test_regions_are_read_where_and_from_the_map_they_should(strides):
    """A map that holds its cells' positions gives a region's centre; another channel says which map it is."""
    pool = _pool(strides, 1)
    maps = {}
    for level, stride in enumerate(strides):
        rows, columns = torch.meshgrid(torch.arange(448 // stride), torch.arange(448 // stride), indexing="ij")
        maps[str(level)] = torch.stack([columns * stride, rows * stride, torch.full_like(rows, level)])[None].float()
    for side in (20, 60, 100, 130, 223, 225, 300):
        box = torch.tensor([[40.0, 50.0, 40.0 + side, 50.0 + side]])
        # Sizes inside the padding must not matter: torchvision's pool guesses the strides from them.
        x, y, level = pool(maps, [box], [(30, 20)]).flatten().tolist()
        by_size = math.floor(math.log2(side / 224 * 16 / strides[0]))
        assert level == min(max(by_size, 0), len(strides) - 1)
        assert (x, y) == pytest.approx((40 + side / 2, 50 + side / 2), abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("box_head", "half"), [("mlp", False), ("conv", True)])
def test_every_parameter_gets_a_gradient_without_objects(kind, box_head, half):
    """As DDP needs it; and all losses are finite and float32 under autocast, too."""
    model = detector(kind, box_head=box_head, samples=32)
    image, target = picture()
    images = torch.stack([image, image])
    for targets in ([nothing(), nothing()], [target, nothing()]):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = model(images, [(96, 96), (33, 20)], targets, torch.tensor([1, 2]))
        for loss in losses.values():
            assert loss.dtype == torch.float32
            assert loss.shape == ()
            assert loss.isfinite()
        torch.stack(list(losses.values())).sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            # DDP warns, and copies, where it is not so.
            assert parameter.grad.stride() == parameter.stride(), name


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_finds_the_same(kind):
    model = detector(kind).eval()
    excite(model)
    images = picture()[0][None]
    with torch.no_grad():
        (whole,) = model(images, [(96, 96)])
        with torch.autocast("cpu", torch.bfloat16):
            (half,) = model(images, [(96, 96)])
    assert {name: value.dtype for name, value in half.items()} == {name: value.dtype for name, value in whole.items()}
    # Ten best of many: the same places, whatever their order.
    assert (box_iou(whole["boxes"][:10], half["boxes"]).max(1).values > 0.8).float().mean() > 0.5


@pytest.mark.parametrize("kind", REGION_KINDS)
def test_the_sample_of_an_image_does_not_depend_on_the_batch(kind, monkeypatch):
    drawn = []
    call = SeededSampler.__call__

    def recording(self, labels):
        drawn.append(call(self, labels))
        return drawn[-1]

    monkeypatch.setattr(SeededSampler, "__call__", recording)
    model = detector(kind, samples=64)
    (image, target), (other, its) = picture(seed=1), picture(seed=2)
    torch.manual_seed(0)
    model(torch.stack([other, image, other]), [(96, 96)] * 3, [its, target, nothing()], torch.tensor([8, 9, 7]))
    together = drawn.copy()
    drawn.clear()
    torch.manual_seed(1)
    model(image[None], [(96, 96)], [target], torch.tensor([9]))
    assert len(together) == len(drawn) == 2
    for batch, alone in zip(together, drawn):
        for kind_of in (0, 1):
            assert torch.equal(batch[kind_of][1], alone[kind_of][0])
    drawn.clear()
    model(image[None], [(96, 96)], [target], torch.tensor([10]))
    assert not torch.equal(drawn[0][1][0], together[0][1][1])


def test_drop_path_follows_the_seeds():
    trunk = ConvTrunk()
    trunk.stem = nn.Sequential(trunk.stem, DropPath(0.5))
    model = detector("retinanet", trunk=trunk)
    image, target = picture()
    with torch.no_grad():
        losses = [
            float(model(image[None], [(96, 96)], [target], torch.tensor([seed]))["classes"]) for seed in (1, 2, 3, 4, 1)
        ]
    assert losses[0] == losses[-1]
    assert len(set(losses)) > 1


@pytest.mark.parametrize(("kind", "steps"), [("retinanet", 60), ("cascade_rcnn", 90)])
def test_learns_one_picture(kind, steps):
    """Average precision 1 at IoU 0.5: the best box of each class is the one object that it has."""
    model = detector(kind, representation=64, samples=32)
    image, target = picture()
    train_on(model, image, target, steps)
    with torch.no_grad():
        (found,) = model(image[None], [(96, 96)])
    check_found(found, target)


def check_found(found, target):
    for label, box in enumerate(target["boxes"]):
        of_class = torch.where(found["labels"] == label)[0]
        assert len(of_class), f"class {label} is not found"
        best = of_class[0]
        assert box_iou(found["boxes"][best][None], box[None]) > 0.5
        assert found["scores"][best] == found["scores"][of_class].max()


@pytest.mark.parametrize("kind", KINDS)
def test_multiply_adds_of_heads(kind):
    """By hand: cells, kernel, inputs and outputs of each layer."""
    c, width, m, classes, samples = 32, 32, 16, 3, 512
    found = head_multiply_adds(detector(kind), (96, 128))
    if kind == "retinanet":
        cells = [12 * 16, 6 * 8, 3 * 4, 2 * 2, 1]
        expected = sum(cells) * 9 * c * (8 * c + 9 * classes + 9 * 4) + (cells[3] + cells[4]) * 9 * c * c
    else:
        cells = 24 * 32 + 12 * 16 + 6 * 8 + 3 * 4 + 2 * 2
        expected = cells * (9 * c * c + c * 3 + c * 12)
        outputs = classes + 1 + 4 if "cascade" in kind else 5 * (classes + 1)
        stages = 3 if "cascade" in kind else 1
        expected += stages * samples * (49 * c * width + width * width + width * outputs)
        if "mask" in kind:
            layers = 196 * 9 * (c * m + 3 * m * m) + 784 * m * m + 784 * m * (classes + 1)
            expected += samples // 4 * layers
    assert found == expected


def test_arguments_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="'yolo' is none of retinanet, faster_rcnn"):
        detector("yolo")
    for sizes in ([[8], [16]], [[8], [16], [32], [64], [128, 256]]):
        with pytest.raises(ValueError, match=r"sizes of anchors .* the 5 levels with strides"):
            detector("faster_rcnn", anchor_sizes=sizes)
    assert detector("retinanet", anchor_sizes=[[10], [20], [40], [80], [160]]).head.layers is not None


def test_the_gradient_of_a_map_of_one_cell_is_right_in_bfloat16():
    """oneDNN's, of a strided 3x3 kernel, holds what memory held before: the last levels are computed in float32."""
    torch.manual_seed(0)
    model = detector("retinanet")
    maps = [torch.randn(2, model.trunk.channels, 64 // stride, 64 // stride) for stride in model.trunk.strides]
    gradients = []
    for enabled in (False, True, True):
        model.zero_grad()
        junk = [torch.full((2000,), 1e30) for _ in range(100)]
        del junk
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            levels = model.head._levels([level.clone() for level in maps])
        assert levels[-1].shape[2:] == (1, 1)
        levels[-1].float().square().sum().backward()
        gradients.append(model.head.extra.p7.weight.grad.clone())
    assert torch.equal(gradients[1], gradients[2])
    torch.testing.assert_close(gradients[1], gradients[0])
