"""What a plan takes in time, memory and money, by a calibration, as a table for people."""

from __future__ import annotations

from mae_et.curriculum.calibration import Calibration
from mae_et.curriculum.plan import Plan, PlannedStage
from mae_et.curriculum.stage import format_size
from mae_et.curriculum.table import quantity, text_table


def duration(seconds: float) -> str:
    """Seconds in the unit that people would take: 45.2 s, 12.3 min, 5.1 h, 3.2 days."""
    for least, unit, length in ((172800, "days", 86400), (5400, "h", 3600), (90, "min", 60)):
        if seconds >= least:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


def time_table(plan: Plan, calibration: Calibration, price: float | None = None, currency: str = "EUR") -> str:
    """Per stage its time, memory and traffic, and whether data or step decide; and the totals.

    `MB/s` are uint8 pixels to all devices; beside them what the same steps would take at the final size
    (EfficientTrain++ Table 20), where the data path hands over images at B.

    Args:
        plan: of the run.
        calibration: that holds its stages.
        price: of an hour of one process; None leaves money out.
        currency: of the price.

    Raises:
        ValueError: the calibration does not hold a stage, or is of another model.
    """
    header = [
        "stage",
        "B",
        "steps",
        "ms/step",
        "time",
        "memory",
        "ms/batch of data",
        "MB/s",
        "at the final size",
        "waits",
    ]
    rows = [stage_row(stage, plan, calibration) for stage in plan.stages]
    seconds = calibration.seconds(plan.stages)
    hours = seconds * calibration.processes / 3600
    total = (
        f"time: {duration(seconds)} ±{100 * calibration.uncertainty(plan.stages):.0f} %, pauses for scores and "
        f"checkpoints left out; {hours:.3g} gpu_hours of {calibration.processes} process"
        f"{'' if calibration.processes == 1 else 'es'}"
    )
    if price is not None:
        total += f"; {hours * price:.2f} {currency} at {price:g} {currency} an hour and process"
    source = (
        f"measured {calibration.date} on {calibration.device} ({calibration.processes} x {calibration.threads} threads "
        f"and {calibration.workers} workers, {calibration.precision}, torch {calibration.torch}): {calibration.title}"
    )
    return f"{text_table(header, rows)}\n\n{total}\n{source}"


def stage_row(stage: PlannedStage, plan: Plan, calibration: Calibration) -> list[str]:
    """Cells of one stage."""
    timing, per_step = calibration.timing(stage), calibration.seconds_per_step(stage)
    loads = timing.data_seconds / (stage.replay + 1)
    # Replayed images lie on the host: they travel to the device all the same.
    rate = timing.batch_bytes / per_step
    _, height, width = timing.image
    full = rate * plan.reference_size[0] * plan.reference_size[1] / (height * width)
    share = 100 * calibration.uncertainty([stage])
    return [
        str(stage.index + 1),
        format_size(stage.bandwidth),
        f"{stage.steps:,}",
        f"{1000 * per_step:.4g}",
        f"{duration(stage.steps * per_step)} ±{share:.0f} %",
        "-" if timing.memory is None else f"{quantity(timing.memory)}B",
        f"{1000 * timing.data_seconds:.4g}" + (f" / {stage.replay + 1}" if stage.replay else ""),
        f"{rate / 1e6:.3g}",
        f"{full / 1e6:.3g}",
        "for data" if loads > timing.step_seconds else "for steps",
    ]
