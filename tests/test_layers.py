"""Imports point one way, and planning needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

# Rooms from the ground up; a module may import from rooms before its own, and from its own.
ROOMS = [
    {"_timm", "config", "curriculum", "sizes"},
    {"planning", "ops"},
    {"models"},
    {"tracking"},
    {"data"},
    {"engine"},
    {"exchange"},
    {"evaluation"},
    {"recording"},
    {"resuming"},
    {"running"},
    {"rehearsal"},
    {"calibration"},
    {"labelled", "labelled_plan", "supervised"},
    {"examination", "packing"},
    {"pretraining", "finetuning", "dense"},
    {"bench"},
    {"comparison"},
    {"probing", "exporting", "training", "detecting", "segmenting"},
    {"predicting"},
    {"search", "studies", "reproduction"},
    {"report"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(ROOMS) for name in names}


def imported_rooms(tree: ast.AST, package: list[str]) -> set[str]:
    """First components below `mae_et` of everything that a module imports, at its top or later."""
    rooms = set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, node.module or ""]).rstrip(".")
            names = [module] if module != "mae_et" else [f"mae_et.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("mae_et.")}
    return rooms


def test_imports_point_downward(repository):
    modules = sorted((repository / "mae_et").rglob("*.py"))
    assert len(modules) > 30
    for path in modules:
        parts = path.relative_to(repository).with_suffix("").parts
        if parts == ("mae_et", "__init__"):
            continue
        for room in imported_rooms(ast.parse(path.read_text()), list(parts[:-1])):
            assert LEVEL[room] <= LEVEL[parts[1]], f"{path} imports mae_et.{room}, a room above its own"


@pytest.mark.parametrize("module", ["mae_et", "mae_et.curriculum", "mae_et.planning", "mae_et.config"])
def test_planning_needs_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_files_stay_readable(repository):
    """A file of more than 400 lines is more than one room."""
    long = {
        str(path.relative_to(repository)): lines
        for folder in ("mae_et", "tests", "benchmarks")
        for path in (repository / folder).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 400 and "tests/" not in str(path)
    }
    assert not long
