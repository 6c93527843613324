"""MAE's decoder against cheaper ones, steps in turns in one process: `python benchmarks/decoders.py`."""

from __future__ import annotations

import argparse

import torch
from step_peers import our_step
from timing import medians

from mae_et.config import load_config
from mae_et.planning import build_plan

CROSS = ["model.decoder=crossmae", "model.prediction_ratio=0.25"]
WIDE = ["model.decoder_width=512", "model.decoder_heads=16"]
NARROW = ["model.decoder_width=256", "model.decoder_heads=8"]
DECODERS = {
    "mae 8 x 512": [*WIDE, "model.decoder_depth=8"],
    "mae 8 x 256": [*NARROW, "model.decoder_depth=8"],
    "crossmae 8 x 512": [*CROSS, *WIDE, "model.decoder_depth=8"],
    "crossmae 12 x 512": [*CROSS, *WIDE, "model.decoder_depth=12"],
    "crossmae 12 x 256": [*CROSS, *NARROW, "model.decoder_depth=12"],
}


def main() -> None:
    """Print FLOPs and time of each decoder's step as shares of the first one's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/pretrain/vit_small_et400_hog.yaml")
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 224])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for size in options.sizes:
        steps, flops = {}, {}
        for name, overrides in DECODERS.items():
            config = load_config(options.config, [*overrides, f"engine.threads={options.threads}"])
            steps[name] = our_step(config, size, options.batch)
            stages = build_plan(config, images=1_000_000).stages
            flops[name] = next(stage.flops_per_image for stage in stages if stage.bandwidth == (size, size)) or 0.0
        seconds = medians(steps, options.rounds)
        first = next(iter(DECODERS))
        for name in DECODERS:
            shares = f"{flops[name] / flops[first]:.2f} of the FLOPs, {seconds[name] / seconds[first]:.2f} of the time"
            print(f"{size} px, {name}: {1000 * seconds[name] / options.batch:.1f} ms an image, {shares}", flush=True)


if __name__ == "__main__":
    main()
