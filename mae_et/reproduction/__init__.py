"""The tables and figures of the papers, made here: `python -m mae_et reproduce`. This file loads no torch."""

from __future__ import annotations

import argparse
from typing import Any


def add_command(commands: Any) -> None:
    """Add the sub-command `reproduce` to argparse's sub-parsers."""
    command = commands.add_parser(
        "reproduce",
        help="a table or figure of the papers: its cost, its runs, and the paper's figures beside ours",
        description="Prints the planned cost, makes the runs that are missing, and prints the table. It can be "
        "interrupted and repeated. Without a name it lists what there is.",
    )
    command.add_argument("name", nargs="?", help="table_15, figure_4, ..., or the path of a file like theirs")
    command.add_argument("--scale", choices=("laptop", "paper"), default="laptop", help="default: laptop")
    command.add_argument("--plan", action="store_true", help="print the cost, and run nothing")
    command.add_argument("--table", action="store_true", help="print the table of what was made, and run nothing")
    command.add_argument("--yes", action="store_true", help="start at the paper's scale, which takes days of GPUs")
    command.add_argument(
        "--only", nargs="+", default=[], metavar="CELL", help="run these cells, or patterns of a grid, alone"
    )
    command.add_argument(
        "--runs", metavar="FOLDER", help="of the runs; default: runs/reproduce/<scale>, which tables share"
    )
    command.add_argument(
        "--set", nargs="+", default=[], metavar="name=path", dest="places", help="places that commands name in braces"
    )
    command.add_argument(
        "--change", nargs="+", default=[], metavar="key=value", help="of every training run, for trials; with --runs"
    )
    command.add_argument(
        "--launch", default="", metavar="COMMAND", help='of training: "torchrun --standalone --nproc_per_node=8"'
    )
    command.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time; default: 1")
    command.set_defaults(action=_reproduce)


def _reproduce(options: argparse.Namespace) -> int:
    from mae_et.config import ConfigError
    from mae_et.reproduction.command import listing, reproduce

    if options.name is None:
        print(listing())
        return 0
    wrong = [pair for pair in options.places if "=" not in pair]
    if wrong:
        raise ConfigError(f"--set {wrong[0]} is not of the form name=path")
    if options.jobs < 1:
        raise ConfigError(f"--jobs {options.jobs}: at least one run at a time")
    if options.change and options.runs is None:
        raise ConfigError("--change makes other runs than the experiment's: say with --runs where they go")
    return reproduce(
        options.name,
        options.scale,
        dict(pair.split("=", 1) for pair in options.places),
        options.only,
        options.runs,
        options.change,
        options.plan,
        options.yes,
        options.launch.split(),
        options.jobs,
        options.table,
    )
