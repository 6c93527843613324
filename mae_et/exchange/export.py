"""Export of networks to other libraries; transformers and ONNX are imported when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal, get_args

from torch import nn

from mae_et.exchange.export_folder import Exported, ExportError, ExportFacts
from mae_et.exchange.export_hf import export_hf
from mae_et.exchange.export_onnx import export_onnx
from mae_et.exchange.export_timm import export_timm

ExportForm = Literal["timm", "hf", "onnx"]

__all__ = [
    "ExportError",
    "ExportFacts",
    "ExportForm",
    "Exported",
    "export",
    "export_hf",
    "export_onnx",
    "export_timm",
]

_FORMS: dict[ExportForm, Callable[[nn.Module, ExportFacts, str | os.PathLike[str]], Exported]] = {
    "timm": export_timm,
    "hf": export_hf,
    "onnx": export_onnx,
}


def export(net: nn.Module, facts: ExportFacts, form: ExportForm, folder: str | os.PathLike[str]) -> Exported:
    """Write a network to a new or empty folder in one of three forms, each opened again and compared.

    Raises:
        ValueError: unknown form, or facts that contradict each other.
        ExportError: the form does not fit the network, or the folder, or what was written gives other outputs.
    """
    if form not in get_args(ExportForm):
        raise ValueError(f"unknown form {form!r}; known: {', '.join(get_args(ExportForm))}")
    return _FORMS[form](net, facts, folder)
