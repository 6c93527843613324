"""A network of timm's as it meets images: pixels in [0, 1] go in, normalised inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from mae_et.models.drop_path import SampleDraws
from mae_et.models.normalised import Normalised


class Classifier(Normalised):
    """A timm network behind the normalisation of its data.

    Its state dict is the network's with `net.` before every name.

    Args:
        net: of normalised float [N, C, H, W], to logits or features; its drop paths henceforth follow the samples'
            seeds (see `SampleDraws`).
        mean, std: per channel, for pixels in [0, 1].
    """

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__(mean, std)
        self.net = net
        self.draws = SampleDraws(net)

    def forward(self, images: Tensor, seeds: Tensor | None = None) -> Tensor:
        """The network's output for uint8 or [0, 1] images [N, C, H, W].

        Args:
            images: any number of them.
            seeds: int64 [N], of the samples, from which drop path is drawn; without them, as in evaluation mode,
                nothing is dropped. Where activations are computed again in the backward pass, make it before the next
                forward pass, whose draws take the place of these.
        """
        self.draws.hand_out(seeds if self.training else None)
        output = self.net(self.normalise(images))
        self.draws.rewind()
        return output


def head_name(net: nn.Module) -> str:
    """Name of a timm network's last layer: "head" of a ViT, "fc" of a ResNet, "head.fc" of a ConvNeXt."""
    head = net.get_classifier()  # pyright: ignore[reportCallIssue]
    return next(name for name, module in net.named_modules() if module is head)


def reset_head(net: nn.Module, std: float) -> None:
    """Draw the last layer anew: weights from a normal distribution cut at two deviations, biases 0.

    MAE fine-tunes from 2e-5 and probes from 0.01.
    """
    head = net.get_classifier()  # pyright: ignore[reportCallIssue]
    *_, last = (module for module in head.modules() if isinstance(module, nn.Linear | nn.Conv2d))
    trunc_normal_(last.weight, std=std)
    if last.bias is not None:
        nn.init.zeros_(last.bias)


class FrozenProbe(nn.Module):
    """MAE's linear probe: a frozen encoder, BatchNorm without weights, and one linear layer.

    Args:
        net: a timm network without head; its weights get no gradient.
        embed: (net, normalised images) to features [N, width].
        width: of the features.
        classes: outputs.
    """

    def __init__(self, net: nn.Module, embed: Callable[[nn.Module, Tensor], Tensor], width: int, classes: int):
        super().__init__()
        self.net, self.embed = net.requires_grad_(False), embed
        self.normalise_features = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.head = nn.Linear(width, classes)
        trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> FrozenProbe:
        """The head learns; the encoder stays as in evaluation."""
        super().train(mode)
        self.net.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits of normalised images."""
        with torch.no_grad():
            features = self.embed(self.net, images)
        return self.head(self.normalise_features(features.float()))
