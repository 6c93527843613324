"""The README's own example works as it stands, and the page stays what a newcomer reads; test_docs.py has the rest."""

from __future__ import annotations

import re

import torch
import yaml

import mae_et


def test_the_library_example_runs(repository):
    (code,) = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    plan = names["plan"]
    assert names["step"] == plan.total_steps - 1  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.isfinite(names["loss"])  # pyright: ignore[reportArgumentType]


def test_readme_is_short_and_names_every_page(repository):
    text = (repository / "README.md").read_text()
    assert len(text.splitlines()) <= 180
    for page in (repository / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in text, f"README does not lead to docs/{page.name}"


def test_citation_names_this_version_and_the_papers(repository):
    citation = yaml.safe_load((repository / "CITATION.cff").read_text())
    assert citation["version"] == mae_et.__version__
    assert citation["license"] == "MIT"
    assert (repository / "LICENSE").read_text().startswith("MIT License")
    papers = [reference["url"].rpartition("/")[2] for reference in citation["references"]]
    assert papers == ["2405.08768", "2111.06377", "2112.09133"]
    for reference, number in zip(citation["references"], papers):
        assert reference["identifiers"] == [{"type": "other", "value": f"arXiv:{number}"}]
