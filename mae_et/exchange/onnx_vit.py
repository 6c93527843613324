"""A vision transformer out of an ONNX graph: DINOv2 as `transformers` names it, or timm's own.

Exporters keep the names of most parameters. They transpose the weights of linear layers and give them new names, but
not the biases that are added next; and they may fold the position embedding, which is found where it meets the patches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

Family = Literal["dinov2", "timm"]
Arrays = dict[str, np.ndarray]

# The patch kernel's name, which tells the family and the prefix of all names.
_KERNELS: dict[str, Family] = {
    "embeddings.patch_embeddings.projection.weight": "dinov2",
    "patch_embed.proj.weight": "timm",
}
_LINEAR_OR_NORM = r"(weight|bias)"
_NAMES: dict[Family, list[tuple[str, str]]] = {
    "dinov2": [
        (rf"embeddings\.patch_embeddings\.projection\.{_LINEAR_OR_NORM}", r"patch_embed.proj.\1"),
        # transformers 4 has attention.attention.query and attention.output.dense, 5 has attention.q_proj and .o_proj.
        (
            rf"encoder\.layer\.(\d+)\.attention\.(?:attention\.)?([qkv])(?:uery|ey|alue|_proj)\.{_LINEAR_OR_NORM}",
            r"blocks.\1.attn.\2.\3",
        ),
        (rf"encoder\.layer\.(\d+)\.attention\.(?:output\.dense|o_proj)\.{_LINEAR_OR_NORM}", r"blocks.\1.attn.proj.\2"),
        (rf"encoder\.layer\.(\d+)\.(norm[12]|mlp\.fc[12])\.{_LINEAR_OR_NORM}", r"blocks.\1.\2.\3"),
        (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
        (rf"layernorm\.{_LINEAR_OR_NORM}", r"norm.\1"),
    ],
    "timm": [
        (rf"(patch_embed\.proj|norm|fc_norm)\.{_LINEAR_OR_NORM}", r"\1.\2"),
        (rf"(blocks\.\d+)\.(norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.{_LINEAR_OR_NORM}", r"\1.\2.\3"),
        (r"(blocks\.\d+)\.(ls[12])\.gamma", r"\1.\2.gamma"),
    ],
}


class OnnxTensors(NamedTuple):
    """What was found in a graph.

    Attributes:
        tensors: timm's names, in the file's number format.
        family: whose names the graph has.
        dropped: names of other parameters, as of a head.
    """

    tensors: dict[str, Tensor]
    family: Family
    dropped: tuple[str, ...]


def read_onnx(path: Path) -> OnnxTensors:
    """The tensors of the vision transformer in an ONNX file.

    Positions are those of the grid that they are stored for, even where the graph resamples them to its input.

    Raises:
        ValueError: the package `onnx` is missing, the file is truncated, or there is no ViT of known names in it.
    """
    onnx = _import_onnx()
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(path).graph
        arrays: Arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    except (DecodeError, onnx.checker.ValidationError, ValueError, TypeError, OSError) as error:
        raise ValueError(f"it is truncated or not an ONNX file ({error})") from error
    try:
        return _find_transformer(graph, arrays)
    except (IndexError, KeyError, TypeError, RuntimeError, StopIteration) as error:
        raise ValueError(
            f"no vision transformer is in it: its graph is not one that exporters write ({error!r})"
        ) from error


def _find_transformer(graph: GraphProto, arrays: Arrays) -> OnnxTensors:
    """The tensors of a graph; whatever a malformed one makes Python raise comes through."""
    kernels = [(name.removesuffix(k), k) for name in arrays for k in _KERNELS if name == k or name.endswith(f".{k}")]
    if not kernels:
        raise ValueError(f"no vision transformer is in it: no tensor is named {' or '.join(_KERNELS)}")
    prefix, kernel = kernels[0]
    family = _KERNELS[kernel]
    named = _restore_names(graph, arrays)
    tensors = _translate(named, prefix, family)
    used = {name for name in named if _timm_name(name, prefix, family)}
    conv = next(node for node in graph.node if prefix + kernel in node.input)
    found, names = _embeddings(graph, arrays, conv)
    tensors |= {name: torch.from_numpy(np.array(array)) for name, array in found.items()}
    # Parameters have paths; what exporters add is named without.
    dropped = tuple(name for name in named if "." in name and name not in used | names)
    return OnnxTensors(tensors, family, dropped)


def _import_onnx() -> ModuleType:
    try:
        import onnx
        import onnx.numpy_helper
    except ImportError:
        raise ValueError("to read ONNX files, install the extra: pip install 'mae_et[export]'") from None
    return onnx


def _restore_names(graph: GraphProto, arrays: Arrays) -> Arrays:
    """Parameters by name: those that share an array get it back, and weights that lost theirs take it from their bias.

    Raises:
        ValueError: several weights go with one bias.
    """
    named = dict(arrays)
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in arrays:
            named[node.output[0]] = arrays[node.input[0]]
    added_to = {name: list(node.input) for node in graph.node if node.op_type == "Add" for name in node.input}
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in arrays:
            continue
        for bias in added_to.get(node.output[0], []):
            if bias in named and bias.endswith(".bias"):
                weight = bias.removesuffix("bias") + "weight"
                if weight in named:
                    raise ValueError(
                        f"{bias} serves several layers: the exporter has merged equal tensors, as of an untrained "
                        "model; import the model's state dict instead"
                    )
                named[weight] = arrays[node.input[1]].T
    return named


def _timm_name(name: str, prefix: str, family: Family) -> str | None:
    if not name.startswith(prefix):
        return None
    for pattern, replacement in _NAMES[family]:
        match = re.fullmatch(pattern, name.removeprefix(prefix))
        if match:
            return match.expand(replacement)
    return None


def _translate(named: Arrays, prefix: str, family: Family) -> dict[str, Tensor]:
    """timm's names, and queries, keys and values in one tensor."""
    tensors = {}
    for name, array in named.items():
        translated = _timm_name(name, prefix, family)
        if translated is not None:
            tensors[translated] = torch.from_numpy(np.array(array))
    for query in [name for name in tensors if ".attn.q." in name]:
        parts = [query.replace(".q.", part) for part in (".q.", ".k.", ".v.")]
        if all(part in tensors for part in parts):
            tensors[query.replace(".q.", ".qkv.")] = torch.cat([tensors.pop(part) for part in parts])
    return tensors


def _embeddings(graph: GraphProto, arrays: Arrays, conv: NodeProto) -> tuple[Arrays, set[str]]:
    """Position embedding and class token, and their names in the file: what meets the patches in the first addition.

    Raises:
        ValueError: nothing is added to the patches.
    """
    width = arrays[conv.input[1]].shape[0]
    producers = {name: node for node in graph.node for name in node.output}
    patches = set(conv.output)
    addition = None
    for node in graph.node:
        # Sizes are computed from patches, too; they carry no values.
        if node.op_type == "Shape" or not patches & set(node.input):
            continue
        if node.op_type == "Add":
            addition = node
            break
        patches |= set(node.output)
    if addition is None:
        raise ValueError("no position embedding is in it: nothing is added to the patches")

    def rows_above(names: Iterable[str]) -> list[str]:
        """Stored rows of tokens [1, L, D] that values come from, the shortest first."""
        above = _stored_above(names, producers, lambda node: node is conv or node.op_type == "Shape")
        rows = [name for name in above if name in arrays and arrays[name].shape[::2] == (1, width)]
        return sorted(rows, key=lambda name: arrays[name].shape[1])

    positions = rows_above(name for name in addition.input if name not in patches)
    classes = rows_above(name for name in addition.input if name in patches)
    if not positions:
        raise ValueError("no position embedding is in it: what is added to the patches is not stored")
    found = {"pos_embed": np.concatenate([arrays[name] for name in positions], axis=1)}
    if classes:
        found["cls_token"] = arrays[classes[0]]
    return found, {*positions, *classes}


def _stored_above(
    names: Iterable[str], producers: dict[str, NodeProto], is_end: Callable[[NodeProto], bool]
) -> set[str]:
    """Names without a producer that values are computed from."""
    stored, waiting, seen = set(), list(names), set()
    while waiting:
        name = waiting.pop()
        node = producers.get(name)
        if node is None:
            stored.add(name)
        elif name not in seen and not is_end(node):
            waiting += node.input
        seen.add(name)
    return stored
