"""Searches for a curriculum: `python -m mae_et search`. This file loads no torch; what it calls does."""

from __future__ import annotations

import argparse
from typing import Any


def add_command(commands: Any) -> None:
    """Add the sub-command `search` to argparse's sub-parsers."""
    command = commands.add_parser(
        "search",
        help="find a curriculum for a recipe, a model and a data set",
        description="EfficientTrain++'s Algorithm 2 (sequential: fixed compute) or 1 (greedy: accuracy is kept). "
        "Scores are of images held out of train. The same command continues a search that was ended, "
        "however it was ended.",
    )
    command.add_argument("--config", required=True, help="a recipe of configs/search/, or a file of your own")
    command.add_argument("--plan", action="store_true", help="say what the search would cost, and stop")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configuration")
    command.set_defaults(action=_search)


def _search(options: argparse.Namespace) -> int:
    from mae_et.config import SearchConfig, load_config
    from mae_et.search.run import search

    return search(load_config(options.config, options.overrides, SearchConfig), only_plan=options.plan)
