"""Train a classifier, from a checkpoint or not: `python finetune.py --config configs/finetune/<recipe>.yaml ...`."""

from __future__ import annotations

import argparse
import sys

from mae_et.engine.signals import follow_launcher


def main(arguments: list[str] | None = None) -> int:
    """Parse, build, run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="a recipe of configs/finetune/, or a file of your own")
    parser.add_argument(
        "--resume",
        default="auto",
        help="auto (default): continue what the run's folder holds; never: refuse to; or a checkpoint's folder",
    )
    parser.add_argument("--eval", action="store_true", help="examine the run's last checkpoint, and train nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. checkpoint=runs/x data=cifar100")
    options = parser.parse_args(arguments)

    follow_launcher()  # before these imports, which take seconds
    from mae_et.config import FinetuneConfig, load_config
    from mae_et.finetuning import finetune
    from mae_et.running import EXPECTED_ERRORS, exit_with

    try:
        config = load_config(options.config, options.overrides, FinetuneConfig)
        return finetune(config, options.resume, only_evaluate=options.eval)
    except EXPECTED_ERRORS as error:
        return exit_with(error)


if __name__ == "__main__":
    sys.exit(main())
