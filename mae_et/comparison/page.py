"""A comparison as one HTML file that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import base64
import datetime
import io
import platform
import shlex
import sys
from collections.abc import Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from mae_et.comparison.figures import NARROW, WIDE, Drawn, loss_figure, rate_figure, score_figure, spans_decades, swatch
from mae_et.comparison.runs import ComparedRun, Comparison
from mae_et.comparison.scores import is_share
from mae_et.comparison.speedup import Reached
from mae_et.comparison.style import STYLE
from mae_et.comparison.table import SIGNS, GroupRow, group_rows, spread_text, time_text
from mae_et.comparison.words import (
    INTERVAL,
    SPOKEN,
    by_group,
    cost_text,
    findings,
    score_name,
    times,
    told,
)
from mae_et.curriculum.table import quantity
from mae_et.engine.run_folder import write_text_atomic

# A page of 18 pictures (6 runs of 3 stages) stays below 3 MB with them; of more, each is smaller.
_PICTURES, _WIDTH, _LEAST_WIDTH = 18, 840, 420

# Should a name ever get past the escaping, the browser still runs and loads nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_page(
    comparison: Comparison, path: Path, command: str | None = None, when: datetime.datetime | None = None
) -> None:
    """Write a comparison as one HTML page, for a phone, a desktop, dark mode and print.

    The same comparison, command and time give the same bytes, with the same versions of the libraries.

    Args:
        comparison: to be shown.
        path: of the file; its folder is made.
        command: that made it, for its foot; default: that of this process, if it is one of ours.
        when: default: now.

    Raises:
        OSError: the file cannot be written, or a picture cannot be read.
    """
    if command is None and Path(sys.argv[0]).parts[-2:] == ("mae_et", "__main__.py"):
        command = shlex.join(["python", "-m", "mae_et", *sys.argv[1:]])
    when = when or datetime.datetime.now().astimezone()
    title = f"{len(comparison.runs)} runs at equal {SPOKEN[comparison.axis].noun}"
    sections = [
        _lead(comparison),
        _table(comparison),
        _scores(comparison),
        _losses(comparison),
        _rates(comparison),
        _differences(comparison),
        _pictures(comparison),
        _making(comparison, command, when),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(
        path,
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(filter(None, sections)) + "\n</main>\n</body>\n</html>\n",
    )


def _lead(comparison: Comparison) -> str:
    groups = list(by_group(comparison))
    (_, first), *rest = findings(comparison)
    items = "".join(f"<li>{_named(groups.index(group), sentence)}</li>" for group, sentence in rest)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in comparison.notes)
    return f'<div class="lead"><p>{escape(first)}</p>{f"<ul>{items}</ul>" if items else ""}{notes}</div>'


def _table(comparison: Comparison) -> str:
    rows = {row.name: row for row in group_rows(comparison)}
    groups = by_group(comparison)
    several = any(len(runs) > 1 for runs in groups.values())
    target = told(comparison.reached[0].score, comparison)
    heads = ["run", "seeds" if several else "seed", "final", "best, and where", "compute", "time"]
    heads += [f"{SPOKEN[comparison.axis].noun} to reach {target}", "speed-up", "status"]
    cells = "".join(
        f'<th scope="col"{_number(column)}>{escape(head)}</th>' for column, head in enumerate(heads, start=-1)
    )
    body = [row for index, group in enumerate(groups) for row in _group_rows(comparison, rows[group], index)]
    note = f"Scores: {score_name(comparison.score)}. Speed-ups are against {comparison.baseline}."
    if several:
        note += (
            " Runs of a group differ in their seed alone; its figures are means over seeds ± the standard deviation, "
            "and what a score takes is their geometric mean."
        )
    return (
        f'<h2 id="runs">Runs</h2>\n<div class="scroll" tabindex="0" role="region" aria-labelledby="runs"><table>\n'
        f"<thead><tr>{cells}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody></table></div>"
        f'<p class="note">{escape(note)}</p>'
    )


def _group_rows(comparison: Comparison, row: GroupRow, index: int) -> list[str]:
    """A row of a group of one run; of more, one of their means and one of each."""
    singles = [_run_values(comparison, run, cost) for run, cost in zip(row.runs, row.reached.costs)]
    speedup = _speedup(row.reached, row.name == comparison.baseline)
    label = _named(index, row.name)
    if len(row.runs) == 1:
        return [_row(label, [*singles[0][:-1], speedup, singles[0][-1]])]
    share = is_share(comparison.runs, comparison.score)
    states = [run.status for run in row.runs]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    values = [
        f"{len(row.runs)} seeds",
        spread_text(row.final, share),
        f"{spread_text(row.best, share)}<small>at {cost_text(row.best_at, comparison)}</small>",
        f"{quantity(row.flops)}FLOPs",
        time_text(row.hours),
        _group_cost(comparison, row),
        speedup,
        ", ".join(f"{count} {state}" if len(counts) > 1 else state for state, count in counts.items()),
    ]
    seeds = (_row(escape(run.name), [*single[:-1], "", single[-1]], "seed") for run, single in zip(row.runs, singles))
    return [_row(label, values), *seeds]


def _row(label: str, values: Sequence[str], kind: str = "group") -> str:
    cells = "".join(f"<td{_number(column)}>{value}</td>" for column, value in enumerate(values))
    return f'<tr class="{kind}"><th scope="row">{label}</th>{cells}</tr>'


def _number(column: int) -> str:
    """The class of a column of numbers: all but the run, its seed and its status."""
    return ' class="number"' if 1 <= column <= 6 else ""


def _run_values(comparison: Comparison, run: ComparedRun, cost: float | None) -> list[str]:
    """Seed, final, best, compute, time, cost to reach the score, status."""
    points = run.scores[comparison.score]
    best = max(points, key=lambda point: point.score)  # the first of equals
    return [
        str(run.seed),
        told(points[-1].score, comparison),
        f"{told(best.score, comparison)}<small>at {cost_text(best.cost, comparison)}</small>",
        f"{quantity(run.spent['compute'])}FLOPs",
        time_text(run.spent["hours"]),
        "never" if cost is None else cost_text(cost, comparison),
        escape(run.status),
    ]


def _group_cost(comparison: Comparison, row: GroupRow) -> str:
    if row.cost is None:
        return "never"
    seeds, of = row.reached.speedup.seeds[1], row.reached.speedup.of[1]
    some = "" if seeds == of else f"<small>{seeds} of {of} seeds</small>"
    return cost_text(row.cost, comparison) + some


def _speedup(reached: Reached, is_baseline: bool) -> str:
    found = reached.speedup
    if is_baseline:
        return "baseline"
    if found.ratio is None:
        return "–"
    if found.low is None or found.high is None:
        return f"{SIGNS[found.bound]}{escape(times(found.ratio))}×<small>no interval</small>"
    return f"{escape(times(found.ratio))}×<small>{escape(f'{times(found.low)} to {times(found.high)}')}</small>"


def _both(wide: Drawn, narrow: Drawn, label: str, caption: str) -> str:
    """A figure for desktops and paper, and one for phones; a style sheet shows one of them."""
    return (
        f'<figure><div role="img" aria-label="{escape(label)}"><div class="wide">{wide.svg}</div>'
        f'<div class="narrow">{narrow.svg}</div></div>'
        f"<figcaption>{escape(f'{caption} {wide.note}'.strip())}</figcaption></figure>"
    )


def _named(index: int, name: str) -> str:
    return f'<span class="named">{swatch(index)}<span>{escape(name)}</span></span>'


def _legend(comparison: Comparison, *more: str) -> str:
    items = [_named(index, group) for index, group in enumerate(by_group(comparison))]
    return f'<ul class="legend">{"".join(f"<li>{item}</li>" for item in [*items, *more])}</ul>'


def _scores(comparison: Comparison) -> str:
    name, noun = score_name(comparison.score), SPOKEN[comparison.axis].label
    groups = by_group(comparison)
    several = any(len(runs) > 1 for runs in groups.values())
    caption = "Bold: mean over seeds; thin: each seed. " if several else ""
    caption += "An outlined marker is where a group reaches the dashed score. "
    if any(run.stages for run in comparison.runs):
        caption += "Below: the stages of each group, with their B in px."
    found = " ".join(sentence for _, sentence in findings(comparison))
    label = f"{name} against {noun}, a line for each of {', '.join(groups)}. {found}"
    drawn = (score_figure(comparison, WIDE), score_figure(comparison, NARROW))
    figure, more = _both(*drawn, label, caption), ""
    if spans_decades(comparison):
        drawn = (score_figure(comparison, WIDE, log=True), score_figure(comparison, NARROW, log=True))
        label = f"{name} against {noun} on a logarithmic axis"
        caption = "Equal ratios of cost lie at equal distances."
        more = f"<details><summary>On a logarithmic axis</summary>{_both(*drawn, label, caption)}</details>"
    dashed = '<svg class="swatch" viewBox="0 0 28 12" aria-hidden="true"><path d="M0 6h28" class="dashed"/></svg>'
    target = f"{told(comparison.reached[0].score, comparison)}, to be reached"
    legend = _legend(comparison, f'<span class="named">{dashed}<span>{escape(target)}</span></span>')
    head = escape(f"{name[:1].upper()}{name[1:]} against cost")
    return f'<section class="whole"><h2>{head}</h2>\n{legend}\n{figure}</section>\n{more}'


def _losses(comparison: Comparison) -> str:
    panels = []
    for index, group in enumerate(by_group(comparison)):
        drawn = loss_figure(comparison, group)
        if drawn:
            note = f"<figcaption>{escape(drawn.note)}</figcaption>" if drawn.note else ""
            label = escape(f"Training loss of {group} against {SPOKEN[comparison.axis].label}")
            panels.append(
                f"<figure><h3>{_named(index, group)}</h3>"
                f'<div role="img" aria-label="{label}">{drawn.svg}</div>{note}</figure>'
            )
    if not panels:
        return ""
    note = "Each panel has its own scale. The loss of another target, or of another B, is another quantity."
    if any(run.stages for run in comparison.runs):
        note += " Lines mark the stages; above them their B in px."
    return f'<h2>Training loss</h2>\n<p class="note before">{note}</p>\n<div class="grid">{"".join(panels)}</div>'


def _rates(comparison: Comparison) -> str:
    wide, narrow = rate_figure(comparison, WIDE), rate_figure(comparison, NARROW)
    if wide is None or narrow is None:
        return ""
    label = f"Learning rate against {SPOKEN[comparison.axis].label}"
    figure = _both(Drawn(wide), Drawn(narrow), label, "Of the first run of each group.")
    return f'<section class="whole"><h2>Learning rate</h2>\n{_legend(comparison)}\n{figure}</section>'


def _differences(comparison: Comparison) -> str:
    """A column a group; where its runs differ, as in their seeds, all values."""
    if not comparison.differences:
        return "<h2>Configuration</h2>\n<p>The configurations of these runs do not differ.</p>"
    groups = by_group(comparison)
    heads = "".join(f'<th scope="col">{_named(i, group)}</th>' for i, group in enumerate(groups))
    rows = []
    for key, values in comparison.differences:
        of_run = {run.name: value for run, value in zip(comparison.runs, values)}
        cells = (dict.fromkeys(of_run[run.name] for run in runs) for runs in groups.values())
        row = "".join(f'<td class="value"><code>{escape(", ".join(values))}</code></td>' for values in cells)
        rows.append(f'<tr><th scope="row"><code>{escape(key)}</code></th>{row}</tr>')
    return (
        '<h2 id="differences">What differs in the configurations</h2>\n'
        '<div class="scroll" tabindex="0" role="region" aria-labelledby="differences"><table class="settings">\n'
        f'<thead><tr><th scope="col">key</th>{heads}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def _pictures(comparison: Comparison) -> str:
    """Pictures of one run a group, side by side by bandwidth; the last stage is open, the others fold."""
    shown = [
        (index, run)
        for index, runs in enumerate(by_group(comparison).values())
        if (run := next((run for run in runs if run.pictures), None)) is not None
    ]
    if not shown:
        return ""
    rows: dict[str, dict[str, tuple[str, Path]]] = {}
    longest = max((run for _, run in shown), key=lambda run: len(run.pictures))
    for run in [longest, *(run for _, run in shown)]:
        for name, path in run.pictures.items():
            rows.setdefault(_row_of(name), {})[run.name] = (name, path)
    width = _width(sum(map(len, rows.values())))
    columns = 2 if len(shown) in (2, 4) else min(len(shown), 3)
    parts = []
    for row, found in rows.items():
        cells = "".join(_picture_cell(index, run, found.get(run.name), row, width) for index, run in shown)
        opened = " open" if row == list(rows)[-1] else ""
        parts.append(
            f'<details{opened}><summary>{escape(row)}</summary><div class="pictures" style="--columns:{columns}">'
            f"{cells}</div></details>"
        )
    note = "What each stage sees, is asked for and answers, as the run drew it when the stage ended."
    if any(len(runs) > 1 for runs in by_group(comparison).values()):
        note += " One run of each group."
    return f'<h2>Reconstructions</h2>\n<p class="note before">{note}</p>\n' + "\n".join(parts)


def _row_of(name: str) -> str:
    """Stages stand side by side by what they see: "stage 3, B=28" of one run beside "stage 1, B=28" of another."""
    before, mark, bandwidth = name.rpartition("B=")
    return mark + bandwidth if before.startswith("stage ") else name


def _picture_cell(index: int, run: ComparedRun, found: tuple[str, Path] | None, row: str, width: int) -> str:
    if found is None:
        none = f'<div class="none">no picture of {escape(row)}</div>'
        return f"<figure><figcaption>{_named(index, run.name)}</figcaption>{none}</figure>"
    name, path = found
    data, size = _recompressed(path, width)
    alt = escape(f"{run.name}, {name}: what the model sees, what it is asked for, and what it answers")
    return (
        f"<figure><figcaption>{_named(index, f'{run.name}, {name}')}</figcaption>"
        f'<img src="data:image/webp;base64,{data}" width="{size[0]}" height="{size[1]}" alt="{alt}"></figure>'
    )


def _width(pictures: int) -> int:
    """Of each of so many pictures, so that together they weigh what 18 do."""
    return max(_LEAST_WIDTH, round(_WIDTH * min(1.0, _PICTURES / pictures) ** 0.5))


def _recompressed(path: Path, width: int) -> tuple[str, tuple[int, int]]:
    """A picture as base64 WebP of at most a width, and its size in px."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "WEBP", quality=75)
    return base64.b64encode(out.getvalue()).decode("ascii"), image.size


def _making(comparison: Comparison, command: str | None, when: datetime.datetime) -> str:
    versions = [f"{name} {version(name)}" for name in ("mae_et", "torch", "matplotlib")]
    folders = "<br>".join(f"{escape(run.name)}: <code>{escape(str(run.path))}</code>" for run in comparison.runs)
    facts = [
        *([("Command", f"<pre><code>{escape(command)}</code></pre>")] if command else []),
        ("Made", escape(when.isoformat(sep=" ", timespec="minutes"))),
        ("With", escape(", ".join([*versions, f"Python {platform.python_version()}"]))),
        ("Runs", folders),
        ("Cost", escape(SPOKEN[comparison.axis].meaning)),
        ("Speed-up", escape(INTERVAL)),
    ]
    entries = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts)
    return f"<h2>How it was made</h2>\n<dl>{entries}</dl>"
