"""Probe a frozen encoder: `python linear_probe.py --config configs/probe/<recipe>.yaml checkpoint=runs/x`."""

from __future__ import annotations

import argparse
import sys

from mae_et.engine.signals import follow_launcher


def main(arguments: list[str] | None = None) -> int:
    """Parse, build, run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="a recipe of configs/probe/, or a file of your own")
    parser.add_argument(
        "--resume",
        default="auto",
        help="of protocol=mae: auto (default) continues what the run's folder holds; never; or a checkpoint's folder",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. checkpoint=runs/x data=cifar100")
    options = parser.parse_args(arguments)

    follow_launcher()  # before these imports, which take seconds
    from mae_et.config import ProbeConfig, load_config
    from mae_et.probing import probe
    from mae_et.running import EXPECTED_ERRORS, exit_with

    try:
        return probe(load_config(options.config, options.overrides, ProbeConfig), options.resume)
    except EXPECTED_ERRORS as error:
        return exit_with(error)


if __name__ == "__main__":
    sys.exit(main())
