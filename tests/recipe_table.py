"""The tables of docs/recipes.md, from the headers of configs/**: `python -m tests.recipe_table` writes them anew."""

from __future__ import annotations

import re
from pathlib import Path

from tests.recipes import REPOSITORY, claim, header, recipes

PAGE = REPOSITORY / "docs" / "recipes.md"
KINDS = {
    "pretrain": "Pretraining",
    "supervised": "Training on labels, from scratch",
    "finetune": "Fine-tuning",
    "probe": "Probes",
    "detect": "Boxes and masks of objects",
    "segment": "Classes of pixels",
    "search": "Searches for a schedule",
}
BEGIN, END = "<!-- recipes: made by python -m tests.recipe_table -->", "<!-- end of recipes -->"


def purpose(path: Path) -> str:
    """The first sentence of a header, to its colon where enough is said by then."""
    sentence = re.split(r"\.(?: |$)", " ".join(header(path)), maxsplit=1)[0]
    beginning = sentence.partition(": ")[0]
    return re.sub(r" \(arXiv[^)]*\)$", "", beginning if len(beginning) > 30 else sentence)


def said(path: Path, label: str) -> str:
    """What a header says of itself under a label; a dash where it says nothing."""
    found = re.search(rf"^# {label}: ", path.read_text(), re.MULTILINE)
    return claim(path, label).replace("|", r"\|") if found else "-"


def row(path: Path) -> str:
    """One recipe: what it is, what it costs, what others published of it, and what came of it here."""
    link = f"[{path.stem}](../{path.relative_to(REPOSITORY)})"
    estimate = re.match(r"[\d.]+ (?:GPU hours|minutes)", said(path, "estimate"))
    hours = "-" if estimate is None else estimate[0].removesuffix(" GPU hours")
    cost = said(path, "cost").replace(" equivalent epochs", "")
    published = said(path, "published").replace("no published result", "none", 1)
    return f"| {link} | {purpose(path)} | {cost} | {hours} | {published} | {said(path, 'here')} |"


def tables() -> str:
    """All tables, one a kind of run."""
    parts = []
    for kind, title in KINDS.items():
        parts.append(f"### {title}\n")
        parts.append(
            "| recipe | what it is | epochs, FLOPs | H100 hours | published | here |\n|---|---|---|---|---|---|"
        )
        parts.append("\n".join(row(path) for path in recipes(kind)) + "\n")
    return "\n".join(parts)


def with_tables(text: str) -> str:
    """The page with its tables made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
