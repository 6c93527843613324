"""Any timm model, built so that one instance takes every B of a curriculum, and what one must know of it beforehand."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mae_et.curriculum.stage import format_size
from mae_et.models.windows import follow_windows, load_tables

Size = tuple[int, int]
T = TypeVar("T")

# Trained in the EfficientTrain papers, and not in timm: how their names begin, and what comes closest.
_ABSENT = {
    r"cswin": ("CSWin", "swin_tiny_patch4_window7_224"),
    r"pvt_?(v1|tiny|small|medium|large)": ("PVT (the first version)", "pvt_v2_b1"),
}
_OWN_ARGUMENTS = {
    "num_classes": "classes",
    "img_size": "size",
    "in_chans": "channels",
    "drop_path_rate": "drop_path",
    "pretrained": "pretrained",
}


def build_backbone(
    name: str,
    *,
    classes: int,
    size: Size,
    channels: int,
    drop_path: float,
    arguments: Mapping[str, Any],
    pretrained: bool = False,
) -> nn.Module:
    """A timm model whose one set of parameters serves images of every size.

    Parameters are those of timm's own model at the final size. At other sizes, learned positions of ViTs are resampled
    in forward by timm, windows and relative position tables of Swin by `mae_et.models.windows`; convolutions, PVTv2
    and CAFormer need nothing. Other kinds are built at the final size, and `check_sizes` tells whether they take more.

    Args:
        name: timm's, with or without "timm/" and a tag of pretrained weights.
        classes: outputs; 0 for pooled features.
        size: final (height, width) in px. Swin's window at that size is timm's unless the arguments hold
            `window_size`; the EfficientTrain scripts take size / 32.
        channels: of the images; 1 for grey.
        drop_path: maximum rate of dropped residual branches (see `scaled_drop_path`).
        arguments: passed to timm as they are, such as `depths` or `patch_size`.
        pretrained: load timm's weights, from the network or its cache.

    Raises:
        ValueError: timm lacks the model, the model lacks one of the arguments, or it takes no drop path.
    """
    name = name.removeprefix("timm/")
    _check_name(name)
    for argument in _OWN_ARGUMENTS.keys() & arguments.keys():
        raise ValueError(f"arguments of {name} hold {argument!r}: set `{_OWN_ARGUMENTS[argument]}` instead")
    # Families that do not know one of these refuse it.
    wishes = {"img_size": size, "dynamic_img_size": True, "drop_path_rate": drop_path}
    fixed = {"num_classes": classes, "in_chans": channels} | dict(arguments)
    swin = name.partition(".")[0] in timm.list_models(module="swin_transformer")
    model = _create(name, fixed, wishes, pretrained and not swin)
    if isinstance(model, SwinTransformer):
        follow_windows(model)
        if pretrained:
            fixed.pop("window_size", None)
            load_tables(model, cast(SwinTransformer, _create(name, fixed, {}, pretrained=True)))
    return model


def check_sizes(model: nn.Module, sizes: Sequence[Size], channels: int) -> None:
    """Run two images of each size through a copy of the model that holds no data, in training and evaluation mode.

    Args:
        model: of any kind; where it has `num_classes`, so many outputs are expected.
        sizes: (height, width) in px of every stage, and of evaluation.
        channels: of the images.

    Raises:
        ValueError: the model cannot take a size, or does not give one row of outputs per image.
    """
    failures = {size: reason for size in dict.fromkeys(sizes) if (reason := _failure(model, size, channels))}
    for size, reason in failures.items():
        fits = [format_size(other) for other in dict.fromkeys(sizes) if other not in failures]
        step = _largest_reduction(model) or 1
        if any(side % step for side in size):
            advice = f"multiples of {step}"
        else:
            advice = f"another model, or from the sizes that it takes ({', '.join(fits) or 'none of those asked'})"
        raise ValueError(f"model {_name(model)} cannot take B={format_size(size)}: {reason}; choose {advice}")


def multiply_adds(model: nn.Module, sizes: Sequence[Size], channels: int) -> dict[Size, float]:
    """Multiply-adds of a forward pass of one image, by size: matrix products and convolutions, as torch counts them.

    Nothing is computed: a copy of the model without data is run on shapes alone. Sizes are those that `check_sizes`
    lets pass; at others the model's own error comes through.
    """
    different = dict.fromkeys(sizes)
    return {size: _attempt(_flops, model, size, channels, images=1, training=False) / 2 for size in different}


def stride(model: nn.Module) -> int:
    """What B should be a multiple of, in px, so that every feature map of a timm model has whole cells.

    The patch of a plain transformer; input pixels per cell of the last map of a model with stages, as timm states it.

    Raises:
        ValueError: the model states none.
    """
    reduction = _largest_reduction(model)
    if reduction is None:
        raise ValueError(f"model {_name(model)} states no stride (`feature_info`): choose another model of timm")
    return reduction


def scaled_drop_path(maximum: float, epochs: float, reference: float = 200) -> float:
    """The maximum drop path rate for a budget: proportional to it.

    Source: the EfficientTrain++ scripts, `base * E / 200`, E being the budget in epochs at the final size. Their bases:
    ResNet-50 0, DeiT-S 0.1, ConvNeXt-T/S/B 0.1/0.4/0.5, Swin-T/S/B 0.2/0.3/0.5, CSWin-T/S/B 0.2/0.4/0.5.

    Raises:
        ValueError: the result is not in [0, 1).
    """
    rate = maximum * epochs / reference
    if not 0 <= rate < 1:
        raise ValueError(
            f"drop path {maximum} of {reference:g} epochs is {rate:g} at {epochs:g} epochs, outside [0, 1): "
            "lower the maximum"
        )
    return rate


def _name(model: nn.Module) -> str:
    facts = getattr(model, "pretrained_cfg", None) or {}
    return facts.get("architecture") or type(model).__name__


def _largest_reduction(model: nn.Module) -> int | None:
    return max((level["reduction"] for level in getattr(model, "feature_info", [])), default=None)


def _check_name(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        for beginning, (family, instead) in _ABSENT.items():
            if re.match(beginning, architecture.lower()):
                raise ValueError(f"timm has no {family}, which the paper trains as well: choose {instead}, for one")
        known = timm.list_models()
        near = [other for other in known if other.startswith(architecture)] if architecture else []
        near = (near + difflib.get_close_matches(architecture, known, 5, 0.5))[:5]
        raise ValueError(f"timm has no model {architecture!r}; nearest names: {', '.join(near) or 'none'}")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(architecture)]
    if tag and tag not in tags:
        raise ValueError(f"timm has no weights {tag!r} of {architecture}; it has {', '.join(tags) or 'none'}")


def _create(name: str, fixed: dict[str, Any], wishes: dict[str, Any], pretrained: bool) -> nn.Module:
    """Build with those of the wishes that the model's constructor knows; its TypeError names the others."""
    while True:
        try:
            return timm.create_model(name, pretrained=pretrained, **(wishes | fixed))
        except TypeError as error:
            found = re.search(r"(unexpected|multiple values for) keyword argument(.*)", str(error))
            refused = set(re.findall(r"'(\w+)'", found[2])) if found else set()
            if not refused:
                raise
            if foreign := sorted(refused & fixed.keys()):
                why = "does not know the" if found and found[1] == "unexpected" else "has its own"
                raise ValueError(f"{name} {why} arguments {', '.join(foreign)}: leave them out") from error
            if "drop_path_rate" in refused and wishes["drop_path_rate"]:
                rate = wishes["drop_path_rate"]
                raise ValueError(f"{name} takes no drop path (drop_path={rate}): set it to 0") from error
            wishes = {key: value for key, value in wishes.items() if key not in refused}


def _failure(model: nn.Module, size: Size, channels: int) -> str | None:
    """Why the model cannot take a size, in one line; None where it can."""
    classes = getattr(model, "num_classes", 0)
    try:
        for training in (False, True):
            output = _attempt(_output, model, size, channels, images=2, training=training)
            if not isinstance(output, Tensor):
                return f"it gives a {type(output).__name__}, not one tensor [N, classes]"
            if output.ndim != 2 or len(output) != 2 or (classes and output.shape[1] != classes):
                return f"its output for 2 images is {list(output.shape)}, not [2, {classes or 'features'}]"
    # A model may fail in any way on shapes that it was not made for.
    except Exception as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return None


def _attempt(
    run: Callable[[nn.Module, Tensor], T], model: nn.Module, size: Size, channels: int, images: int, training: bool
) -> T:
    """Run images of a size through a copy: without data if the model allows it, else zeros in evaluation mode."""
    with torch.no_grad():
        try:
            return run(without_data(model).train(training), torch.empty(images, channels, *size, device="meta"))
        except Exception:
            device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
            copied = _with_plain_attention(copy.deepcopy(model)).eval()
            return run(copied, torch.zeros(images, channels, *size, device=device))


def _output(model: nn.Module, images: Tensor) -> Any:
    return model(images)


def _flops(model: nn.Module, images: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops()


def without_data(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device: shapes and code, nothing stored."""
    copies: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        copies[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return _with_plain_attention(copy.deepcopy(model, copies))


def _with_plain_attention(model: nn.Module) -> nn.Module:
    """Turn off timm's fused attention, in place: torch's counter misses a part of it."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # pyright: ignore[reportArgumentType]
    return model
