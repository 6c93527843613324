"""Copying weights into a model: what fits, what must be resampled, and what people should know about the rest."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from mae_et.exchange.weights import Weights, WeightsError
from mae_et.models.vit import ViTShape

_FEW = 4  # names of one group that are written out


@dataclass(frozen=True)
class Match:
    """What became of tensors, by name.

    Attributes:
        loaded: copied as they are.
        resampled: copied after a change of grid, patch, channels or class token.
        fresh: in the model, not in the file: they keep what they were initialised with.
        unused: in the file, not in the model.
        origin: the file, for people.
    """

    loaded: tuple[str, ...]
    resampled: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]
    origin: str = ""

    def text(self) -> str:
        """A report of a few lines for people."""
        lines = [f"{self.origin or 'weights'}: {len(self.loaded) + len(self.resampled)} tensors loaded"]
        if self.resampled:
            lines.append(f"  resampled to this model: {_grouped(self.resampled)}")
        if self.fresh:
            lines.append(f"  new in this model: {_grouped(self.fresh)}")
        if self.unused:
            lines.append(f"  in the file, not used: {_grouped(self.unused)}")
        if "norm.weight" in self.unused and "fc_norm.weight" in self.fresh:
            lines.append("  (mean pooling has a norm of its own, fc_norm, which starts anew as in MAE's fine-tuning)")
        return "\n".join(lines)


def load_weights(
    net: nn.Module, weights: Weights, fresh: Sequence[str] = ("head.", "fc_norm."), norm_to_fc_norm: bool = False
) -> Match:
    """Copy weights into a timm model; either all that must fit does, or the model is left as it was.

    Position embeddings go to the model's grid (bicubic, the class token's row apart), patch kernels to its patch size
    (pseudo-inverse resize of FlexiViT, arXiv 2212.08013), and input kernels from 3 to 1 channels (their sum) or from
    1 to 3 (a third for each).

    Args:
        net: a timm model of any kind.
        weights: from `open_weights`.
        fresh: beginnings of names that may be missing from the weights, or be of another number of classes there.
        norm_to_fc_norm: let a model with mean pooling take the final norm that was pretrained, for features of a frozen
            model (it normalises the mean, where pretraining normalised every patch). Fine-tuning trains a new one.

    Raises:
        WeightsError: nothing matches, a tensor has another shape, one is missing, or the model would compute something
            else from the same tensors.
    """
    have, want, model = dict(weights.tensors), net.state_dict(), _name_of(net)
    source = f"the weights of {weights.origin.path}"
    if norm_to_fc_norm and "fc_norm.weight" in want:
        fresh = [prefix for prefix in fresh if prefix != "fc_norm."]
        if "fc_norm.weight" not in have:
            have = {re.sub(r"^norm\.", "fc_norm.", name): tensor for name, tensor in have.items()}
    prefixes = tuple(fresh)
    if not any(name in want and not name.startswith(prefixes) for name in have):
        raise WeightsError(
            f"nothing in {source} matches the model {model}: they hold {_some(have)}, the model has {_some(want)}"
        )
    fitted = _fit(net, have, want, weights.shape)
    wrong = [name for name in fitted if fitted[name].shape != want[name].shape]
    for name in wrong:
        if not name.startswith(prefixes):
            shapes = f"{list(have[name].shape)} in the file, {list(want[name].shape)} in the model"
            raise WeightsError(f"{source} do not fit the model {model}: {name} is {shapes}")
        del fitted[name]
    _check_function(net, weights, have, want, f"{source} do not fit the model {model}")
    new = tuple(name for name in want if name not in fitted)
    # Old files lack the counters of BatchNorm, which nothing reads.
    missing = [name for name in new if not name.startswith(prefixes) and not name.endswith("num_batches_tracked")]
    if missing:
        pooling = "; choose mean pooling, which they were trained with" if missing[0].startswith("norm.") else ""
        raise WeightsError(f"{source} lack {len(missing)} tensors of the model {model}: {_some(missing)}{pooling}")
    net.load_state_dict({**want, **fitted})
    changed = tuple(name for name in fitted if fitted[name] is not have[name])
    return Match(
        loaded=tuple(name for name in fitted if name not in changed),
        resampled=changed,
        fresh=new,
        unused=(*(name for name in have if name not in fitted), *weights.dropped),
        origin=weights.origin.path,
    )


def _fit(net: nn.Module, have: Mapping[str, Tensor], want: Mapping[str, Tensor], shape: ViTShape | None) -> dict:
    """Tensors of the file that the model has, made to fit where there is a rule; others come back as they are."""
    fitted = {name: have[name] for name in want if name in have}
    for name, tensor in fitted.items():
        if tensor.ndim == want[name].ndim == 4:
            tensor = _fit_channels(tensor, want[name].shape[1])
            if name == "patch_embed.proj.weight" and tensor.shape[:2] == want[name].shape[:2]:
                tensor = resample_patch_embed(tensor, list(want[name].shape[2:]))
            fitted[name] = tensor
    grid = getattr(getattr(net, "patch_embed", None), "grid_size", None)
    if grid is not None and "pos_embed" in fitted and fitted["pos_embed"].shape[2:] == want["pos_embed"].shape[2:]:
        fitted |= _fit_positions(fitted, want["pos_embed"].shape[1], tuple(grid), shape)
    return fitted


def _fit_channels(kernel: Tensor, channels: int) -> Tensor:
    """An input kernel [D, 3, p, p] for grey images, or [D, 1, p, p] for colour, equal on grey ones."""
    if (kernel.shape[1], channels) == (3, 1):
        return kernel.sum(dim=1, keepdim=True)
    if (kernel.shape[1], channels) == (1, 3):
        return kernel.expand(-1, 3, -1, -1) / 3
    return kernel


def _fit_positions(
    have: Mapping[str, Tensor], count: int, grid: tuple[int, int], shape: ViTShape | None
) -> dict[str, Tensor]:
    """Positions [1, count, D] for a grid, and the class token where it takes in a row of its own.

    Raises:
        WeightsError: the grid that the positions are for is not known, and not square.
    """
    positions = have["pos_embed"]
    others = count - grid[0] * grid[1]
    old = shape.grid if shape is not None else _grid_of(positions.shape[1], others, count, grid)
    others_had = positions.shape[1] - old[0] * old[1]
    if old != grid:
        positions = resample_abs_pos_embed(positions, list(grid), list(old), num_prefix_tokens=others_had)
    changed = {"pos_embed": positions}
    if (others_had, others) == (1, 0):
        changed["pos_embed"] = positions[:, 1:]
        if "cls_token" in have:  # of a model that adds positions to patches alone
            changed["cls_token"] = have["cls_token"] + positions[:, :1]
    elif (others_had, others) == (0, 1):
        changed["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    return changed


def _grid_of(positions: int, others: int, count: int, grid: tuple[int, int]) -> tuple[int, int]:
    """The grid of a file of which the shape is not known: the model's where it holds as many, else a square."""
    if positions == count:
        return grid
    side = math.isqrt(max(0, positions - others))
    if side * side != positions - others:
        raise WeightsError(f"its {positions} positions are not those of a square grid, so they cannot be resampled")
    return side, side


def _check_function(
    net: nn.Module, weights: Weights, have: Mapping[str, Tensor], want: Mapping[str, Tensor], what: str
) -> None:
    """Refuse what would load and yet compute something else."""
    extra = [name for name in have if name not in want and name.startswith("blocks.")]
    if extra:
        raise WeightsError(f"{what}: it has no {extra[0]}, and features without it are others")
    blocks = getattr(net, "blocks", None)
    heads = getattr(getattr(blocks[0], "attn", None), "num_heads", None) if isinstance(blocks, nn.Sequential) else None
    if weights.shape is not None and heads not in (None, weights.shape.heads):
        raise WeightsError(f"{what}: they are for {weights.shape.heads} attention heads, the model has {heads}")


def _name_of(net: nn.Module) -> str:
    facts = getattr(net, "pretrained_cfg", None) or {}
    return facts.get("architecture") or type(net).__name__


def _some(names: Sequence[str] | Mapping[str, Tensor]) -> str:
    first = list(names)[:_FEW]
    return ", ".join(first) + (", ..." if len(names) > len(first) else "") if first else "nothing"


def _grouped(names: Sequence[str]) -> str:
    """Names, with those of a large module counted under its name."""
    modules = [name.partition(".")[0] for name in names]
    sizes = Counter(modules)
    parts = (f"{m}.* ({sizes[m]})" if sizes[m] > _FEW else name for m, name in zip(modules, names))
    return ", ".join(dict.fromkeys(parts))
