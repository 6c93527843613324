"""Number formats: what products are computed in, and the scaler that fp16 needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # On x86 without these instructions oneDNN emulates bf16, slower than fp32.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, probe, bool)() for probe in probes)


@dataclass(frozen=True)
class Precision:
    """The autocast type of a run on a device.

    Attributes:
        name: "bf16", "fp16" or "fp32".
        device_type: "cpu", "cuda" or "mps".
    """

    name: str
    device_type: str

    @classmethod
    def choose(cls, name: str, device: torch.device) -> Precision:
        """Resolve "auto": bf16 where the hardware has it, else fp16 on a GPU and fp32 on a CPU."""
        if name == "auto":
            name = "bf16" if fast_bf16(device) else "fp16" if device.type == "cuda" else "fp32"
        return cls(name, device.type)

    def autocast(self) -> AbstractContextManager[object]:
        """Context for the forward pass."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device_type, DTYPES[self.name])

    def scaler(self) -> torch.amp.GradScaler | None:
        """Loss scaler for fp16, whose range is too short for gradients; None otherwise."""
        return torch.amp.GradScaler(self.device_type) if self.name == "fp16" else None


def choose_attention(model: nn.Module, precision: Precision) -> None:
    """Let timm's attention layers multiply matrices plainly where torch's fused attention is slower: bf16 on a CPU.

    Measured by benchmarks/attention.py on two Zen 5 cores with torch 2.14, forward and backward of 256 sequences with
    heads of 32, in ms, fused against plain: 26 tokens 27 / 6, 50 tokens 47 / 21, 101 tokens 85 / 64, 197 tokens
    115 / 84. In fp32 fused is as fast or up to 2.1 times faster.
    """
    if precision.device_type == "cpu" and precision.name != "fp32":
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                setattr(module, "fused_attn", False)  # noqa: B010 - Final in timm, for TorchScript alone
