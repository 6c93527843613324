"""A trunk and a picture small enough for detectors that tests train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mae_et.models.detection import Detector, build_detector

KINDS = ("retinanet", "faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn")
REGION_KINDS = KINDS[1:]


class ConvTrunk(nn.Module):
    """Stands in for `Trunk`: four maps by convolutions that leave zeros zero."""

    def __init__(self, channels: int = 32, strides: tuple[int, ...] = (4, 8, 16, 32)):
        super().__init__()
        self.channels, self.strides, self.grain = channels, strides, strides[-1]
        self.stem = nn.Conv2d(3, channels, strides[0], strides[0], bias=False)
        self.down = nn.ModuleList(nn.Conv2d(channels, channels, 3, 2, 1, bias=False) for _ in strides[1:])

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [self.stem(images)]
        for layer in self.down:
            maps.append(layer(maps[-1].relu()))
        return maps


def detector(kind: Any, seed: int = 0, trunk: nn.Module | None = None, classes: int = 3, **arguments: Any) -> Detector:
    """A small detector with weights of a seed."""
    torch.manual_seed(seed)
    arguments = {"representation": 32, "mask_channels": 16, **arguments}
    return build_detector(trunk or ConvTrunk(), kind, classes, (0.5,) * 3, (0.25,) * 3, **arguments)  # pyright: ignore[reportArgumentType]


def picture(size: int = 96, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Three coloured rectangles on noise, uint8 [3, size, size], and what there is in it: one of each of 3 classes."""
    boxes = torch.tensor([[6, 8, 38, 44], [50, 12, 86, 36], [26, 54, 74, 90]])
    image = torch.randint(0, 60, (3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    masks = torch.zeros(3, size, size, dtype=torch.uint8)
    for colour, (left, top, right, bottom) in enumerate(boxes.tolist()):
        masks[colour, top:bottom, left:right] = 1
        image[colour, top:bottom, left:right] = 230
    return image, {"boxes": boxes.float(), "labels": torch.arange(3), "masks": masks}


def nothing(size: int = 96) -> dict[str, Tensor]:
    """The objects of an image without any."""
    return {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, size, size, dtype=torch.uint8),
    }


def excite(model: Detector, seed: int = 1) -> None:
    """Make an untrained detector find things everywhere: its outputs vary, and none is improbable."""
    generator = torch.Generator().manual_seed(seed)
    widen(model)
    for name, parameter in model.head.named_parameters():
        if any(part in name for part in ("cls_logits", "cls_score", "bbox_reg", "bbox_pred")):
            parameter.data.normal_(0, 0.0 if name.endswith("bias") else 0.1, generator=generator)


def widen(model: Detector) -> None:
    """Draw dense layers as suits few channels: torchvision's deviation of 0.01, for 256, leaves next to nothing."""
    for name, module in model.head.named_modules():
        if isinstance(module, nn.Conv2d) and "conv" in name:
            nn.init.kaiming_normal_(module.weight)


def train_on(model: Detector, image: Tensor, target: dict[str, Tensor], steps: int, rate: float = 3e-3) -> None:
    """AdamW on one image, with a learning rate that falls to 0."""
    widen(model)
    optimiser = torch.optim.AdamW(model.parameters(), rate)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * (1 - step / steps)
        losses: Any = model(image[None], [image.shape[1:]], [target], torch.tensor([step]))
        optimiser.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
    model.eval()
