"""The vision transformer after pretraining: timm's own class, in the shape that a checkpoint has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mae_et.models.locality import add_locality

Pooling = Literal["mean", "cls", "none"]


@dataclass(frozen=True)
class ViTShape:
    """Everything that decides which tensors a plain ViT has.

    Attributes:
        size: final (height, width) in px, whose grid the position embedding is stored for.
        patch_size: px.
        channels: of the images.
        width, depth, heads, mlp_ratio: of the blocks.
        class_token: whether there is one.
        layer_scale: whether blocks scale their branches (DINOv2, and DeiT III).
        locality: whether feed-forward layers hold a convolution (`mae_et.models.locality`).
    """

    size: tuple[int, int]
    patch_size: int = 16
    channels: int = 3
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    class_token: bool = True
    layer_scale: bool = False
    locality: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches at the final size."""
        return self.size[0] // self.patch_size, self.size[1] // self.patch_size


def build_vit(
    shape: ViTShape, classes: int = 0, pooling: Pooling = "mean", drop_path: float = 0.0
) -> VisionTransformer:
    """A timm `VisionTransformer` that takes any input of whole patches.

    The position embedding is one parameter at the final grid, resampled (bicubic) in forward for other grids, so that
    optimizer state and averages survive a change of B. With "mean" pooling the final norm follows the pooling
    (`fc_norm`) and leaves the class token out, as in MAE's fine-tuning.

    Args:
        shape: of the transformer.
        classes: outputs; 0 for pooled features.
        pooling: "mean" of the patches, the class token ("cls"), or "none" for dense tasks, which take all patches and
            have no use for a class token: there is none then, whatever the shape says.
        drop_path: of the last block; it rises linearly from 0 at the first.
    """
    net = VisionTransformer(
        img_size=shape.size,
        patch_size=shape.patch_size,
        in_chans=shape.channels,
        num_classes=classes,
        global_pool="avg" if pooling == "mean" else "token" if pooling == "cls" else "",
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        mlp_ratio=shape.mlp_ratio,
        init_values=1.0 if shape.layer_scale else None,
        class_token=shape.class_token and pooling != "none",
        drop_path_rate=drop_path,
        norm_layer=partial(LayerNorm, eps=1e-6),
        dynamic_img_size=True,
    )
    return add_locality(net) if shape.locality else net


def encoder_tensors(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's tensors, under timm's names, of a masked autoencoder's state dict of ours."""
    return {name.removeprefix("encoder."): value for name, value in model.items() if name.startswith("encoder.")}
