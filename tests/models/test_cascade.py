"""The cascade against a plain one that goes through proposals one by one, in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mae_et.models.cascade import CascadeHeads, stage_losses
from mae_et.models.sampling import PROPOSAL_STREAM, SeededSampler
from tests.models.detectors import detector, nothing, picture

CLASSES = 3
IOU = (0.5, 0.6, 0.7)
SCALES = ((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15))
SIZES = [(80, 100), (64, 48)]


class BoxesAsFeatures(nn.Module):
    """Stands in for RoIAlign: a region's features are its box, times a map's first value."""

    def forward(self, features, boxes, image_shapes):
        return torch.cat(boxes)[:, :, None, None] / 100 * features["0"]


def cascade(seed=0, **arguments):
    torch.manual_seed(seed)
    heads = CascadeHeads(
        BoxesAsFeatures(),  # pyright: ignore[reportArgumentType]
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Tanh()),
        8,
        CLASSES,
        **{"score_thresh": 0.0, "nms_thresh": 1.0, "detections_per_img": 10**6, **arguments},
    )
    # So that boxes move by a part of their size at each stage.
    for predictor in heads.box_predictor:
        nn.init.normal_(predictor.cls_score.weight, std=1.0)
        nn.init.normal_(predictor.bbox_pred.weight, std=0.3)
    heads.fg_bg_sampler = SeededSampler(10**6, 1.0, PROPOSAL_STREAM)
    heads.fg_bg_sampler.seeds = torch.tensor([1, 2])
    return heads


def scene():
    """Proposals near and far from objects, of two images, the second with one object."""
    generator = torch.Generator().manual_seed(3)
    objects = [torch.tensor([[10.0, 12, 50, 60], [40, 5, 95, 45], [60, 50, 90, 78]]), torch.tensor([[5.0, 8, 40, 60]])]
    targets = [{"boxes": boxes, "labels": 1 + torch.arange(len(boxes)) % CLASSES} for boxes in objects]
    proposals = []
    for boxes, (height, width) in zip(objects, SIZES):
        moved = boxes.repeat(12, 1)
        moved = moved + torch.randn(moved.shape, generator=generator) * 5
        moved[:, 0::2], moved[:, 1::2] = moved[:, 0::2].clamp(0, width), moved[:, 1::2].clamp(0, height)
        proposals.append(moved)
    return proposals, targets


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def encode(box, proposal, scales):
    width, height = proposal[2] - proposal[0], proposal[3] - proposal[1]
    x, y = (box[0] + box[2] - proposal[0] - proposal[2]) / 2, (box[1] + box[3] - proposal[1] - proposal[3]) / 2
    ratios = np.log((box[2] - box[0]) / width), np.log((box[3] - box[1]) / height)
    return np.array([x / width, y / height, *ratios]) * scales


def decode(offsets, proposal, scales, size):
    x, y, wide, high = offsets / scales
    width, height = proposal[2] - proposal[0], proposal[3] - proposal[1]
    x, y = (proposal[0] + proposal[2]) / 2 + x * width, (proposal[1] + proposal[3]) / 2 + y * height
    width, height = width * np.exp(wide), height * np.exp(high)
    box = np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    return np.clip(box, 0, [size[1], size[0], size[1], size[0]])


def layers(heads, stage, box):
    """(class probabilities, offsets) that a stage has for a box."""

    def linear(layer, features):
        return layer.weight.detach().double().numpy() @ features + layer.bias.detach().double().numpy()

    features = np.tanh(linear(heads.box_head[stage][1], np.asarray(box) / 100))
    logits = linear(heads.box_predictor[stage].cls_score, features)
    odds = np.exp(logits - logits.max())
    return odds / odds.sum(), linear(heads.box_predictor[stage].bbox_pred, features)


def reference_losses(heads, proposals, targets):
    losses = {}
    boxes = [[*p.double().numpy(), *t["boxes"].double().numpy()] for p, t in zip(proposals, targets)]
    positives = []
    for stage in range(3):
        scales = np.array(SCALES[stage], dtype=float)
        of_classes = of_boxes = count = positive = 0.0
        following = []
        for of_image, target, size in zip(boxes, targets, SIZES):
            following.append([])
            for box in of_image:
                overlaps = [iou(box, one) for one in target["boxes"].double().numpy()]
                best = int(np.argmax(overlaps))
                label = int(target["labels"][best]) if overlaps[best] >= IOU[stage] else 0
                probabilities, offsets = layers(heads, stage, box)
                of_classes -= np.log(probabilities[label])
                if label:
                    error = np.abs(offsets - encode(target["boxes"][best].double().numpy(), box, scales))
                    of_boxes += np.where(error < 1 / 9, error**2 * 4.5, error - 1 / 18).sum()
                    positive += 1
                count += 1
                refined = decode(offsets, box, scales, size)
                if (refined[2:] - refined[:2] >= 1e-2).all():
                    following[-1].append(refined)
        losses |= {f"classes_{stage + 1}": of_classes / count, f"boxes_{stage + 1}": of_boxes / count}
        positives.append(positive)
        boxes = following
    return losses, positives


@pytest.mark.parametrize("seed", range(3))
def test_losses_equal_those_of_a_plain_cascade(seed):
    heads = cascade(seed)
    proposals, targets = scene()
    features = {"0": torch.ones(())}
    _, losses = heads(features, proposals, SIZES, targets)
    expected, positives = reference_losses(heads, proposals, targets)
    assert min(positives) > 0, "every stage must have objects to find"
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        # float32 sums of a hundred terms; boxes went through two stages in float32.
        assert loss.item() == pytest.approx(expected[name], rel=2e-4), name


def test_detections_are_the_last_boxes_with_mean_scores():
    heads = cascade().eval()
    proposals, _ = scene()
    with torch.no_grad():
        found, losses = heads({"0": torch.ones(())}, proposals, SIZES)
    assert losses == {}
    for of_image, boxes, size in zip(found, proposals, SIZES):
        expected = []
        for box in boxes.double().numpy():
            total = np.zeros(CLASSES + 1)
            for stage in range(3):
                probabilities, offsets = layers(heads, stage, box)
                total += probabilities / 3
                box = decode(offsets, box, np.array(SCALES[stage], dtype=float), size)
            if (box[2:] - box[:2] >= 1e-2).all():
                expected += [[label, total[label], *box] for label in range(1, CLASSES + 1)]
        expected = np.array(sorted(expected, key=lambda row: -row[1]))
        rows = torch.cat([of_image["labels"][:, None], of_image["scores"][:, None], of_image["boxes"]], 1).numpy()
        assert rows.shape == expected.shape
        # Coordinates of up to 100 px after three stages in float32.
        np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-3)


def test_gradients_of_maps_are_divided_by_the_stages_and_those_of_layers_are_not(monkeypatch):
    proposals, targets = scene()

    def gradients():
        heads = cascade()
        scale = torch.ones((), requires_grad=True)
        _, losses = heads({"0": scale}, proposals, SIZES, targets)
        torch.stack(list(losses.values())).sum().backward()
        return scale.grad, [parameter.grad for parameter in heads.parameters()]

    divided, of_layers = gradients()
    monkeypatch.setattr(torch.Tensor, "register_hook", lambda *_: None)
    whole, same = gradients()
    torch.testing.assert_close(divided * 3, whole)
    torch.testing.assert_close(of_layers, same)


def test_the_mask_head_learns_from_the_first_stage_and_sees_the_last_boxes():
    model = detector("cascade_mask_rcnn", samples=4096)
    heads = model.head.roi_heads
    seen = []
    heads.mask_roi_pool.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    image, target = picture()
    shift = torch.tensor([30.0, 0, 0, 0])
    for predictor in heads.box_predictor:
        predictor.bbox_pred.bias.data.copy_(shift)
    model(torch.stack([image] * 2), [(96, 96)] * 2, [target, nothing()], torch.tensor([1, 2]))
    assert len(seen[0][0]) >= 3  # the objects at least, which joined the proposals
    assert len(seen[0][1]) == 0
    for box in target["boxes"]:
        assert (seen[0][0] == box).all(1).any()
    model.eval()
    with torch.no_grad():
        (found,) = model(image[None], [(96, 96)])
    assert torch.equal(seen[1][0], found["boxes"])


def test_losses_are_finite_when_every_box_has_left_the_image():
    heads = cascade()
    for predictor in heads.box_predictor:
        predictor.bbox_pred.bias.data.copy_(torch.tensor([1e4, 0, 0, 0]))
    proposals, targets = scene()
    _, losses = heads({"0": torch.ones(())}, proposals, SIZES, targets)
    assert losses["classes_2"] == losses["boxes_3"] == 0
    torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in heads.parameters())
    heads.eval()
    with torch.no_grad():
        found, _ = heads({"0": torch.ones(())}, proposals, SIZES)
    assert [len(of_image["boxes"]) for of_image in found] == [0, 0]


def test_targets_of_background_are_not_read():
    offsets = torch.randn(3, 4, requires_grad=True)
    aims = torch.tensor([[-torch.inf] * 4, [0.0] * 4, [torch.nan] * 4])
    of_classes, of_boxes = stage_losses(torch.randn(3, 4), offsets, torch.tensor([0, 2, 0]), aims)
    (of_classes + of_boxes).backward()
    assert of_boxes.isfinite()
    assert offsets.grad is not None
    assert (offsets.grad[[0, 2]] == 0).all()
    assert (offsets.grad[1] != 0).all()
