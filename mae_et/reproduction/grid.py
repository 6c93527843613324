"""Cells by the grid: factors with levels, and patterns of cells that are made once for each combination of levels.

    grid:
      method:
        hog: {title: MAE + HOG, words: curriculum=baseline}
        hog_et: {title: MAE + HOG + ET++, words: curriculum=efficienttrain_pp}
      budget:
        half: {title: 0.5 epochs, words: epochs=0.5}
    cells:
      <method>_<budget>:
        title: <method>, <budget>
        command: pretrain.py --config ... <method> <budget>
      <method>_<budget>_tuned:
        title: <method>, <budget>, fine-tuned
        command: finetune.py --config ... checkpoint={<method>_<budget>}
        only: {budget: [half]}
        skip: [{method: hog_et, budget: half}]

In a cell's name, and in braces, `<method>` is the level's name; in titles its title, in commands its words. A level may
also have `seeds: [1, 2]`, in place of its cells' own.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mae_et.config import ConfigError

Levels = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""`levels[factor][level]` is {"title": for people, "words": of commands, "seeds": in place of the cells', or None}."""

_FACTOR = re.compile(r"<(\w+)>")
_LEVEL_KEYS = {"title", "words", "seeds"}


def read_grid(path: Path, values: Mapping[str, Any]) -> Levels:
    """The factors of a file; a level without a title is called by its name, one without words adds none.

    Raises:
        ConfigError: a level has unknown keys.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for factor, levels in values.items():
        found[factor] = {}
        for level, given in levels.items():
            given = given or {}
            if unknown := set(given) - _LEVEL_KEYS:
                raise ConfigError(f"{path}: grid: {factor}: {level}: unknown keys {', '.join(sorted(unknown))}")
            title, words = str(given.get("title", level)), str(given.get("words", ""))
            found[factor][str(level)] = {"title": title, "words": words, "seeds": given.get("seeds")}
    return found


def expand(
    path: Path, grid: Levels, name: str, cell: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    """The cells of a pattern, in the order of the file: their names, their values and their levels.

    Raises:
        ConfigError: a factor or level that the grid lacks, or one that the command has and the name has not.
    """
    if lacking := {"title", "command"} - set(cell):
        raise ConfigError(f"{path}: {name} has no {' and no '.join(sorted(lacking))}")
    factors = list(dict.fromkeys(_FACTOR.findall(name)))
    only, skip = cell.get("only") or {}, cell.get("skip") or []
    named = {*only, *itertools.chain.from_iterable(skip)}
    for factor in {*factors, *named, *_FACTOR.findall(cell["title"] + cell["command"])}:
        if factor not in grid:
            raise ConfigError(f"{path}: {name}: the grid has no {factor!r}; it has {', '.join(grid) or 'no factors'}")
        if factor not in factors:
            raise ConfigError(f"{path}: {name}: <{factor}> must be in the cell's name as well")
        chosen = {*map(str, only.get(factor, ())), *(str(entry[factor]) for entry in skip if factor in entry)}
        if missing := chosen - set(grid[factor]):
            raise ConfigError(f"{path}: {name}: {factor} has no {', '.join(sorted(missing))}")
    rest = {key: value for key, value in cell.items() if key not in ("only", "skip")}
    for chosen in itertools.product(*([str(v) for v in only.get(factor, grid[factor])] for factor in factors)):
        levels = dict(zip(factors, chosen))
        if any(left_out.items() <= levels.items() for left_out in skip):
            continue
        seeds = [own for factor, level in levels.items() if (own := grid[factor][level]["seeds"]) is not None]
        own = {"seeds": seeds[0]} if seeds else {}
        yield _named(name, levels), {**rest, **own, **_texts(cell, grid, levels)}, levels


def _texts(cell: Mapping[str, Any], grid: Levels, levels: Mapping[str, str]) -> dict[str, str]:
    def said(key: str, text: str) -> str:
        return _FACTOR.sub(lambda match: grid[match[1]][levels[match[1]]][key], text)

    in_braces = re.sub(r"\{[^}]*\}", lambda match: _named(match[0], levels), cell["command"])
    return {"title": said("title", cell["title"]), "command": said("words", in_braces)}


def _named(text: str, levels: Mapping[str, str]) -> str:
    return _FACTOR.sub(lambda match: levels[match[1]], text)
