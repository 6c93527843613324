"""What a masked patch is asked for: pixels, normalised pixels, or histograms of oriented gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from mae_et.ops.hog import hog_targets
from mae_et.ops.patches import patchify
from mae_et.sizes import TargetKind


def normalise_patches(patches: Tensor) -> Tensor:
    """Each patch [..., D] to zero mean and unit variance (unbiased, plus 1e-6): MAE's norm_pix_loss."""
    mean = patches.mean(dim=-1, keepdim=True)
    variance = patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


@torch.no_grad()
def make_targets(
    kind: TargetKind, images: Tensor, normalised: Tensor, patch_size: int, cell: int | None, bins: int
) -> Tensor:
    """Targets of all patches, float32 [N, L, values].

    Args:
        kind: "hog", "pixel" or "norm_pixel".
        images: uint8, or float in [0, 1]: HOG is computed on these, on integers where there are integers. Floats are
            not rounded: 8-bit photos turned into floats move 3 % of the HOG values, so give those as uint8.
        normalised: the same images as the encoder sees them, for the pixel targets.
        patch_size, cell, bins: px, px, count.
    """
    if kind == "hog":
        return hog_targets(images, patch_size, cell, bins)
    patches = patchify(normalised.float(), patch_size)
    return normalise_patches(patches) if kind == "norm_pixel" else patches
