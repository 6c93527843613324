"""`python -m tests.torture.table LOG`: the table of docs/reliability.md, from the log of the trials."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.torture.catalogue import find_trials, table
from tests.torture.runner import read_log

BEGIN, END = "<!-- the table: begin -->", "<!-- the table: end -->"


def filled(page: str, content: str) -> str:
    """The page with `content` between its two marks.

    Raises:
        ValueError: it has not both.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN if not begin else END}")
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Parse, read, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path)
    parser.add_argument("--into", type=Path, default=Path("docs/reliability.md"))
    options = parser.parse_args(arguments)
    rows = read_log(options.log)
    if not rows:
        parser.error(f"{options.log} has no trials")
    options.into.write_text(filled(options.into.read_text(), table(rows, find_trials())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
