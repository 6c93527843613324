"""Drop path (stochastic depth, arXiv 1603.09382) whose draws are a function of each sample's seed.

timm's draws from torch's generator for a batch as a whole, so that what is dropped depends on how a step is divided
into ranks and micro-batches. Here a sample loses the same branches wherever it is computed.
"""

from __future__ import annotations

from typing import cast

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from mae_et.models.masking import mask_noise

# How often a forward pass may call one module, each time with a draw of its own. Networks of timm that share a module
# among branches call it at most 6 times (CoaT); most have one for each branch.
MAX_CALLS = 8


class SampleDropPath(DropPath):
    """timm's drop path with factors that `SampleDraws` hands out; without them it drops nothing.

    Attributes:
        factors: float32 [MAX_CALLS, N]: 0 for a sample that loses the branch. All that a compiled block reads of the
            rate, so that one graph serves all blocks of a network.
        calls: since they came.
    """

    factors: Tensor | None
    calls: int

    def forward(self, x: Tensor) -> Tensor:
        """x [N, ...] without the dropped samples; [N * parts, ...] where a network cuts samples into parts.

        The parts of a sample, which follow each other, are dropped together; timm drops them one by one.
        """
        if not self.training or self.factors is None:
            return x
        assert self.calls < MAX_CALLS, f"the network calls one drop path more than {MAX_CALLS} times"
        factor = self.factors[self.calls].to(x.dtype)
        self.calls += 1
        if len(x) != len(factor):
            assert len(x) % len(factor) == 0, f"{len(x)} rows are no parts of {len(factor)} samples"
            factor = factor.repeat_interleave(len(x) // len(factor))
        return x * factor.view(-1, *[1] * (x.ndim - 1))


class SampleDraws(nn.Module):
    """What the drop paths of a network drop, drawn for all of them at once on the device.

    Takes the place of torch's generator in each `DropPath` of the network: they become `SampleDropPath`, in place.
    Neither has entries in a state dict.

    Args:
        net: any network; without drop path nothing happens to it.
    """

    keep: Tensor
    divisor: Tensor

    def __init__(self, net: nn.Module):
        super().__init__()
        # A list, not a ModuleList: they are the network's.
        self.paths: list[SampleDropPath] = []
        for module in net.modules():
            if isinstance(module, DropPath):
                module.__class__ = SampleDropPath
                self.paths.append(cast(SampleDropPath, module))
        self.hand_out(None)
        keep = [1 - module.drop_prob for module in self.paths]
        divisor = [kept if module.scale_by_keep and kept > 0 else 1.0 for module, kept in zip(self.paths, keep)]
        self.register_buffer("keep", torch.tensor(keep).view(-1, 1, 1), persistent=False)
        self.register_buffer("divisor", torch.tensor(divisor).view(-1, 1, 1), persistent=False)

    def factors(self, seeds: Tensor) -> Tensor:
        """What each module multiplies each sample by: float32 [modules, MAX_CALLS, N] of seeds int64 [N].

        0, or 1 divided by the share that the module keeps. Every number is drawn from its own place in the sample's
        splitmix64 stream (see `mask_noise`); the modules' order in the network says which. Nothing waits for the
        device.
        """
        noise = mask_noise(seeds, MAX_CALLS * len(self.paths)).T.reshape(MAX_CALLS, len(self.paths), -1)
        # The 24 high bits are a uniform number in [0, 1) that float32 holds exactly.
        uniform = ((noise.transpose(0, 1) >> 40) & 0xFFFFFF).float() * 2.0**-24
        return (uniform < self.keep).float() / self.divisor

    def hand_out(self, seeds: Tensor | None) -> None:
        """Give the modules their factors for the forward pass that follows; None takes them away."""
        if self.paths:
            factors = [None] * len(self.paths) if seeds is None else self.factors(seeds)
            for module, given in zip(self.paths, factors):
                module.factors, module.calls = given, 0

    def rewind(self) -> None:
        """After a forward pass: blocks that the backward pass computes again drop what they dropped."""
        for module in self.paths:
            module.calls = 0
