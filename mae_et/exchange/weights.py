"""Weights from elsewhere: our runs, MAE's files, timm's models and state dicts, ONNX; all under timm's names."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mae_et.config.plain import parse_json, read_bytes, read_json, read_yaml
from mae_et.engine.checkpoint import Checkpoint, CheckpointError, latest_checkpoint, load_checkpoint
from mae_et.exchange.onnx_vit import read_onnx
from mae_et.exchange.records import as_heads, read_model, read_shape, read_statistics
from mae_et.exchange.shapes import check_tensors, infer_shape
from mae_et.exchange.torch_files import read_torch
from mae_et.models.normalised import pixel_statistics
from mae_et.models.posembed import sincos_positions
from mae_et.models.vit import ViTShape, encoder_tensors
from mae_et.sizes import ENCODER_SIZES

Named = dict[str, Tensor]

_FORMS = (
    "give a run's folder, one of its checkpoints/step-* folders, a .pth, .pt, .bin, .safetensors or .onnx file, "
    "or timm/<name>"
)
_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".onnx")
_TRUNK = "trunk.net."  # of detectors and of segmenters
_RUN_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)
_OF_DECODERS = re.compile(r"decoder_.*|mask_token")  # of MAE's files; DINOv2's hold a mask token, too


class WeightsError(RuntimeError):
    """Weights cannot be read or do not fit; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Origin:
    """Where weights come from: the lineage of a downstream run.

    Attributes:
        kind: "run" (of ours), "mae" (a file of MAE's), "timm" (its published weights), "state_dict" or "onnx".
        path: of the file or of the checkpoint's folder, or timm's name.
        sha256: of the file that holds the tensors; None for timm's.
        step, run_id, config: of the run, where there is one; the id is W&B's.
    """

    kind: Literal["run", "mae", "timm", "state_dict", "onnx"]
    path: str
    sha256: str | None
    step: int | None = None
    run_id: str | None = None
    config: dict[str, Any] | None = None

    @classmethod
    def from_json(cls, text: str) -> Origin:
        """An origin from its fields as JSON.

        Raises:
            ValueError: they are not those of an origin.
        """
        values = parse_json(text)
        kinds = {
            "kind": str, "path": str, "sha256": str | None, "step": int | None, "run_id": str | None,
            "config": dict | None,
        }  # fmt: skip
        if not isinstance(values, dict) or not {"kind", "path", "sha256"} <= values.keys() <= kinds.keys():
            raise ValueError("it does not describe where weights come from")
        wrong = [name for name, value in values.items() if not isinstance(value, kinds[name])]
        if not wrong and not 0 <= (values.get("step") or 0) < 2**63:
            wrong = ["step"]
        if wrong:
            raise ValueError(f"{wrong[0]} is {values[wrong[0]]!r}")
        return cls(**values)


@dataclass(frozen=True)
class Weights:
    """Tensors, and what is known of the model that they belong to.

    Attributes:
        tensors: timm's names, on the CPU, finite; floating point as float32.
        shape: of a plain ViT; None: of something else.
        model: timm's name with "timm/" before it, where it is known.
        mean, std: per channel, of pixels in [0, 1], where they are known.
        origin: where they come from.
        arguments: of timm's constructor, beside `model`.
        dropped: names that the file holds and that are of no use here, such as those of a decoder.
    """

    tensors: Named
    shape: ViTShape | None
    model: str | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    origin: Origin
    arguments: dict[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()


def open_weights(checkpoint: str | os.PathLike[str], heads: int | None = None) -> Weights:
    """Read weights of any supported kind. Nothing in a file is ever executed.

    Args:
        checkpoint: a run's folder (its newest valid checkpoint; the running average where it keeps one), one of its
            `checkpoints/step-*` folders, a `.pth`, `.pt`, `.bin`, `.safetensors` or `.onnx` file, or `timm/<name>`.
        heads: attention heads, for files of ViTs of unusual width: no tensor's shape tells them.

    Raises:
        WeightsError: there is no such thing, it is damaged or holds more than data, or it is not what it seems.
    """
    text = os.fspath(checkpoint)
    try:
        if text.startswith("timm/"):
            return _from_timm(text)
        path = Path(text).expanduser()
        if not path.exists():
            raise ValueError(f"it does not exist; {_FORMS}")
        if path.is_file() and (path.parent / "manifest.json").exists():
            path = path.parent
        if path.is_dir():
            return _from_run(path, heads)
        return _from_file(path, heads)
    except (CheckpointError, ValueError, OSError) as error:
        raise WeightsError(f"cannot use {text}: {error}") from error
    except MemoryError as error:
        raise WeightsError(f"cannot use {text}: it asks for more memory than there is") from error


def _from_run(path: Path, heads: int | None) -> Weights:
    run, checkpoint = _checkpoint_of(path)
    config = _config_of(run)
    # The average is what a run with one reports scores of.
    group = "average" if "average" in checkpoint.tensors else "model"
    manifest = read_json(checkpoint.path / "manifest.json")
    origin = Origin(
        kind="run",
        path=str(checkpoint.path),
        sha256=manifest["files"][f"{group}.safetensors"]["sha256"],
        step=checkpoint.step,
        run_id=_run_id_of(run),
        config=config,
    )
    stored = checkpoint.tensors.get(group, {})
    tensors, dropped = _backbone(stored)
    if any(name.startswith("encoder.") for name in stored):
        shape, mean, std = _pretrained_facts(config, tensors, heads)
        return Weights(_checked(tensors), shape, None, mean, std, origin, dropped=dropped)
    if not any(name.startswith(("net.", _TRUNK)) for name in stored):
        raise ValueError("its checkpoint holds neither an encoder nor a network")
    facts = _downstream_facts(run, config or {}, tensors, heads)
    return Weights(_checked(tensors), origin=origin, dropped=dropped, **facts)


def _checkpoint_of(path: Path) -> tuple[Path, Checkpoint]:
    """The run's folder, and the checkpoint that a path names."""
    place = path.resolve()
    if (path / "manifest.json").exists():
        # A copy elsewhere has no run beside it.
        return (place.parent.parent if place.parent.name == "checkpoints" else place), load_checkpoint(path)
    run = place.parent if place.name == "checkpoints" else path
    if not (run / "checkpoints").is_dir():
        files = [file for file in sorted(path.iterdir()) if file.suffix in _SUFFIXES]
        advice = f"did you mean {files[0]}?" if files else _FORMS
        raise ValueError(f"it is not the folder of a run, there is no checkpoints/ in it; {advice}")
    checkpoint = latest_checkpoint(run / "checkpoints")
    if checkpoint is None:
        raise ValueError("the run has not saved a checkpoint yet")
    return run, checkpoint


def _config_of(run: Path) -> dict[str, Any] | None:
    file = run / "config.yaml"
    if not file.exists():
        return None
    # Not of a link, since the configuration goes on into the records of runs and into model cards.
    return {str(key): value for key, value in read_yaml(file, follow=False).items()}


def _run_id_of(run: Path) -> str | None:
    """The run's id; as W&B gets it, it must not be the text of any file that a link names.

    Raises:
        ValueError: the file holds something else.
    """
    file = run / "run_id.txt"
    if not file.exists():
        return None
    text = read_bytes(file, 1000, follow=False).decode(errors="replace").strip()
    if not _RUN_ID.fullmatch(text):
        raise ValueError(f"{file}: holds no run's id; remove it, or put back the one that the run wrote")
    return text


class _Facts(NamedTuple):
    shape: ViTShape | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def _pretrained_facts(config: dict[str, Any] | None, tensors: Named, heads: int | None) -> _Facts:
    """Shape, mean and std of a pretraining run, by its configuration if that lies beside it."""
    if config is None:
        return _Facts(infer_shape(tensors, heads), None, None)
    try:
        model, data = config["model"], config["data"]
        named = ENCODER_SIZES[model["name"]]
        channels = data.get("channels", 3)
        numbers = {name: model.get(name) or getattr(named, name) for name in ("width", "depth", "heads")}
        numbers |= {"patch_size": model["patch_size"], "mlp_ratio": model["mlp_ratio"], "channels": channels}
        shape = read_shape({"size": data["size"], **numbers})
        mean, std = (read_statistics(data, name) for name in ("mean", "std"))
        check_tensors(shape, tensors)  # before anything is made of its numbers
        return _Facts(shape, *pixel_statistics(channels, mean, std))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"its config.yaml does not describe a pretraining run ({error!r})") from error


def _downstream_facts(run: Path, config: dict[str, Any], tensors: Named, heads: int | None) -> dict[str, Any]:
    """Shape, model, arguments, mean and std of a fine-tuned or supervised run, by its backbone.json if it has one."""
    file = run / "backbone.json"
    section = config.get("model")
    section = section if isinstance(section, dict) else {}
    if not file.exists():
        name = str(section.get("name") or "")
        heads = (
            heads or as_heads(section.get("heads")) or (ENCODER_SIZES[name].heads if name in ENCODER_SIZES else None)
        )
        model = name if name.startswith("timm/") else None
        return {"shape": infer_shape(tensors, heads), "model": model, "mean": None, "std": None}
    try:
        facts = read_json(file, follow=False)
        shape = None if facts["shape"] is None else read_shape(facts["shape"])
        mean, std = (read_statistics(facts, key) for key in ("mean", "std"))
        model, arguments = read_model(facts)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{file}: does not describe a backbone ({error!r})") from error
    if shape is not None:
        check_tensors(shape, tensors)
    return {"shape": shape, "model": model, "mean": mean, "std": std, "arguments": arguments}


def _from_file(path: Path, heads: int | None) -> Weights:
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"files that end in {path.suffix!r} are not read; {_FORMS}")
    if path.suffix == ".onnx":
        return _from_onnx(path, heads)
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    tensors, dropped = _backbone(_state_dict(loaded))
    if not tensors:
        raise ValueError("it holds no tensors")
    tensors = _checked(tensors)
    shape = infer_shape(tensors, heads)
    is_mae = path.suffix != ".safetensors" and _is_mae(loaded, shape, tensors, dropped)
    origin = Origin("mae" if is_mae else "state_dict", str(path), _sha256(path))
    mean, std = pixel_statistics(3) if is_mae else (None, None)
    return Weights(tensors, shape, None, mean, std, origin, dropped=dropped)


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"it is truncated or not a safetensors file ({error})") from error


def _state_dict(loaded: Mapping[str, Any]) -> Named:
    """The tensors of the model, out of what trainers wrap around them."""
    found = [loaded[key] for key in ("model", "state_dict", "model_ema") if isinstance(loaded.get(key), Mapping)]
    named = found[0] if found else loaded
    names = {name: re.sub(r"^(module\.)+", "", str(name).replace("_orig_mod.", "")) for name in named}
    return {names[name]: value for name, value in named.items() if isinstance(value, Tensor)}


def _backbone(stored: Named) -> tuple[Named, tuple[str, ...]]:
    """The tensors that a timm model can have, and the names of others."""
    if "encoder.patch_embed.proj.weight" in stored:
        kept = encoder_tensors(stored)
        return kept, tuple(name for name in stored if not name.startswith("encoder."))
    if any(name.startswith(_TRUNK) for name in stored):
        kept = {name.removeprefix(_TRUNK): t for name, t in stored.items() if name.startswith(_TRUNK)}
        return kept, tuple(name for name in stored if not name.startswith(_TRUNK))
    if any(name.startswith("net.") for name in stored):
        kept = {name.removeprefix("net."): t for name, t in stored.items() if name.startswith(("net.", "head."))}
        return kept, tuple(name for name in stored if not name.startswith(("net.", "head.")))
    kept = {name: tensor for name, tensor in stored.items() if not _OF_DECODERS.fullmatch(name)}
    return kept, tuple(name for name in stored if name not in kept)


def _checked(tensors: Named) -> Named:
    """Float32 copies, which do not depend on a mapped file; refuses what is not finite."""
    checked = {}
    for name, tensor in tensors.items():
        try:
            stored = tensor.untyped_storage().nbytes()
            if stored < tensor.numel() * tensor.element_size():
                raise RuntimeError(f"{list(tensor.shape)} of {stored:,} bytes")
            checked[name] = tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.clone()
            finite = bool(torch.isfinite(checked[name]).all())
        except (RuntimeError, NotImplementedError) as error:  # sparse, quantized, without data, a few bytes repeated
            raise ValueError(f"tensor {name!r} is not a plain array of numbers ({error})") from error
        if not finite:
            raise ValueError(f"tensor {name!r} holds NaN or infinity")
    return checked


def _is_mae(loaded: Mapping[str, Any], shape: ViTShape | None, tensors: Named, dropped: tuple[str, ...]) -> bool:
    """Whether a file is MAE's: by its decoder, by the options of its programs, or by its fixed positions."""
    options = loaded.get("args")
    if any(name.startswith("decoder_") for name in dropped) or (
        isinstance(options, argparse.Namespace) and (hasattr(options, "mask_ratio") or hasattr(options, "global_pool"))
    ):
        return True
    if shape is None or shape.width % 4 or tensors["pos_embed"].shape[1] != 1 + shape.grid[0] * shape.grid[1]:
        return False
    return torch.allclose(tensors["pos_embed"][0], sincos_positions(shape.grid, shape.width), atol=1e-4)


def _from_onnx(path: Path, heads: int | None) -> Weights:
    found = read_onnx(path)
    tensors = _checked(found.tensors)
    shape = infer_shape(tensors, heads)
    if shape is None:
        raise ValueError(
            "its tensors do not make up a plain ViT (exporters merge equal tensors, as of an untrained model, and give "
            "others new names); import the model's state dict instead"
        )
    # DINOv2 takes ImageNet's mean and std; of other graphs they are unknown.
    mean, std = pixel_statistics(3) if found.family == "dinov2" else (None, None)
    return Weights(tensors, shape, None, mean, std, Origin("onnx", str(path), _sha256(path)), dropped=found.dropped)


def _from_timm(text: str) -> Weights:
    name = text.removeprefix("timm/")
    if not timm.is_model(name):
        near = get_close_matches(name.partition(".")[0], timm.list_models(), n=3, cutoff=0.5)
        raise ValueError(f"timm {timm.__version__} has no such model; nearest: {', '.join(near) or 'none'}")
    try:
        net = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # timm, the hub's client and its transport each raise classes of their own
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"timm's weights could not be had ({type(error).__name__}: {first}). They are downloaded once, then "
            "cached: connect to the internet, or copy a file of them here and give its path instead; "
            f"timm.list_pretrained('{name.partition('.')[0]}*') lists those that exist"
        ) from error
    facts = cast("Mapping[str, Any]", net.pretrained_cfg)
    model = "timm/" + ".".join(part for part in (facts.get("architecture") or name, facts.get("tag")) if part)
    mean, std = (tuple(facts[key]) if facts.get(key) else None for key in ("mean", "std"))
    tensors = _checked(net.state_dict())
    return Weights(tensors, _shape_of_timm(net, tensors), model, mean, std, Origin("timm", model, None))


def _shape_of_timm(net: nn.Module, tensors: Named) -> ViTShape | None:
    """The shape of a timm model if `build_vit` makes the same function from its tensors."""
    if type(net) is not VisionTransformer or not isinstance(net.patch_embed, PatchEmbed):
        return None
    block = net.blocks[0]
    if not isinstance(block, Block) or not isinstance(block.mlp.act, nn.GELU) or block.norm1.eps != 1e-6:
        return None
    return infer_shape(tensors, cast("int", block.attn.num_heads), cast("tuple[int, int]", net.patch_embed.img_size))


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
