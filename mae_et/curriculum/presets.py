"""The published schedules as data, for any final size."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mae_et.curriculum.stage import Stage, format_size


@dataclass(frozen=True)
class Preset:
    """A published schedule.

    Attributes:
        source: where it was published.
        axis: what `ends` are fractions of, "compute" or "epoch".
        ends: end of each stage on that axis.
        floor: first stage's B in px at a final size of 224; 0 means the final size throughout.
        levels: position of each stage's B between floor (0) and final size (1); empty takes every multiple of the
            patch between them, for equal shares of the axis.
    """

    source: str
    axis: str
    ends: tuple[float, ...]
    floor: int
    levels: tuple[float, ...]


PRESETS = {
    "baseline": Preset("constant final size", "compute", (1.0,), 0, (1.0,)),
    "efficienttrain": Preset("EfficientTrain, Table 5", "epoch", (0.6, 0.8, 1.0), 160, (0.0, 0.5, 1.0)),
    "efficienttrain_pp": Preset("EfficientTrain++, Table 6", "compute", (0.2, 0.6, 1.0), 96, (0.0, 0.5, 1.0)),
    "efficienttrain_pp_deit": Preset(
        "EfficientTrain++, released script for DeiT", "compute", (0.2, 0.6, 0.8, 1.0), 96, (0.0, 0.5, 0.75, 1.0)
    ),
    "linear": Preset("EfficientTrain++, Table 19 (c): B grows linearly", "compute", (), 96, ()),
    # Scheme 5 of DailyMAE's code (arXiv 2404.00509; FastSSL, model/dres.py), the palindrome among its schemes; its
    # example changes B during the first half of the epochs.
    "palindrome": Preset("DailyMAE, released code", "epoch", (0.25, 0.5, 1.0), 192, (1.0, 0.0, 1.0)),
    # 32 px, 32 px more every 5 of 300 epochs; the final size from epoch 30 on.
    "image_size": Preset(
        "arXiv 2211.05187, section 2.2, for 300 epochs",
        "epoch",
        (*(stage / 60 for stage in range(1, 7)), 1.0),
        32,
        tuple(stage / 6 for stage in range(7)),
    ),
}

REFERENCE_SIZE = 224


def stage_side(preset: Preset, level: float, final: int, patch_size: int) -> int:
    """B in px of one stage for a final size, as a multiple of the patch.

    EfficientTrain++ section 6.1.1 keeps the floor and interpolates: 96, (96 + final)/2, final. A final size not above
    the floor would make B fall during training; there the sizes keep their proportions to 224 (96 : 160 : 224 is
    3/7 : 5/7 : 1). Either way the nearest multiple of the patch is taken, the larger one in a tie.
    """
    if final > preset.floor:
        side = preset.floor + level * (final - preset.floor) if preset.floor else float(final)
    else:
        side = final * (preset.floor + level * (REFERENCE_SIZE - preset.floor)) / REFERENCE_SIZE
    return max(1, int(side / patch_size + 0.5)) * patch_size


def preset_stages(
    name: str, final_size: tuple[int, int], patch_size: int, floor: int | None = None
) -> tuple[Stage, ...]:
    """Stages of a published schedule for a final (height, width) in px.

    The rule for the final size acts on the shorter side; the longer one keeps the aspect ratio, to the nearest patch.
    Stages below `floor` (px, for a final size of 224) are raised to it.

    Raises:
        ValueError: unknown preset (the known ones are listed), or a final size that the patch does not divide.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown curriculum {name!r}; known: {', '.join(PRESETS)}")
    if any(side % patch_size for side in final_size):
        raise ValueError(f"final size {format_size(final_size)} px is not a multiple of the patch size {patch_size} px")
    preset = PRESETS[name]
    short = min(final_size)
    lowest = 0 if floor is None else stage_side(replace(preset, floor=floor), 0.0, short, patch_size)
    if not preset.levels:
        return _every_size(preset, lowest, final_size, patch_size)
    sides = [max(stage_side(preset, level, short, patch_size), min(lowest, short)) for level in preset.levels]
    return tuple(Stage(end, _in_proportion(side, final_size, patch_size)) for end, side in zip(preset.ends, sides))


def _every_size(preset: Preset, lowest: int, final_size: tuple[int, int], patch_size: int) -> tuple[Stage, ...]:
    """A stage for each multiple of the patch, of equal shares."""
    short = min(final_size)
    first = min(lowest or stage_side(preset, 0.0, short, patch_size), short)
    sides = range(first, short + 1, patch_size)
    return tuple(
        Stage((index + 1) / len(sides), _in_proportion(side, final_size, patch_size))
        for index, side in enumerate(sides)
    )


def _in_proportion(side: int, final_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """(height, width) of which `side` is the shorter one, with the final size's aspect to the nearest patch."""
    height, width = (int(full * side / min(final_size) / patch_size + 0.5) * patch_size for full in final_size)
    return height, width


def grow(first: int, step: int, every: float, epochs: float, final_size: tuple[int, int]) -> tuple[Stage, ...]:
    """Stages of B = `first`, `first + step`, ... px, each `every` epochs long, then the final size.

    Raises:
        ValueError: the epochs end before the final size is reached, or numbers that do not grow.
    """
    short = min(final_size)
    if not (0 < first <= short and step > 0 and every > 0):
        raise ValueError(
            f"growth from {first} px by {step} px every {every:g} epochs: needs a first size of 1 to {short} px, and a "
            "step and a number of epochs above 0"
        )
    sides = list(range(first, short, step))
    if len(sides) * every >= epochs:
        raise ValueError(
            f"growth from {first} px by {step} px every {every:g} epochs reaches {short} px at epoch "
            f"{len(sides) * every:g}, and the run ends at epoch {epochs:g}: make it longer, or grow faster"
        )
    growing = [Stage((i + 1) * every / epochs, _in_proportion(side, final_size, 1)) for i, side in enumerate(sides)]
    return (*growing, Stage(1.0, final_size))
