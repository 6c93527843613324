"""torchvision's own small networks, from scratch, for as long as a run of ours took, on its images and by its scores.

    python benchmarks/dense_peers.py runs/bccd_small
    python benchmarks/dense_peers.py runs/pennfudan_small
    python benchmarks/dense_peers.py runs/pennfudan_scenes

The run says which images, which sizes, which augmentation and which batch, and how many seconds of training it took (or
give --seconds). Detectors are Faster R-CNN on MobileNetV3-Large with torchvision's 320-px settings, and for masks Mask
R-CNN on a ResNet-18 with a feature pyramid; the segmenter is LR-ASPP on MobileNetV3-Large. AdamW; the learning rate
warms up over the first twentieth of the time and falls on half a cosine; gradients are clipped to norm 1. Training
is under bf16 autocast, as ours, or in fp32 with --fp32: torchvision's Mask R-CNN became NaN under autocast, which
decodes boxes in bf16.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import MaskRCNN, fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from mae_et import detecting, segmenting
from mae_et.config import DetectConfig, SegmentConfig, task_of
from mae_et.config.kept import kept_config
from mae_et.curriculum.stage import as_size
from mae_et.data.detection_transforms import FitTransform, unfit_boxes
from mae_et.data.loader import batches_of, build_loader
from mae_et.data.randomness import sample_seed
from mae_et.data.requests import SampleRequest
from mae_et.data.sampler import pass_order
from mae_et.data.segmentation_transforms import pad_to_multiple, resize_short_side
from mae_et.engine.checkpoint import latest_checkpoint
from mae_et.evaluation.detection import DetectionTally
from mae_et.evaluation.segmentation import ConfusionTally
from mae_et.models.normalised import IMAGENET_MEAN, IMAGENET_STD


class Endless:
    """Requests of a batch at a time, pass after pass, drawn as a run's are."""

    def __init__(self, images: int, batch: int, size: tuple[int, int], seed: int):
        self.images, self.batch, self.size, self.seed = images, batch, size, seed

    def __iter__(self) -> Iterator[list[SampleRequest]]:
        position, number = 0, 0
        while True:
            order = pass_order(self.images, self.seed, number)
            number += 1
            for first in range(0, self.images - self.batch + 1, self.batch):
                chosen = order[first : first + self.batch]
                yield [
                    SampleRequest(int(image), self.size, 0.0, sample_seed(self.seed, position + k))
                    for k, image in enumerate(chosen)
                ]
                position += self.batch


def normalised(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 3, H, W] as networks of torchvision want them."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.float() / 255 - mean) / std


def detector(classes: int, masks: bool, size: tuple[int, int]) -> nn.Module:
    """A small detector; its own resizing is made to do nothing to images of `size`."""
    plain: dict[str, Any] = {"min_size": min(size), "max_size": max(size)}
    if masks:
        backbone = resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
        )
        return MaskRCNN(backbone, classes + 1, **plain)
    return fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=classes + 1, trainable_backbone_layers=6, **plain
    )


def fit(
    model: nn.Module,
    loss: Callable[[Any], torch.Tensor],
    dataset: Any,
    config: Any,
    seconds: float,
    rate: float,
    bf16: bool,
) -> int:
    """Train for so many seconds of steps; returns how many there were."""
    size = as_size(config.data.size)
    sampler: Any = Endless(len(dataset.source), config.optim.batch, size, config.seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # MobileNet's 0.01 is for many more steps than there are here
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    model.train()
    steps, spent = 0, 0.0
    with batches_of(build_loader(dataset, sampler, 1, False)) as batches:
        batch = next(batches)  # workers start before the clock does
        while spent < seconds:
            started = time.perf_counter()
            u = spent / seconds
            factor = u / 0.05 if u < 0.05 else 0.5 * (1 + math.cos(math.pi * (u - 0.05) / 0.95))
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                value = loss(batch)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            batch = next(batches)
            spent += time.perf_counter() - started
            if steps % 50 == 0:
                print(f"step {steps}  {spent:.0f} of {seconds:.0f} s  loss {value.item():.3f}", flush=True)
    model.eval()
    return steps


def peer_of_detector(config: DetectConfig, seconds: float, rate: float, bf16: bool) -> str:
    """AP of torchvision's detector on the run's test images."""
    images = detecting.open_objects(config, 3, print)
    masks, size = detecting.wants_masks(config), as_size(config.data.size)
    model = detector(len(images.classes), masks, size)
    dataset = detecting.parts(config).dataset(images.train)

    def loss(batch: Any) -> torch.Tensor:
        targets = [{**target, "labels": target["labels"] + 1} for target in batch.targets()]
        return sum(model(list(batch.images.float() / 255), targets).values(), torch.zeros(()))

    steps = fit(model, loss, dataset, config, seconds, rate, bf16)
    source = images.test or images.val
    assert source is not None, "the run has neither test nor held-out images"
    tally, fitted = DetectionTally(len(source.classes), masks), FitTransform()
    for index in range(len(source)):
        image = source.image(index)
        padded, inner = fitted(image, size)
        original = (image.shape[1], image.shape[2])
        with torch.no_grad():
            (found,) = model([padded.float() / 255])
        boxes = unfit_boxes(found["boxes"], inner, original)
        # torchvision pastes masks into the padded image: those of this size are cut out and resized back.
        pasted = None
        if masks:
            whole = found["masks"][:, :, : inner[0], : inner[1]]
            pasted = (F.interpolate(whole, size=original, mode="bilinear")[:, 0] > 0.5).to(torch.uint8)
        tally.add(index, boxes, found["scores"], found["labels"] - 1, source.instances(index, masks), pasted)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return f"{type(model).__name__}, {parameters:.1f} M parameters, {steps} steps: {detecting.in_words(tally.result())}"


def peer_of_segmenter(config: SegmentConfig, seconds: float, rate: float, bf16: bool) -> str:
    """mIoU of torchvision's segmenter on the run's test images."""
    images = segmenting.open_scenes(config, 3)
    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=len(images.classes))

    def loss(batch: Any) -> torch.Tensor:
        logits = model(normalised(batch.images))["out"].float()
        return F.cross_entropy(logits, batch.masks.long(), ignore_index=255)

    steps = fit(model, loss, segmenting.parts(config).dataset(images.train), config, seconds, rate, bf16)
    source, how = images.test or images.val, segmenting.examination(config)
    assert source is not None, "the run has neither test nor held-out images"
    tally = ConfusionTally(len(source.classes), "cpu")
    for index in range(len(source)):
        image, mask = source.image(index), source.mask(index)
        resized = resize_short_side(image, how.short, longest=how.longest)
        with torch.no_grad():
            logits = model(normalised(pad_to_multiple(resized[None], 16)))["out"][
                :, :, : resized.shape[1], : resized.shape[2]
            ]
        classes = F.interpolate(logits, size=mask.shape, mode="bilinear").argmax(1)[0]
        tally.add(classes.to(torch.uint8), mask)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return f"LR-ASPP, {parameters:.1f} M parameters, {steps} steps: mIoU {100 * tally.result().miou:.2f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run's folder")
    parser.add_argument("--seconds", type=float, help="of training; by default the run's own")
    parser.add_argument("--fp32", action="store_true", help="train in fp32")
    parser.add_argument("--rate", type=float, default=5e-4, help="peak learning rate")
    options = parser.parse_args()
    file = options.run / "config.yaml"
    detects = task_of(file) == "detect"
    config = kept_config(file, DetectConfig if detects else SegmentConfig)
    checkpoint = latest_checkpoint(options.run / "checkpoints")
    seconds = options.seconds or json.loads(json.dumps(checkpoint.state))["seconds"] if checkpoint else options.seconds
    if seconds is None:
        parser.error(f"{options.run} has no checkpoint yet: give --seconds")
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    torch.manual_seed(config.seed)
    peer: Callable[..., str] = peer_of_detector if detects else peer_of_segmenter
    print(
        f"{peer(config, seconds, options.rate, not options.fp32)} ({seconds:.0f} s, {torch.get_num_threads()} threads)"
    )


if __name__ == "__main__":
    main()
