"""Which anchors and proposals a detector's loss is taken over, as a function of each image's seed."""

from __future__ import annotations

import torch
from torch import Tensor

from mae_et.models.masking import mask_noise

# One for each sampler of a model, and none of them 0: drop path draws from the seed itself (see `SampleDraws`). A
# stream begins elsewhere in the generator's sequence of 2^64 numbers.
ANCHOR_STREAM = 0x616E63686F720000
PROPOSAL_STREAM = 0x70726F706F730000


class SeededSampler:
    """Takes the place of torchvision's `BalancedPositiveNegativeSampler`, which draws from torch's generator.

    That one's choice for an image depends on the images before it, hence on ranks and micro-batches; this one's on the
    image's seed and its own labels only. Nothing waits for the device.

    Args:
        count: how many are taken of an image, at most.
        positive_share: of `count` that positives fill, at most. Negatives fill the rest.
        stream: a number of this sampler's own.

    Attributes:
        seeds: int64 [N], of the images of the forward pass that follows; whoever calls the model sets them.
    """

    seeds: Tensor | None = None

    def __init__(self, count: int, positive_share: float, stream: int):
        self.count, self.positives, self.stream = count, int(count * positive_share), stream

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Positives and negatives taken, bool [K] for each image.

        Args:
            labels: for each image, [K]: 1 and above is positive, 0 negative, below neither.
        """
        assert self.seeds is not None, "training needs the samples' seeds"
        assert len(self.seeds) == len(labels), f"{len(self.seeds)} seeds for {len(labels)} images"
        positives, negatives = [], []
        for seed, of_image in zip(self.seeds.split(1), labels):
            keys = mask_noise(seed ^ self.stream, len(of_image))[0]
            positive = _lowest(keys, of_image >= 1, self.positives, self.positives)
            positives.append(positive)
            negatives.append(_lowest(keys, of_image == 0, self.count, self.count - positive.sum()))
        return positives, negatives


def _lowest(keys: Tensor, eligible: Tensor, most: int, wanted: int | Tensor) -> Tensor:
    """Mark the `wanted` eligible elements (bool [K]) of lowest key, of which there are `most` at most."""
    keys = keys.masked_fill(~eligible, torch.iinfo(torch.int64).max)
    lowest = keys.topk(min(most, len(keys)), largest=False).indices
    taken = torch.arange(len(lowest), device=keys.device) < wanted
    return torch.zeros_like(eligible).scatter(0, lowest, taken) & eligible
