"""Export to Hugging Face transformers: a folder for `ViTModel` or `ViTForImageClassification`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from mae_et.exchange.export_folder import (
    Exported,
    ExportError,
    ExportFacts,
    Outputs,
    check_facts,
    class_count,
    normalised,
    optional_library,
    plain_copy,
    tensors_of,
    write_card,
    write_json,
    write_verified,
)
from mae_et.models.vit import ViTShape

# timm's names and those of transformers 4, which transformers 5 renames as it loads them.
_NAMES = [
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.layer.\1.layernorm_before."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.layer.\1.layernorm_after."),
    (r"^blocks\.(\d+)\.attn\.(query|key|value)\.", r"encoder.layer.\1.attention.attention.\2."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.output.dense."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layer.\1.intermediate.dense."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layer.\1.output.dense."),
    (r"^norm\.", "layernorm."),
]
_USAGE = """
from transformers import AutoImageProcessor, {name}
processor = AutoImageProcessor.from_pretrained("path/to/this/folder")
model = {name}.from_pretrained("path/to/this/folder"{arguments}).eval()
"""
_RECTANGLE = """The processor resizes both sides by themselves, as transformers cannot resize to cover a rectangle: cut
images to its proportions first."""


def export_hf(net: nn.Module, facts: ExportFacts, folder: str | os.PathLike[str]) -> Exported:
    """Write a folder that `transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False)` opens.

    With a classifier, `ViTForImageClassification.from_pretrained(folder)` opens it. `AutoImageProcessor` finds the
    preprocessing: the short side to size / crop_fraction, and the centre. Of a rectangle it resizes both sides instead.

    Args:
        net: a ViT of `build_vit` with pooling "cls"; stays as it is.
        facts: of the network.
        folder: new or empty.

    Raises:
        ValueError: facts that contradict each other.
        ExportError: transformers' ViT has nothing of this kind, or cannot be imported; see `write_verified` too.
    """
    check_facts(net, facts)
    shape = _plain_shape(facts)
    transformers = optional_library("transformers", "hf")
    source = plain_copy(net)
    classes = class_count(net)

    def write(target: Path) -> None:
        tensors = hf_tensors(tensors_of(source), classifier=classes > 0)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        write_json(target / "config.json", hf_config(shape, facts, classes))
        write_json(target / "preprocessor_config.json", hf_processor(shape, facts))
        name, arguments = ("ViTForImageClassification", "") if classes else ("ViTModel", ", add_pooling_layer=False")
        notes = _RECTANGLE if shape.size[0] != shape.size[1] else ""
        write_card(target, "transformers", facts, classes, _USAGE.format(name=name, arguments=arguments), notes)

    def reopen(target: Path) -> Outputs:
        with _quiet(transformers):
            if classes:
                return _opened(transformers.ViTForImageClassification.from_pretrained(str(target)).eval(), facts)
            encoder = transformers.ViTModel.from_pretrained(str(target), add_pooling_layer=False)
            return _opened(encoder.eval(), facts)

    return write_verified(folder, facts, write, _source(source, facts), reopen)


def hf_tensors(tensors: dict[str, Tensor], classifier: bool) -> dict[str, Tensor]:
    """timm's tensors of a plain ViT under transformers' names, queries, keys and values apart.

    Raises:
        ExportError: a tensor that transformers' ViT has no place for.
    """
    prefix = "vit." if classifier else ""
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.startswith("head."):
            renamed[name.replace("head.", "classifier.", 1)] = value
        elif ".attn.qkv." in name:
            for part, rows in zip(("query", "key", "value"), value.chunk(3)):
                renamed[prefix + _rename(name.replace("qkv", part))] = rows.clone()
        else:
            renamed[prefix + _rename(name)] = value
    return renamed


def hf_config(shape: ViTShape, facts: ExportFacts, classes: int) -> dict[str, Any]:
    """The content of transformers' `config.json`; what transformers does not know stands under "mae_et"."""
    height, width = shape.size
    config: dict[str, Any] = {
        "architectures": ["ViTForImageClassification" if classes else "ViTModel"],
        "model_type": "vit",
        "image_size": height if height == width else [height, width],
        "patch_size": shape.patch_size,
        "num_channels": shape.channels,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": int(shape.width * shape.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "encoder_stride": shape.patch_size,
        "mae_et": facts.lineage,
    }
    if classes:
        names = facts.classes or tuple(f"LABEL_{i}" for i in range(classes))
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    return config


def hf_processor(shape: ViTShape, facts: ExportFacts) -> dict[str, Any]:
    """The content of `preprocessor_config.json`.

    transformers' own ViT processor has no crop, so this is BiT's, which has what a ViT's test images go through.
    """
    height, width = shape.size
    resized = [round(side / facts.crop_fraction) for side in shape.size]
    square = height == width
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": shape.channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": resized[0]} if square else {"height": resized[0], "width": resized[1]},
        "resample": 3,  # PIL's number of bicubic
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": facts.mean,
        "image_std": facts.std,
    }


def _plain_shape(facts: ExportFacts) -> ViTShape:
    shape = facts.shape
    if shape is None:
        missing = f"form for {facts.model}"
    elif not shape.class_token:
        missing = "form without a class token"
    elif shape.layer_scale:
        missing = "layer scale (its Dinov2 has, but that is another model)"
    elif facts.pooling != "cls":
        missing = "mean pooling with a norm after it (an encoder can leave with pooling cls, all tokens normalised)"
    else:
        return shape
    raise ExportError(
        f"transformers' ViT has no {missing}: export to timm instead; "
        "transformers' AutoModel and AutoModelForImageClassification open that folder too, where timm is installed"
    )


def _rename(name: str) -> str:
    for pattern, replacement in _NAMES:
        renamed, hits = re.subn(pattern, replacement, name)
        if hits:
            return renamed
    raise ExportError(f"transformers' ViT has no place for the tensor {name}: export to timm instead")


def _source(net: Any, facts: ExportFacts) -> Outputs:
    def outputs(pixels):
        images = normalised(pixels, facts)
        tokens = net.forward_features(images)
        return (tokens, net.forward_head(tokens)) if class_count(net) else (tokens,)

    return outputs


def _opened(model: Any, facts: ExportFacts) -> Outputs:
    def outputs(pixels):
        images = normalised(pixels, facts)
        if hasattr(model, "classifier"):
            return model.vit(images).last_hidden_state, model(images).logits
        return (model(images).last_hidden_state,)

    return outputs


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """transformers without its progress bars and notices, which are about models of its own."""
    logs = transformers.utils.logging
    verbosity, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
        if bars:
            logs.enable_progress_bar()
