"""What tests read in the pages for people: code blocks, commands, code within lines, and links, each with its place."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
RUNS_HERE = "<!-- runs here -->"
# First words of a line that is a command; whatever else a block of code holds is no command.
STARTERS = ("python", "python3", "torchrun", "sbatch", "launch/ssh.sh", "make", "pip", "export", "wandb")
_ENVIRONMENT = re.compile(r"[A-Z_]+=\S*")


class Place(NamedTuple):
    """A line of a page."""

    page: Path
    line: int

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


class Block(NamedTuple):
    """A block of code, fenced or indented: where its first line is, its language, and the comment before it."""

    place: Place
    language: str
    lines: list[str]
    marker: str


class Command(NamedTuple):
    """A command in words, without what is set in its environment, and the lines below it, to the next command."""

    place: Place
    words: list[str]
    below: list[str]


def blocks(page: Path) -> list[Block]:
    """The blocks of code of a page."""
    found: list[Block] = []
    marker, inside, fence = "", None, ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if fence:
            if line.strip() == fence:
                fence, inside = "", None
            else:
                found[-1].lines.append(line)
            continue
        opened = re.match(r"\s*(```+)(\w*)", line)
        if opened:
            fence = opened[1]
            found.append(Block(Place(page, number + 1), opened[2], [], marker))
        elif re.match(r" {4,}\S", line):
            if inside is None:
                inside = Block(Place(page, number), "", [], marker)
                found.append(inside)
            inside.lines.append(line)
        elif not line.strip():
            if inside is not None:
                inside.lines.append("")
            continue  # between a marker and its block
        else:
            inside = None
        marker = line.strip() if line.strip().startswith("<!--") else ""
    return found


def prose(page: Path) -> str:
    """A page without its blocks of code and comments, line by line where it was."""
    lines = page.read_text().splitlines()
    for block in blocks(page):
        first = block.place.line - 1
        lines[first : first + len(block.lines)] = [""] * len(block.lines)
    text = "\n".join("" if re.match(r"\s*```", line) else line for line in lines)
    return re.sub(r"<!--.*?-->", lambda comment: "\n" * comment[0].count("\n"), text, flags=re.DOTALL)


def spans(page: Path) -> list[tuple[Place, str]]:
    """Code within lines."""
    text = prose(page)
    found = []
    for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", text):
        place = Place(page, text.count("\n", 0, match.start()) + 1)
        found.append((place, " ".join(match[1].split())))
    return found


def commands_of(block: Block) -> list[Command]:
    """The commands of a block; a line that ends in a backslash goes on in the next."""
    found: list[Command] = []
    joined, first = "", 0
    for number, line in enumerate(block.lines, block.place.line):
        first = first if joined else number
        joined += line.strip()
        if joined.endswith("\\"):
            joined = joined[:-1].rstrip() + " "
            continue
        parts = [words for part in joined.split(" && ") if (words := words_of(part))]
        found += [Command(Place(block.place.page, first), words, []) for words in parts]
        if not parts and found and joined and not joined.startswith("#"):
            found[-1].below.append(joined)
        joined = ""
    return found


def words_of(text: str) -> list[str]:
    """The words of a command, without its environment and its comment; none where the text is no command."""
    start = text.split(maxsplit=1)[0] if text else ""
    if start not in STARTERS and not _ENVIRONMENT.fullmatch(start):
        return []
    words = shlex.split(text, comments=True)
    while words and _ENVIRONMENT.fullmatch(words[0]):
        words = words[1:]
    return words if words and words[0] in STARTERS else []


def commands(page: Path) -> list[Command]:
    """Every command of a page, in blocks and within lines."""
    found = [command for block in blocks(page) if not block.language for command in commands_of(block)]
    for place, text in spans(page):
        for part in text.split(" && "):
            words = words_of(part)
            if len(words) > 1:
                found.append(Command(place, words, []))
    return found


def links(page: Path) -> list[tuple[Place, str]]:
    """Targets of links and pictures that lie within the repository."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    found = []
    for match in re.finditer(r"\]\(([^)\s]+)\)|<img[^>]*\ssrc=\"([^\"]+)\"", text):
        target = match[1] or match[2]
        if not re.match(r"[a-z]+:", target):
            found.append((Place(page, text.count("\n", 0, match.start()) + 1), target))
    return found


def anchors(page: Path) -> set[str]:
    """The names by which a page's headings can be linked to, as GitHub makes them."""
    names: set[str] = set()
    for line in prose(page).splitlines():
        heading = re.match(r"#{1,6} (.+)", line)
        if heading:
            text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading[1]).strip().lower()
            name = plain = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            again = 0
            while name in names:
                again += 1
                name = f"{plain}-{again}"
            names.add(name)
    return names
