"""`python -m mae_et compare`: runs on one axis, in the terminal, as CSV, and as a page."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from mae_et.comparison.comparing import compare_runs
from mae_et.comparison.runs import Comparison
from mae_et.comparison.scores import is_share
from mae_et.comparison.table import comparison_table, differences_table, score_text, write_tables

Say = Callable[[str], None]
WIDTH = 110


def compare(
    folders: Sequence[str | Path],
    axis: str = "compute",
    score: str | None = None,
    baseline: str | None = None,
    reach: float | None = None,
    with_pretraining: bool = False,
    csv: str | None = None,
    html: str | None = None,
    say: Say = print,
) -> Comparison:
    """Compare runs, and print it.

    Args:
        folders, axis, score, baseline, reach, with_pretraining: see `compare_runs`.
        csv: file of the table; its curves go beside it.
        html: file of the page.
        say: where it is printed.

    Raises:
        ConfigError: see there.
    """
    comparison = compare_runs(folders, axis, score, baseline, reach, with_pretraining)
    say(text(comparison))
    if csv is not None:
        beside = write_tables(comparison, Path(csv))
        say(f"\ntable: {csv}\ncurves: {beside}")
    if html is not None:
        from mae_et.comparison.page import write_page

        Path(html).parent.mkdir(parents=True, exist_ok=True)
        write_page(comparison, Path(html))
        say(f"\npage: {html}")
    return comparison


def text(comparison: Comparison) -> str:
    """The whole comparison for a terminal."""
    unit = f" in {comparison.unit}" if comparison.axis == "compute" else ""
    target = score_text(comparison.reached[0].score, is_share(comparison.runs, comparison.score))
    lines = [f"{comparison.score} by {comparison.axis}{unit}\n", comparison_table(comparison)]
    lines.append("")
    lines += wrapped(
        f"Means over seeds, ± the deviation of one. What {target} takes is where the curve, straight between its "
        "scores, first gets there, whether or not it stays; over seeds the geometric mean. Speed-ups have their 95 % "
        "interval over seeds (Welch)."
    )
    if comparison.differences:
        lines.append(f"\nWhat differs in the configurations:\n\n{differences_table(comparison)}")
    others = sorted(set.intersection(*(set(run.scores) for run in comparison.runs)) - {comparison.score})
    if others:
        lines += ["", *wrapped(f"other scores (--score): {', '.join(others)}")]
    for note in comparison.notes:
        lines += ["", *wrapped(f"note: {note}")]
    return "\n".join(lines)


def wrapped(sentences: str) -> list[str]:
    """Lines that fit a terminal; names are left whole."""
    return textwrap.wrap(sentences, WIDTH, break_long_words=False, break_on_hyphens=False)
