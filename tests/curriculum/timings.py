"""Calibrations made of numbers, for tests that measure nothing."""

from __future__ import annotations

from mae_et.curriculum import Plan
from mae_et.curriculum.calibration import Calibration, StageTiming


def calibration_of(plan: Plan, scale: float = 1e-6, processes: int = 1, workers: int = 1, **changes) -> Calibration:
    """Seconds of a step in proportion to its pixels, for the stages of a plan."""
    timings = {}
    for stage in plan.stages:
        height, width = stage.bandwidth
        seconds = scale * stage.batch * height * width
        values = {
            "bandwidth": stage.bandwidth,
            "visible": stage.visible,
            "batch": stage.batch,
            "filtered": stage.low_pass is not None,
            "seconds": seconds,
            "spread": 0.01 * seconds,
            "step_seconds": 0.9 * seconds,
            "data_seconds": 0.2 * seconds,
            "memory": 3_000_000_000,
            "image": (3, height, width),
            "flops_per_image": stage.flops_per_image,
            "blocks": 5,
        }
        timing = StageTiming(**{**values, **changes})
        timings[timing.key] = timing
    about = {"title": "a model", "device": "a device", "threads": 2, "precision": "bf16", "torch": "2", "date": "today"}
    return Calibration(tuple(timings.values()), processes=processes, workers=workers, **about)
