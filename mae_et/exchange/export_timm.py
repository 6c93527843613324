"""Export to timm: a folder for `timm.create_model("local-dir:...")`, with the layout of a model on the Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from timm.models import split_model_name_tag
from torch import nn

from mae_et.exchange.export_folder import (
    Exported,
    ExportFacts,
    Outputs,
    check_facts,
    class_count,
    normalised,
    plain_copy,
    tensors_of,
    write_card,
    write_json,
    write_verified,
)
from mae_et.sizes import ENCODER_SIZES

_USAGE = """
import timm
model = timm.create_model("local-dir:path/to/this/folder", pretrained=True).eval()  # timm >= 1.0.16
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
"""


def export_timm(net: nn.Module, facts: ExportFacts, folder: str | os.PathLike[str]) -> Exported:
    """Write `model.safetensors`, `config.json` and a model card that timm opens with no more arguments.

    `timm.create_model("local-dir:<folder>", pretrained=True)` rebuilds the shape; without `pretrained=True` timm fills
    any model with random weights. transformers' AutoModel opens the folder as well. Arguments that the user gives
    (`num_classes=10`, `img_size=384`) go before those of the file.

    Args:
        net: a ViT of `build_vit`, or any timm model; stays as it is.
        facts: of the network.
        folder: new or empty.

    Raises:
        ValueError: facts that contradict each other.
        ExportError: see `write_verified`; a timm before 1.0.16 cannot open such folders.
    """
    check_facts(net, facts)
    source = plain_copy(net)

    def write(target: Path) -> None:
        save_file(tensors_of(source), target / "model.safetensors", metadata={"format": "pt"})
        write_json(target / "config.json", timm_config(source, facts))
        write_card(target, "timm", facts, class_count(net), _USAGE)

    def reopen(target: Path) -> Outputs:
        return _outputs(timm.create_model(f"local-dir:{target}", pretrained=True).eval(), facts)

    return write_verified(folder, facts, write, _outputs(source, facts), reopen)


def timm_config(net: nn.Module, facts: ExportFacts) -> dict[str, Any]:
    """The content of timm's `config.json`; what timm does not know stands under "mae_et"."""
    name, arguments = timm_model(facts)
    if facts.shape is None and getattr(net, "dynamic_img_size", False):
        arguments |= {"img_size": facts.size, "dynamic_img_size": True}
    known: Mapping[str, Any] = getattr(net, "pretrained_cfg", {})  # networks of timm's factory have one
    classes = class_count(net)
    config = {
        "architecture": name,
        "num_classes": classes,
        "num_features": net.num_features,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": facts.input_size,
            "fixed_input_size": bool(known.get("fixed_input_size")) if facts.shape is None else False,
            "interpolation": "bicubic",
            "crop_pct": facts.crop_fraction,
            "crop_mode": "center",
            "mean": facts.mean,
            "std": facts.std,
            "num_classes": classes,
            "first_conv": known.get("first_conv") if facts.shape is None else "patch_embed.proj",
            "classifier": known.get("classifier") if facts.shape is None else "head",
        },
        "mae_et": facts.lineage,
    }
    if facts.classes:
        config["label_names"] = facts.classes
    return config


def timm_model(facts: ExportFacts) -> tuple[str, dict[str, Any]]:
    """timm's name and the arguments of `timm.create_model` that build the network, but for the number of classes."""
    shape = facts.shape
    if shape is None:
        assert facts.model
        return split_model_name_tag(facts.model.removeprefix("timm/"))[0], dict(facts.arguments)
    # Any name of a plain ViT would do, as the arguments say everything; the right one helps who reads the file.
    sizes = {(size.width, size.depth, size.heads): name for name, size in ENCODER_SIZES.items()}
    name = f"{sizes.get((shape.width, shape.depth, shape.heads))}_patch{shape.patch_size}_224"
    arguments: dict[str, Any] = {
        "img_size": shape.size,
        "patch_size": shape.patch_size,
        "in_chans": shape.channels,
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.heads,
        "mlp_ratio": shape.mlp_ratio,
        "global_pool": "avg" if facts.pooling == "mean" else "token",
        "class_token": shape.class_token,
        "dynamic_img_size": True,
    }
    if shape.layer_scale:
        arguments["init_values"] = 1.0
    return name if timm.is_model(name) else "vit_base_patch16_224", arguments


def _outputs(net: Any, facts: ExportFacts) -> Outputs:
    # Tokens or maps too: a classifier that starts at zero gives the same logits for every encoder.
    def outputs(pixels):
        images = normalised(pixels, facts)
        return net.forward_features(images), net(images)

    return outputs
