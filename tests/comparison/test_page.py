"""The page of a comparison: all it needs is in it, and nothing of users does it harm."""

from __future__ import annotations

import base64
import datetime
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_et.comparison.figures import loss_figure, score_figure
from mae_et.comparison.page import write_page
from tests.comparison.compared import STAGES, compare, run

WHEN = datetime.datetime(2026, 1, 2, 3, 4)
EVIL = '<script>alert("1")</script>&\''


class Outline(HTMLParser):
    """Tags, attributes and text of a page; void elements and unclosed ones are told apart."""

    VOID = ("meta", "img", "br", "path", "use")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page(comparison, path: Path, command: str | None = "python -m mae_et compare") -> tuple[str, Outline]:
    write_page(comparison, path, command, WHEN)
    text = path.read_text(encoding="utf-8")
    return text, Outline(text)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[int, Path]:
    """Pictures of noise, which weigh the most, 1000 px wide."""
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for size in (12, 28):
        noise = generator.integers(0, 255, (40, 100, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((1000, 400), Image.Resampling.NEAREST).save(folder / f"{size}.png")
    return {size: folder / f"{size}.png" for size in (12, 28)}


@pytest.fixture(scope="module")
def comparison(pictures):
    return compare(
        run("mae-0", (0.5, 0.6, 0.7, 0.8), "mae", 0, pictures={"stage 1, B=28": pictures[28]}),
        run("mae-1", (0.5, 0.6, 0.71, 0.81), "mae", 1, pictures={"stage 1, B=28": pictures[28]}),
        run(
            *("hog", (0.6, 0.8, 0.85, 0.84)),
            stages=STAGES,
            status="interrupted",
            pictures={"stage 1, B=12": pictures[12], "stage 2, B=28": pictures[28]},
        ),
        target=0.8,
        differences=(("curriculum.preset", ("baseline", "baseline", "efficienttrain_pp")),),
        notes=("hog is interrupted at 50% of its plan.",),
    )


@pytest.fixture(scope="module")
def made(comparison, tmp_path_factory):
    return page(comparison, tmp_path_factory.mktemp("page") / "new" / "page.html")


def test_sections_in_order(made):
    text, outline = made
    assert outline.open == []
    heads = [re.sub(r"<[^>]*>", "", head) for head in re.findall(r"<h2[^>]*>(.*?)</h2>", text)]
    assert heads == [
        "Runs",
        "Accuracy of a logistic probe against cost",
        "Training loss",
        "Learning rate",
        "What differs in the configurations",
        "Reconstructions",
        "How it was made",
    ]


def test_finding_and_notes_come_first(made):
    lead = re.search(r'<div class="lead">(.*?)</div>', made[0])
    assert lead is not None
    assert "hog reached 80.00 % with 0.51 of mae&#x27;s compute" in lead[1]
    assert "hog is interrupted at 50% of its plan." in lead[1]


def test_table_has_groups_and_their_seeds(made):
    rows = re.findall(r'<tr class="(\w+)"><th scope="row">(.*?)</th>(.*?)</tr>', made[0])
    table = [
        (kind, re.sub(r"<[^>]*>", "", name), re.findall(r"<td[^>]*>(.*?)</td>", cells)) for kind, name, cells in rows
    ]
    assert [(kind, name) for kind, name, _ in table] == [
        *(("group", "mae"), ("seed", "mae-0"), ("seed", "mae-1"), ("group", "hog")),
    ]
    group, first, _, hog = (cells for _, _, cells in table)
    assert group[:2] == ["2 seeds", "80.50 ± 0.71 %"]
    assert group[6:] == ["baseline", "complete"]
    assert first[:3] == ["0", "80.00 %", "80.00 %<small>at 4 TFLOPs</small>"]
    assert first[5:] == ["4 TFLOPs", "", "complete"]
    assert hog[1:3] == ["84.00 %", "85.00 %<small>at 3 TFLOPs</small>"]
    assert hog[3:6] == ["10 TFLOPs", "30 min", "2 TFLOPs"]
    assert hog[6].endswith("×<small>no interval</small>")
    assert hog[7] == "interrupted"


def test_nothing_is_loaded(made):
    text, outline = made
    assert not outline.named("script")
    assert not outline.named("link")
    assert "http" not in text.replace("http-equiv", "")
    assert "@import" not in text
    assert all(
        source.startswith("data:image/webp;base64,") for source in (a["src"] or "" for a in outline.named("img"))
    )
    assert set(re.findall(r"url\((.)", text)) <= {"#"}


def test_accessible(made):
    _, outline = made
    assert all(attributes.get("scope") in ("col", "row") for attributes in outline.named("th"))
    assert len(outline.named("img")) == 3
    assert all(attributes["alt"] for attributes in outline.named("img"))
    figures = [attributes for attributes in outline.named("div") if attributes.get("role") == "img"]
    assert len(figures) == 4  # scores, two losses, learning rates
    assert all(attributes["aria-label"] for attributes in figures)
    ids = [attributes["id"] for _, attributes in outline.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))


def test_pictures_stand_side_by_side_by_bandwidth(made, pictures):
    text, outline = made
    rows = re.findall(r"<summary>(.*?)</summary><div class=\"pictures\".*?</div></details>", text, re.DOTALL)
    assert rows == ["B=12", "B=28"]
    assert "no picture of B=12" in text
    data = (outline.named("img")[0]["src"] or "").partition(",")[2]
    with Image.open(io.BytesIO(base64.b64decode(data))) as shown, Image.open(pictures[12]) as drawn:
        assert shown.size == (840, 336)
        error = np.asarray(shown, float) - np.asarray(drawn.resize(shown.size), float)
        assert np.abs(error).mean() < 20  # noise at quality 75; another picture differs by 85


def test_many_pictures_weigh_no_more(tmp_path):
    Image.new("RGB", (1000, 10)).save(tmp_path / "wide.png")
    many = {f"stage {stage}, B={stage}": tmp_path / "wide.png" for stage in range(72)}
    _, outline = page(compare(run("mae", (0.5,), pictures=many, curves={}), target=0.5), tmp_path / "page.html")
    # Four times 18, so half of 840 px: a quarter of the pixels.
    assert [image["width"] for image in outline.named("img")] == ["420"] * 72


def test_same_comparison_same_bytes(comparison, made, tmp_path):
    assert page(comparison, tmp_path / "again.html")[0] == made[0]


def test_text_of_users_does_no_harm(comparison, tmp_path):
    evil = replace(comparison.runs[-1], name=EVIL, group=EVIL, path=Path(EVIL), status=EVIL)
    others = (replace(other, curves={}) for other in comparison.runs[:-1])
    changed = compare(*others, evil, target=0.8, differences=((EVIL, (EVIL, EVIL, EVIL)),), notes=(EVIL,))
    text, outline = page(changed, tmp_path / "page.html", command=EVIL)
    assert outline.open == []
    assert not outline.named("script")
    assert "<script" not in text
    assert EVIL in "".join(outline.text)
    assert any(EVIL in (attributes["alt"] or "") for attributes in outline.named("img"))


def test_dollars_are_no_mathematics():
    """matplotlib would parse $...$, and refuse what is none."""
    odd = run("$\\odd{$", (0.5, 0.8), stages=(replace(STAGES[0], label="$\\odd{$", end=10.0),))
    comparison = compare(run("mae", (0.5, 0.8)), odd, target=0.8)
    for drawn in (score_figure(comparison), loss_figure(comparison, odd.group)):
        assert drawn is not None
        assert drawn.svg.count("$\\odd{$") == 1


def test_runs_without_curves_or_pictures(tmp_path):
    bare = [run(name, (score,), curves={}) for name, score in (("knn", 0.5), ("probe", 0.4))]
    text, _ = page(compare(*bare, target=0.5), tmp_path / "page.html", command=None)
    assert "probe did not reach 50.00 %" in text
    assert ">never<" in text
    for absent in ("Training loss", "Learning rate", "Reconstructions", "<dt>Command"):
        assert absent not in text
    assert "do not differ" in text


def test_how_it_was_made(made):
    text = "".join(made[1].text)
    for fact in (
        "python -m mae_et compare",
        "2026-01-02 03:04",
        "matplotlib",
        "runs/mae-1",
        "Welch",
        "6 floating-point",
    ):
        assert fact in text
