"""Tools around a run: `python -m mae_et plan | evaluate`."""

from __future__ import annotations

import argparse
import sys

from mae_et.config import ConfigError, PretrainConfig, load_config


def number_of_images(config: PretrainConfig) -> int:
    """`data.images`, or what a listing of the data counts; no image is opened.

    Raises:
        ConfigError: there is neither.
    """
    if config.data.images is not None:
        return config.data.images
    from mae_et.data.sources import count_images

    try:
        return count_images(config.data.source, config.data.root, config.data.split)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{error}\n(a plan needs only the number of images: data.images=...)") from None


def plan(options: argparse.Namespace) -> int:
    """Print the plan of a configuration. No image is opened, and torch is loaded only to count images."""
    from mae_et.curriculum.table import plan_table
    from mae_et.planning import build_plan

    config = load_config(options.config, options.overrides)
    print(plan_table(build_plan(config, number_of_images(config))))
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """Score a run's encoder beside an untrained one and raw pixels, and draw its curves."""
    from mae_et.report import evaluate_run

    evaluate_run(options.run, options.overrides)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Parse and dispatch; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mae_et", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("plan", help="what a run will see and spend, before anything is spent")
    command.add_argument("--config", required=True)
    command.set_defaults(action=plan)

    command = commands.add_parser("evaluate", help="probe and kNN of a run's encoder, and its curves")
    command.add_argument("run", help="a run's folder")
    command.set_defaults(action=evaluate)

    for command in commands.choices.values():
        command.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configuration")
    options = parser.parse_args(arguments)
    try:
        return options.action(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
