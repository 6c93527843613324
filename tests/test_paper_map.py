"""`docs/paper.md` names nothing that is not there: symbols, tests and recipes resolve, statuses are known."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mae_et.config import load_config
from mae_et.planning import build_curriculum, build_plan

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "paper.md"
COLUMNS = ["entry", "what it is", "symbol", "test", "recipe", "reproduce", "status", "known from"]
NONE = "-"
KNOWN_FROM = {"text", "picture", "code", "notes", "unseen"}
# What a map of these papers cannot leave out.
LEAST_ENTRIES = {
    "EfficientTrain++ (arXiv 2405.08768)": ["Equation 2", "Algorithm 1", "Algorithm 2", "Proposition 1"]
    + [f"Table {number}" for number in (5, 6, 7, 9, 10, 12, 13, 14, 16, 17, 18, 20)]
    + ["Figure 1", "Figure 7", "Appendix A.1", "Appendix C", "Table 15, MAE (ET++) 400 epochs + HOG"],
    "1 GPU, 24 hours (arXiv 2211.05187)": ["Equation 1", "Table 1", "Figure 1", "Figure 2", "Appendix A"],
    "Others": [],
}


class Row(NamedTuple):
    """One row of a table; back-ticks are taken off symbol, test, recipe and reproduce."""

    paper: str
    entry: str
    what: str
    symbol: str
    test: str
    recipe: str
    reproduce: str
    status: str
    known_from: str


def cells(line: str) -> list[str]:
    """The cells of a line of a markdown table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def read_rows() -> list[Row]:
    """The rows of every table with the fixed columns, under the heading that names its paper."""
    rows, paper, in_map = [], "", False
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            paper = line[3:]
        if not line.startswith("|"):
            in_map = False
        elif cells(line) == COLUMNS:
            in_map = True
        elif in_map and not line.startswith("|---"):
            values = cells(line)
            assert len(values) == len(COLUMNS), f"{line!r} has {len(values)} cells"
            entry, what, *named, status, known_from = values
            rows.append(Row(paper, entry, what, *(name.strip("`") for name in named), status, known_from))
    return rows


ROWS = read_rows()
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.paper.split(' (')[0]}: {row.entry}")


def resolve(dotted: str) -> Any:
    """The object at a dotted path: the longest importable module, then attributes."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for name in parts[count:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(dotted)


def functions(path: Path) -> set[str]:
    """Names of the functions at the top of a module."""
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("paper", list(LEAST_ENTRIES))
def test_both_papers_are_mapped(paper):
    entries = [row.entry for row in ROWS if row.paper == paper]
    missing = [least for least in LEAST_ENTRIES[paper] if not any(starts_with(entry, least) for entry in entries)]
    assert not missing
    assert len(entries) == len(set(entries))


def starts_with(entry: str, name: str) -> bool:
    """`Table 1` begins `Table 1, caption` and not `Table 10`."""
    return entry == name or entry.startswith(f"{name},")


def test_every_row_is_of_one_of_the_papers():
    assert {row.paper for row in ROWS} == set(LEAST_ENTRIES)


@every_row
def test_symbol_is_there(row):
    if row.symbol != NONE:
        assert row.symbol.startswith("mae_et.")
        assert resolve(row.symbol) is not None


@every_row
def test_test_is_there(row):
    if row.test != NONE:
        file, separator, function = row.test.partition("::")
        assert separator
        assert function.startswith("test_")
        assert function in functions(REPOSITORY / file)


@every_row
def test_recipe_is_there(row):
    if row.recipe != NONE:
        assert row.recipe.startswith("configs/")
        assert (REPOSITORY / row.recipe).is_file()


@every_row
def test_experiment_is_there(row):
    if row.reproduce != NONE:
        assert (REPOSITORY / "configs" / "reproduce" / f"{row.reproduce}.yaml").is_file()


@every_row
def test_status_is_known_and_has_what_it_needs(row):
    kind, _, reason = row.status.partition(":")
    assert kind in ("measured here", "recipe only", "absent")
    assert row.known_from in KNOWN_FROM
    if kind == "absent":
        assert reason.strip(), f"{row.entry} is absent without a reason"
        assert row.test == row.recipe == row.reproduce == NONE
    else:
        assert not reason
        assert row.symbol != NONE
        assert row.known_from != "unseen"
    if kind == "measured here":
        assert (row.test, row.recipe) != (NONE, NONE)
    if kind == "recipe only":
        assert row.recipe != NONE


def test_sizes_by_a_linear_rule_over_epochs():
    """1 GPU, 24 hours, Section 2.2: 32 px, and 32 px more every 5 epochs until 224 px, of DeiT's 300 epochs."""
    stages = [f"{{end: {5 * k / 300}, bandwidth: {32 * k}}}" for k in range(1, 7)] + ["{end: 1, bandwidth: 224}"]
    overrides = [f"curriculum.stages=[{', '.join(stages)}]", "curriculum.axis=epoch", "epochs=300"]
    config = load_config(None, [*overrides, "optim.batch=64", "target.kind=pixel"])
    assert build_curriculum(config.curriculum, (224, 224), 16, config.epochs).axis == "epoch"
    steps_per_epoch = 20
    plan = build_plan(config, 64 * steps_per_epoch)
    for epoch in range(300):
        expected = min(32 * (1 + epoch // 5), 224)
        assert plan.at(epoch * steps_per_epoch).bandwidth == (expected, expected)
        assert plan.at((epoch + 1) * steps_per_epoch - 1).bandwidth == (expected, expected)
