"""What a machine makes of a recipe: `python -m mae_et bench`. This file loads no torch; what it calls does."""

from __future__ import annotations

import argparse
from typing import Any


def add_command(commands: Any) -> None:
    """Add the sub-command `bench` to argparse's sub-parsers."""
    command = commands.add_parser(
        "bench",
        help="how fast a recipe can be here, what limits it, and the settings to take",
        description="Measures the matrix peak, the step at each B, the data path, torch.compile and (on a CPU) "
        "threads, and recommends settings. Under torchrun all ranks measure together, and the slowest counts. Without "
        "--config: the paper's ViT-B. With data.images=N, or without --config, no image is read: the data path is "
        "left out.",
    )
    command.add_argument("--config", help="a recipe of pretraining or fine-tuning, or a file of your own")
    command.add_argument("--json", metavar="FILE", help="keep everything that was measured")
    command.add_argument(
        "--seconds", type=float, default=45.0, help="of measurements; compiling comes on top; default: 45"
    )
    command.add_argument("--no-compile", action="store_false", dest="compiles", help="do not measure torch.compile")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configuration")
    command.set_defaults(action=_bench)


def _bench(options: argparse.Namespace) -> int:
    from mae_et.bench.measuring import bench
    from mae_et.bench.subject import read_config

    bench(read_config(options.config, options.overrides), options.seconds, options.compiles, options.json)
    return 0
