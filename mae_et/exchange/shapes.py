"""What a state dict says of the vision transformer that it belongs to."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mae_et.models.locality import CONVOLUTION
from mae_et.models.vit import ViTShape, build_vit
from mae_et.sizes import ENCODER_SIZES

# Attention heads by width where they are not width / 64: ViT-H, and timm's so400m, giant and gigantic.
_HEADS = {size.width: size.heads for size in ENCODER_SIZES.values()} | {1152: 16, 1408: 16, 1664: 16}
# What pooling and classes decide, and the grid.
_FREE = re.compile(r"(norm|fc_norm|head)\..*|pos_embed")


def infer_shape(
    tensors: Mapping[str, Tensor], heads: int | None = None, size: tuple[int, int] | None = None
) -> ViTShape | None:
    """The shape of a plain ViT.

    Args:
        tensors: timm's names.
        heads: attention heads; None takes those that ViTs of this width have.
        size: (height, width) in px that the positions are for; None takes a square.

    Returns:
        None where `build_vit` cannot make a model of exactly these tensors, whatever its head.

    Raises:
        ValueError: it can, but the grid is not square, or the number of heads cannot be inferred.
    """
    kernel, positions = tensors.get("patch_embed.proj.weight"), tensors.get("pos_embed")
    hidden = tensors.get("blocks.0.mlp.fc1.weight")
    if kernel is None or kernel.ndim != 4 or positions is None or positions.ndim != 3 or hidden is None:
        return None
    if not all(tensor.numel() for tensor in (kernel, positions, hidden)):
        return None
    width, channels, patch_size, _ = kernel.shape
    shape = ViTShape(
        size=(patch_size, patch_size),
        patch_size=patch_size,
        channels=channels,
        width=width,
        depth=_depth(tensors),
        heads=1,  # which no tensor shows
        mlp_ratio=hidden.shape[0] / width,
        class_token="cls_token" in tensors,
        layer_scale="blocks.0.ls1.gamma" in tensors,
        locality=CONVOLUTION in tensors,
    )
    if _difference(shape, tensors) is not None:
        return None
    if size is None:
        side = math.isqrt(positions.shape[1] - shape.class_token)
        if side**2 != positions.shape[1] - shape.class_token:
            if math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
                return None  # maybe a model whose class token has no position, maybe a rectangle
            raise ValueError(f"its {positions.shape[1]} positions are not those of a square grid")
        size = (side * patch_size, side * patch_size)
    return replace(shape, size=size, heads=heads or _infer_heads(width))


def check_tensors(shape: ViTShape, tensors: Mapping[str, Tensor]) -> None:
    """Check that tensors are those of a shape, whatever their head.

    Raises:
        ValueError: naming one that is not, and how it differs.
    """
    # What is stated may be of any size: one block too many is enough to tell that there are too many.
    bounded = replace(shape, depth=min(shape.depth, _depth(tensors) + 1))
    try:
        difference = _difference(bounded, tensors)
    except (RuntimeError, OverflowError, TypeError) as error:  # numbers that overflow, in torch's several words
        difference = f"there can be no tensors of it ({str(error).partition(chr(10))[0]})"
    rows, columns = shape.grid
    wanted = (1, rows * columns + shape.class_token, shape.width)
    if difference is None and tuple(tensors["pos_embed"].shape) != wanted:
        difference = f"pos_embed is {_text(tensors['pos_embed'])}, not {list(wanted)}"
    if difference is not None:
        raise ValueError(f"its tensors are not those of the shape that the run states: {difference}")


def _difference(shape: ViTShape, tensors: Mapping[str, Tensor]) -> str | None:
    """The first tensor that differs from those of a shape, beside its head and the number of positions."""
    with torch.device("meta"):
        wanted = {name: t for name, t in build_vit(shape).state_dict().items() if not _FREE.fullmatch(name)}
    missing = [name for name in (*wanted, "pos_embed") if name not in tensors]
    if missing:
        return f"{missing[0]} is missing"
    extra = [name for name in tensors if name not in wanted and not _FREE.fullmatch(name)]
    if extra:
        return f"{extra[0]} belongs to another model"
    wrong = [name for name, tensor in wanted.items() if tensors[name].shape != tensor.shape]
    return f"{wrong[0]} is {_text(tensors[wrong[0]])}, not {_text(wanted[wrong[0]])}" if wrong else None


def _depth(tensors: Mapping[str, Tensor]) -> int:
    return len({name.split(".")[1] for name in tensors if re.match(r"blocks\.\d+\.", name)})


def _infer_heads(width: int) -> int:
    if width in _HEADS:
        return _HEADS[width]
    if width % 64:
        raise ValueError(f"the attention heads of a ViT of width {width} cannot be inferred; give model.heads=...")
    return width // 64


def _text(tensor: Tensor) -> str:
    return str(list(tensor.shape))
