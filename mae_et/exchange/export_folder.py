"""A folder for another library: written beside its place, opened by that library, compared, then renamed."""

from __future__ import annotations

import copy
import importlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mae_et.engine.run_folder import fsync_folder
from mae_et.models.vit import Pooling, ViTShape

# Outputs of one network, in one order, from pixels [N, C, H, W] in [0, 1].
Outputs: TypeAlias = Callable[[Tensor], Sequence[Tensor]]

TOLERANCE = 1e-4
_BATCHES = (1, 3)


class ExportError(RuntimeError):
    """A network cannot leave in the wanted form; the message says why and what can be done instead."""


@dataclass(frozen=True)
class ExportFacts:
    """What a network's tensors do not say of it.

    Attributes:
        shape: of a plain ViT; None for another timm model, which `model` and `arguments` then rebuild.
        pooling: of a plain ViT.
        classes: names of the outputs, in order; empty if they have none, or for an encoder.
        mean, std: one value per channel, subtracted from and divided into pixels in [0, 1].
        crop_fraction: share of the resized image that the centre crop of a test image keeps.
        source: where the weights come from (run, checkpoint, configuration), for the config and the model card.
        model: timm's name, "timm/resnet50" or "resnet50", where `shape` is None.
        arguments: of `timm.create_model` for that name, all that were given but for the number of classes.
        size: (height, width) in px of that model's test images.
    """

    shape: ViTShape | None
    pooling: Pooling | None
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_fraction: float
    source: Mapping[str, Any]
    model: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    size: tuple[int, int] | None = None

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of one test image."""
        size = self.shape.size if self.shape else self.size
        assert size
        return len(self.mean), *size

    @property
    def lineage(self) -> dict[str, Any]:
        """`source` in values that JSON has; others as their text."""
        return json.loads(json.dumps(dict(self.source), default=str))


@dataclass(frozen=True)
class Exported:
    """A folder that its library has opened.

    Attributes:
        folder: where it lies.
        files: names in it, sorted.
        difference: largest absolute difference between the outputs of the source and of what was opened.
    """

    folder: Path
    files: tuple[str, ...]
    difference: float


def check_facts(net: nn.Module, facts: ExportFacts) -> None:
    """Raise ValueError where the facts contradict each other or the number of the network's outputs."""
    if facts.shape is None and (facts.model is None or facts.size is None):
        raise ValueError("shape=None: a model that is no plain ViT needs the facts `model` (timm's name) and `size`")
    if facts.shape is not None and len(facts.mean) != facts.shape.channels:
        raise ValueError(f"mean={facts.mean} for images of {facts.shape.channels} channels: give one value for each")
    if len(facts.std) != len(facts.mean):
        raise ValueError(f"std={facts.std} has not as many values as mean={facts.mean}: give one per channel")
    if not 0 < facts.crop_fraction <= 1:
        raise ValueError(f"crop_fraction={facts.crop_fraction}: needs a share of the image, above 0 and at most 1")
    outputs = class_count(net)
    if facts.classes and len(facts.classes) != outputs:
        raise ValueError(f"{len(facts.classes)} class names for {outputs} outputs: give one for each, or none")


def class_count(net: nn.Module) -> int:
    """Outputs of a timm model's classifier, 0 for an encoder."""
    count = net.num_classes
    assert isinstance(count, int)
    return count


def plain_copy(net: nn.Module) -> nn.Module:
    """A copy of the network that computes in fp32 on the CPU, in eval mode, without gradients."""
    return copy.deepcopy(net).cpu().float().eval().requires_grad_(False)


def tensors_of(net: nn.Module) -> dict[str, Tensor]:
    """The state dict in the layout that safetensors wants."""
    return {name: value.contiguous() for name, value in net.state_dict().items()}


def normalised(pixels: Tensor, facts: ExportFacts) -> Tensor:
    """Pixels in [0, 1] as the network takes them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (facts.mean, facts.std))
    return (pixels - mean) / std


def optional_library(name: str, form: str) -> ModuleType:
    """Import a library that only exports need.

    Raises:
        ExportError: it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(
            f"export to {form} needs {name}, which cannot be imported here ({error}): pip install 'mae_et[export]'"
        ) from error


def write_verified(
    folder: str | os.PathLike[str],
    facts: ExportFacts,
    write: Callable[[Path], None],
    source: Outputs,
    reopen: Callable[[Path], Outputs],
) -> Exported:
    """Write a folder, open it again, compare, and only then give it its name.

    Args:
        folder: new or empty.
        facts: of the network.
        write: puts the files into a folder.
        source: the network's outputs.
        reopen: outputs of what the other library makes of a folder.

    Raises:
        ExportError: the folder holds something, cannot be written, cannot be opened, or gives other outputs; what
            was written is removed then.
    """
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} exists and is no empty folder: name a new one, or remove it first")
    with _temporary_sibling(folder) as temporary:
        write(temporary)
        try:
            reopened = reopen(temporary)
        except Exception as error:
            # Each library has errors of its own kind for a file it does not like.
            reason = f"{type(error).__name__}: {error}"
            raise ExportError(f"the export to {folder} cannot be opened again, so was removed: {reason}") from error
        difference = largest_difference(source, reopened, facts)
        files = tuple(sorted(path.name for path in temporary.iterdir()))
        for name in files:
            _fsync_file(temporary / name)
        fsync_folder(temporary)
        temporary.replace(folder)
    fsync_folder(folder.parent)
    return Exported(folder, files, difference)


@torch.no_grad()
def largest_difference(source: Outputs, reopened: Outputs, facts: ExportFacts) -> float:
    """The largest absolute difference of outputs, over random images in batches of 1 and of 3.

    Raises:
        ExportError: it is above 1e-4, or not a number, or the outputs differ in shape.
    """
    generator = torch.Generator().manual_seed(0)
    differences: list[Tensor] = []
    for batch in _BATCHES:
        pixels = torch.rand(batch, *facts.input_size, generator=generator)
        expected, found = source(pixels), reopened(pixels)
        shapes = [[tuple(output.shape) for output in outputs] for outputs in (expected, found)]
        if shapes[0] != shapes[1]:
            raise ExportError(f"the opened export gives outputs of shapes {shapes[1]}, the source {shapes[0]}: removed")
        differences += [(a - b).abs().max() for a, b in zip(expected, found)]
    worst = torch.stack(differences).max().item()  # a NaN stays one
    if not worst <= TOLERANCE:
        raise ExportError(
            f"the opened export differs from the source by {worst:.3g} (allowed: {TOLERANCE:g}), so was removed: "
            "the weights hold values that are not finite, or the facts (shape, pooling, model) are another network's"
        )
    return worst


def write_card(folder: Path, library: str, facts: ExportFacts, classes: int, usage: str, notes: str = "") -> None:
    """Write the model card: how to open the folder, what pixels it takes, where its weights come from."""
    channels, height, width = facts.input_size
    task = "image-classification" if classes else "image-feature-extraction"
    title = f"Image classifier of {classes} classes" if classes else "Image encoder"
    pixels = f"{channels} channel{'s' * (channels > 1)} of {height} x {width} px"
    text = f"""---
library_name: {library}
pipeline_tag: {task}
---
# {title}

```python
{usage.strip()}
```

Images: {pixels}, in [0, 1]; mean {_numbers(facts.mean)}, standard deviation {_numbers(facts.std)}.
Test images: bicubic resize, then the central {facts.crop_fraction:.4g} of it.
{notes and notes + chr(10)}
Weights from:

```json
{json.dumps(facts.lineage, indent=2)}
```
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an indented JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _temporary_sibling(folder: Path) -> Iterator[Path]:
    temporary = folder.with_name(f".{folder.name}.tmp-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
    except (OSError, SafetensorError) as error:
        raise ExportError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fsync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)
