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
        levels: position of each stage's B between floor (0) and final size (1).
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

    def bandwidth(level: float) -> tuple[int, int]:
        side = max(stage_side(preset, level, short, patch_size), min(lowest, short))
        height, width = (int(full * side / short / patch_size + 0.5) * patch_size for full in final_size)
        return height, width

    return tuple(Stage(end, bandwidth(level)) for end, level in zip(preset.ends, preset.levels))
