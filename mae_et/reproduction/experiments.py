"""Experiments as data: a table or figure of a paper, and the cells that reproduce it at each scale."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from mae_et.config import ConfigError
from mae_et.reproduction.grid import Levels, expand, read_grid

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "configs" / "reproduce"
SCALES = ("laptop", "paper")
KNOWN = ("text", "picture", "code", "notes", "unseen")
# Programs by the first word of a cell's command, and what they take after it.
TRAINING = ("pretrain.py", "finetune.py")
PROBES = ("linear_probe.py", "knn")
STUDIES = ("spectrum", "similarity")
PROGRAMS = (*TRAINING, *PROBES, *STUDIES, "search", "plan")

_EXPERIMENT_KEYS = {"title", "paper", "entry", "known", "note", "scales"}
_SCALE_KEYS = {"caption", "runs", "settings", "planning", "grid", "curves", "cells"}
_CELL_KEYS = {"title", "command", "seeds", "paper", "planning", "only", "skip"}
_CURVE_KEYS = {"title", "cells", "of", "over", "baseline", "score"}


@dataclass(frozen=True)
class Cell:
    """One row: a command, made once for each seed.

    Attributes:
        name: of its folders, and of the places of later cells that use it.
        title: for people.
        words: of the command: the program, then its arguments; `{name}` stands for a folder.
        seeds: of the runs; studies and plans have none.
        paper: the paper's figure of this row, "" where it has none.
        planning: overrides for the plan alone, where the data are not at hand.
        pattern: the name in the file, before the grid's levels were put in.
        levels: of the grid, by factor.
    """

    name: str
    title: str
    words: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    paper: str = ""
    planning: tuple[str, ...] = ()
    pattern: str = ""
    levels: Mapping[str, str] = field(default_factory=dict)

    @property
    def program(self) -> str:
        """One of `PROGRAMS`."""
        return self.words[0]

    @property
    def uses(self) -> list[str]:
        """Names in braces in the command."""
        return [name for word in self.words for name in re.findall(r"\{(\w+)\}", word)]


@dataclass(frozen=True)
class Curves:
    """Scores against cost, from runs of several budgets: which cells, and what is compared.

    Attributes:
        title: for people.
        cells: pattern of the cells that have the scores.
        of: the grid's factor whose levels are compared.
        over: the factor of the budgets.
        baseline: a level of `of`.
        score: which of a run's scores, as its metrics or its report call it; "" takes its first.
    """

    title: str
    cells: str
    of: str
    over: str
    baseline: str
    score: str = ""


@dataclass(frozen=True)
class Scale:
    """The cells of one scale, in the order in which they run.

    Attributes:
        name: "laptop" or "paper", or "table" of a file that has but one.
        cells: by name.
        runs: folder of all runs.
        settings: overrides of every run.
        caption: what is to be known beside the numbers.
        grid: levels by factor, of patterns of cells.
        curves: drawn and measured after the table.
    """

    name: str
    cells: dict[str, Cell]
    runs: Path
    settings: tuple[str, ...] = ()
    caption: str = ""
    grid: Levels = field(default_factory=dict)
    curves: tuple[Curves, ...] = ()


@dataclass(frozen=True)
class Experiment:
    """A table or figure.

    Attributes:
        name: of its file.
        title: for people.
        paper, entry: heading and entry of docs/paper.md.
        known: where the paper's content is known from, one of `KNOWN`.
        note: what is ours in it.
        scales: by name.
    """

    name: str
    title: str
    paper: str = ""
    entry: str = ""
    known: str = "unseen"
    note: str = ""
    scales: dict[str, Scale] = field(default_factory=dict)


def names() -> list[str]:
    """Experiments that `reproduce` knows by name."""

    def numbers(name: str) -> list[Any]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

    return sorted((path.stem for path in FOLDER.glob("*.yaml")), key=numbers)


def find(name: str) -> Path:
    """The file of an experiment, from its name ("table_15", "Table 15") or path.

    Raises:
        ConfigError: there is none; the known names are listed.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
    else:
        wanted = re.sub(r"[^a-z0-9]", "", name.lower())
        path = next((FOLDER / f"{known}.yaml" for known in names() if known.replace("_", "") == wanted), Path(name))
    if not path.is_file():
        raise ConfigError(f"there is no experiment {name!r}; known: {', '.join(names())}, or a file's path")
    return path


def read_experiment(path: Path) -> Experiment:
    """An experiment from its file.

    A file with `cells` at its top, without scales, is a table of its own.

    Raises:
        ConfigError: unknown keys or programs, a cell that names a folder of none before it, or no cells.
    """
    values = yaml.safe_load(path.read_text())
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values at its top level")
    if "cells" in values:
        return Experiment(path.stem, path.stem, scales={"table": _scale(path, "table", values)})
    _refuse_unknown(path, values, _EXPERIMENT_KEYS)
    known, scales = str(values.get("known", "unseen")), values.get("scales") or {}
    if known not in KNOWN or not scales or not set(scales) <= set(SCALES):
        raise ConfigError(f"{path}: known={known} must be one of {', '.join(KNOWN)}; scales: {', '.join(SCALES)}")
    texts = {key: str(values.get(key, "")).strip() for key in ("title", "paper", "entry", "note")}
    found = {name: _scale(path, name, scale) for name, scale in scales.items()}
    return Experiment(path.stem, known=known, scales=found, **texts)


def _scale(path: Path, name: str, values: Mapping[str, Any]) -> Scale:
    _refuse_unknown(path, values, _SCALE_KEYS)
    planning: Mapping[str, list[str]] = values.get("planning") or {}
    runs = Path(values.get("runs", f"runs/reproduce/{name}"))
    grid = read_grid(path, values.get("grid") or {})
    cells: dict[str, Cell] = {}
    for pattern, cell in (values.get("cells") or {}).items():
        _refuse_unknown(path, cell, _CELL_KEYS)
        for cell_name, filled, levels in expand(path, grid, pattern, cell):
            cells[cell_name] = replace(_cell(path, cell_name, filled, planning), pattern=pattern, levels=levels)
    if not cells:
        raise ConfigError(f"{path} has no cells")
    caption = " ".join(str(values.get("caption", "")).split())
    curves = tuple(_curves(path, grid, cells, entry) for entry in values.get("curves") or ())
    return Scale(name, cells, runs, tuple(values.get("settings") or ()), caption, grid, curves)


def _curves(path: Path, grid: Levels, cells: Mapping[str, Cell], values: Mapping[str, Any]) -> Curves:
    _refuse_unknown(path, values, _CURVE_KEYS)
    curves = Curves(**values)
    known = {"cells": {cell.pattern for cell in cells.values()}, "of": grid, "over": grid}
    known["baseline"] = grid.get(curves.of, {})
    for key, allowed in known.items():
        if getattr(curves, key) not in allowed:
            raise ConfigError(
                f"{path}: curves: {key}: there is no {getattr(curves, key)!r}; there is {', '.join(allowed)}"
            )
    return curves


def _cell(path: Path, name: str, values: Mapping[str, Any], planning: Mapping[str, list[str]]) -> Cell:
    words = tuple(shlex.split(values["command"]))
    if words[0] not in PROGRAMS:
        raise ConfigError(f"{path}: {name}: unknown program {words[0]!r}; known: {', '.join(PROGRAMS)}")
    common = planning.get("pretrain" if words[0] == "pretrain.py" else "labelled", [])
    return Cell(
        name=name,
        title=values["title"],
        words=words,
        seeds=tuple(values.get("seeds", [0])),
        paper=str(values.get("paper", "")),
        planning=tuple(values.get("planning") or common),
    )


def _refuse_unknown(path: Path, values: Mapping[str, Any], known: set[str]) -> None:
    unknown = set(values) - known
    if unknown:
        raise ConfigError(f"{path}: unknown keys {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")


def fill(words: tuple[str, ...], places: Mapping[str, str]) -> list[str]:
    """The words with `{name}` replaced by its place.

    Raises:
        ConfigError: a name without a place.
    """

    def place(match: re.Match[str]) -> str:
        if match[1] not in places:
            raise ConfigError(f"{match[0]} is no earlier cell: say where it is, with --set {match[1]}=/path/to/it")
        return places[match[1]]

    return [re.sub(r"\{(\w+)\}", place, word) for word in words]
