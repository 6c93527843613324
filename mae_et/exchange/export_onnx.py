"""Export to ONNX: one graph from pixels to features or logits, for any batch."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
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
    write_card,
    write_verified,
)
from mae_et.exchange.export_timm import timm_model

_USAGE = """
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession("path/to/this/folder/model.onnx")
{name}, = session.run(None, {{"pixels": np.zeros((1, {channels}, {height}, {width}), np.float32)}})
"""


class _FromPixels(nn.Module):
    """A network with the normalisation in front."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, facts: ExportFacts):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(facts.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(facts.std)[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net((pixels - self.mean) / self.std)


def export_onnx(net: nn.Module, facts: ExportFacts, folder: str | os.PathLike[str]) -> Exported:
    """Write `model.onnx`, which onnxruntime runs at any batch, and a model card.

    Input `pixels`: float32 [N, C, H, W] in [0, 1] at the final size; the normalisation is part of the graph. Output:
    `logits` [N, classes] of a classifier, else the pooled `features` [N, D]. The file's metadata hold the class names,
    the crop and the source. Above 1.5 GB of weights, torch puts them into a second file, `model.onnx.data`.

    Args:
        net: a ViT of `build_vit`, or any timm model that `torch.export` can trace; stays as it is.
        facts: of the network.
        folder: new or empty.

    Raises:
        ValueError: facts that contradict each other.
        ExportError: onnxscript or onnxruntime cannot be imported; torch cannot trace the network; `write_verified`.
    """
    check_facts(net, facts)
    onnxruntime = optional_library("onnxruntime", "onnx")
    optional_library("onnxscript", "onnx")  # torch's exporter imports it
    source = plain_copy(net)
    name = "logits" if class_count(net) else "features"

    def write(target: Path) -> None:
        program = _trace(_FromPixels(_at_final_size(source, facts), facts).eval(), facts, name)
        program.model.metadata_props.update(_metadata(facts))
        program.save(target / "model.onnx")
        channels, height, width = facts.input_size
        usage = _USAGE.format(name=name, channels=channels, height=height, width=width)
        notes = "The graph subtracts the mean and divides by the standard deviation itself."
        write_card(target, "onnx", facts, class_count(net), usage, notes)

    def reopen(target: Path) -> Outputs:
        session = onnxruntime.InferenceSession(str(target / "model.onnx"), providers=["CPUExecutionProvider"])
        return lambda pixels: [torch.from_numpy(session.run([name], {"pixels": pixels.numpy()})[0])]

    return write_verified(folder, facts, write, lambda pixels: [source(normalised(pixels, facts))], reopen)


def _at_final_size(net: nn.Module, facts: ExportFacts) -> nn.Module:
    # A ViT that takes any size would bring the resampling of its position embedding, of no use here, into the graph.
    if facts.shape is None:
        return net
    name, arguments = timm_model(facts)
    arguments |= {"num_classes": class_count(net), "dynamic_img_size": False}
    fixed = timm.create_model(name, **arguments)
    try:
        fixed.load_state_dict(net.state_dict(), strict=True)
    except RuntimeError as error:
        raise ExportError(f"the facts (shape, pooling) are another network's: {error}") from error
    return fixed


def _trace(model: nn.Module, facts: ExportFacts, output: str) -> Any:
    example = torch.rand(2, *facts.input_size)  # torch.export takes a batch of 1 for a constant
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's exporter warns of its own parts that will change
            return torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                input_names=["pixels"],
                output_names=[output],
                dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
                verbose=False,
            )
    except Exception as error:
        # torch.onnx raises errors of a private module, around whatever the trace ran into.
        raise ExportError(f"torch.onnx cannot export this network: {error}") from error


def _metadata(facts: ExportFacts) -> dict[str, str]:
    values = {"classes": facts.classes, "crop_fraction": facts.crop_fraction, "mae_et": facts.lineage}
    return {name: json.dumps(value) for name, value in values.items()}
