"""What runs write down of their networks, read back as if anybody had written it."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mae_et.curriculum.stage import as_size
from mae_et.models.vit import ViTShape

# Of timm.create_model, which passes others on to the model.
_OF_FILES = ("checkpoint_path", "cache_dir", "hf_hub_id", "scriptable", "exportable", "no_jit")


def read_shape(values: Mapping[str, Any]) -> ViTShape:
    """A shape from JSON values, such as a run keeps of its backbone.

    Raises:
        ValueError: they are none, or of a transformer that cannot be.
    """
    known = {item.name: item for item in fields(ViTShape)}
    strange = [name for name in values if name not in known]
    if strange or "size" not in values:
        raise ValueError(f"a shape has {', '.join(known)}, and this one has {', '.join(map(str, values))}")
    for name, value in values.items():
        default = known[name].default
        if name == "size":
            continue
        kind = (int, float) if isinstance(default, float) else (type(default),)
        positive = type(value) is bool or (type(value) in (int, float) and 0 < value < math.inf)
        if type(value) not in kind or not positive:
            raise ValueError(f"{name}={value!r} is not what a shape has there")
    shape = ViTShape(**{**values, "size": as_size(values["size"])})
    if shape.width % shape.heads or any(side % shape.patch_size for side in shape.size):
        raise ValueError(f"heads must divide the width and patches the size, and this is {shape}")
    return shape


def read_statistics(values: Mapping[str, Any], name: str) -> tuple[float, ...] | None:
    """`mean` or `std` of pixels from JSON values, None where there is none.

    Raises:
        ValueError: it is no list of finite numbers, or a std is not above 0.
    """
    found = values.get(name)
    if not found:
        return None
    numbers = [type(value) in (int, float) and abs(value) <= sys.float_info.max for value in found]
    if not isinstance(found, list) or not all(numbers) or (name == "std" and min(found) <= 0):
        raise ValueError(f"{name}={found!r} is not what a run keeps there")
    return tuple(found)


def read_model(values: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """timm's name and the arguments of its constructor from JSON values.

    Raises:
        ValueError: they are none, or arguments would make timm read or fetch files.
    """
    model, arguments = values.get("model"), values.get("arguments") or {}
    if not (model is None or isinstance(model, str)) or not isinstance(arguments, dict):
        raise ValueError(f"model={model!r}, arguments={arguments!r} are not what a run keeps there")
    check_arguments(arguments)
    return model, arguments


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for arguments of timm's constructor that name files, weights or places to fetch them from."""
    for name in arguments:
        if name in _OF_FILES or name.startswith("pretrained"):
            raise ValueError(f"arguments hold {name!r}, with which timm would read or fetch files: set checkpoint=...")


def as_heads(value: Any) -> int | None:
    """Attention heads from a configuration of unknown origin; None where it has none."""
    return value if type(value) is int and value > 0 else None
