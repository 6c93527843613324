"""Pretrain a masked autoencoder: `python pretrain.py --config configs/pretrain/<recipe>.yaml a.b=c ...`."""

from __future__ import annotations

import argparse
import sys

from mae_et.engine.signals import follow_launcher


def main(arguments: list[str] | None = None) -> int:
    """Parse, build, run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="a recipe of configs/pretrain/, or a file of your own")
    parser.add_argument(
        "--resume",
        default="auto",
        help="auto (default): continue what the run's folder holds; never: refuse to; or a checkpoint's folder",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.root=/data optim.batch=1024")
    options = parser.parse_args(arguments)

    follow_launcher()  # before these imports, which take seconds
    from mae_et.config import load_config
    from mae_et.pretraining import pretrain
    from mae_et.running import EXPECTED_ERRORS, exit_with

    try:
        return pretrain(load_config(options.config, options.overrides), options.resume)
    except EXPECTED_ERRORS as error:
        return exit_with(error)


if __name__ == "__main__":
    sys.exit(main())
