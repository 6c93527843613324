"""Runs side by side on one axis: `python -m mae_et compare`. This file loads no torch."""

from __future__ import annotations

import argparse
from typing import Any


def add_command(commands: Any) -> None:
    """Add the sub-command `compare` to argparse's sub-parsers."""
    command = commands.add_parser(
        "compare",
        help="runs on one axis: scores, what they cost, and the speed-up against a baseline",
        description="Runs that differ in their seed alone are one group. Prints the table and what differs in their "
        "configurations.",
    )
    command.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs of any kind")
    command.add_argument(
        "--axis", choices=("compute", "hours", "images", "fraction"), default="compute", help="default: compute, FLOPs"
    )
    command.add_argument("--score", metavar="NAME", help="such as eval/probe; default: the best that all runs have")
    command.add_argument("--baseline", metavar="NAME", help="a run or a group; default: that of the first run")
    command.add_argument(
        "--reach", type=float, metavar="SCORE", help="such as 0.85; default: the baseline's at its end"
    )
    command.add_argument(
        "--with-pretraining", action="store_true", help="add what the networks cost that the runs began with"
    )
    command.add_argument("--csv", metavar="FILE", help="the table, and beside it FILE-curves of every curve")
    command.add_argument("--html", metavar="FILE", help="one page with the curves and pictures of stages")
    command.set_defaults(action=_compare)


def _compare(options: argparse.Namespace) -> int:
    from mae_et.comparison.command import compare

    compare(
        options.runs,
        options.axis,
        options.score,
        options.baseline,
        options.reach,
        options.with_pretraining,
        options.csv,
        options.html,
    )
    return 0
