"""Tables: a plan for people, and whatever else for people or for spreadsheets."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mae_et.curriculum.plan import Plan, PlannedStage
from mae_et.curriculum.stage import format_size

SUFFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def quantity(value: float | None) -> str:
    """A large number with an SI suffix: 11.0 G."""
    if value is None:
        return "-"
    for factor, suffix in SUFFIXES:
        if value >= factor:
            return f"{value / factor:.3g} {suffix}"
    return f"{value:.3g}"


def text_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns padded to their widest cell, right-aligned, with a rule under the header."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in [header, *rows]]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table for spreadsheets: floats with six digits, nothing for None."""
    path.unlink(missing_ok=True)  # rather than write to what a link names
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for row in rows:
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else "" if v is None else v for v in row])


def plan_table(plan: Plan) -> str:
    """Per stage what the model sees and spends, and the totals in equivalent epochs.

    Where a stage replays images: how many steps after each fresh one, from how many batches, and the fresh passes,
    which are the data path's load.
    """
    replays = any(stage.replay for stage in plan.stages)
    header = ["stage", "B", "grid", "visible", "masked", "batch", "peak lr", "u"]
    header += ["steps", "passes", *(("replay", "buffer", "fresh") if replays else ()), "FLOPs/image", "FLOPs"]
    rows = []
    for stage in plan.stages:
        total = None if stage.flops_per_image is None else stage.flops_per_image * stage.images
        rows.append(
            [
                str(stage.index + 1),
                format_size(stage.bandwidth),
                f"{stage.grid[0]}x{stage.grid[1]}",
                str(stage.visible),
                str(stage.masked),
                str(stage.batch),
                f"{stage.peak_learning_rate:.3g}",
                f"{stage.start:.2g}-{stage.end:.2g}",
                f"{stage.steps:,}",
                f"{stage.passes:.1f}",
                *(replay_cells(stage, plan) if replays else ()),
                quantity(stage.flops_per_image),
                quantity(total),
            ]
        )
    passes = sum(stage.passes for stage in plan.stages)
    totals = (
        f"{plan.name}: {plan.total_steps:,} steps, {plan.total_images:,} images, {passes:.1f} passes over "
        f"{plan.images:,} images\n"
        f"cost: {plan.equivalent_epochs:.1f} equivalent epochs at B={format_size(plan.reference_size)} "
        f"(accounted in {plan.cost_unit}), {quantity(plan.total_flops)}FLOPs in all"
    )
    if replays:
        totals += (
            f"\ndata path: {plan.total_fresh / plan.epoch_images:.1f} passes, "
            f"1/{plan.total_images / plan.total_fresh:.1f} of what is trained on; the rest is replayed"
        )
    return f"{text_table(header, rows)}\n\n{totals}"


def replay_cells(stage: PlannedStage, plan: Plan) -> list[str]:
    """Replayed steps after each fresh one, batches in the buffer, and fresh passes over the data."""
    fresh = stage.fresh_steps * stage.batch / plan.epoch_images
    return [str(stage.replay), f"{min(stage.replay_batches, stage.fresh_steps):,}", f"{fresh:.1f}"]
