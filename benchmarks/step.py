"""Images per second of the training step at each B, without the data path: `python benchmarks/step.py --config ...`."""

from __future__ import annotations

import argparse

import torch
from timing import medians

from mae_et.config import load_config
from mae_et.data.loader import Batch
from mae_et.engine.distributed import Ranks, choose_device
from mae_et.engine.step import train_step
from mae_et.engine.tasks import Reconstruction
from mae_et.planning import build_plan
from mae_et.pretraining import build_state
from mae_et.running import downsample_on_device, prepare_device


def main() -> None:
    """Time the step of every stage on random images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    prepare_device(config)
    state = build_state(config, Ranks(0, 1, choose_device(config.engine.device, 0)))
    plan, task = build_plan(config, images=1_000_000), Reconstruction(downsample_on_device(config.data.downsample))
    for stage, first in zip(plan.stages, plan.boundaries):
        now, count = plan.at(first), stage.batch // config.optim.accumulation
        images = torch.randint(0, 256, (count, config.data.channels, *stage.bandwidth), dtype=torch.uint8)
        batch = Batch(images, torch.zeros(count), torch.arange(count), torch.arange(count))

        def step(batch: Batch = batch, now=now) -> float:
            return train_step(state, iter([batch]), now, task, 1, config.optim.clip).loss.item()

        seconds = medians({"step": step})["step"]
        rate = stage.flops_per_image * count / seconds if stage.flops_per_image else 0.0
        speed = f"{count / seconds:,.0f} images/s, {rate / 1e9:,.0f} GFLOP/s"
        print(f"B={stage.bandwidth[0]}: {speed}, {state.precision.name}", flush=True)


if __name__ == "__main__":
    main()
