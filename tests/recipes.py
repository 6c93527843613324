"""What tests read in recipes: the comment at the top of a file of `configs/`, its commands and its claims."""

from __future__ import annotations

import io
import re
import shlex
from contextlib import redirect_stdout
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import pytest

from mae_et.__main__ import main
from mae_et.curriculum import Plan, table

REPOSITORY = Path(__file__).resolve().parents[1]
# An NVIDIA H100's dense bf16 rate, as its data sheet gives it.
H100_FLOPS = 989e12


class Command(NamedTuple):
    """A command of a header: how many processes it starts, the file it names and the keys it changes."""

    words: list[str]
    ranks: int
    config: str
    overrides: list[str]


def recipes(kind: str) -> list[Path]:
    """The files of `configs/<kind>/`."""
    return sorted((REPOSITORY / "configs" / kind).glob("*.yaml"))


def header(path: Path) -> list[str]:
    """The lines of the comment at the top of a file, those that end in a backslash joined with their next."""
    comment = [line[1:].strip() for line in takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())]
    return "\n".join(comment).replace("\\\n", "").split("\n")


def commands(path: Path, program: str) -> list[Command]:
    """The commands of a header that run `program`: lines of the form `label: python ...` or `label: torchrun ...`."""
    found = []
    for line in header(path):
        match = re.fullmatch(r"[^:]+: ((?:python|torchrun) .+)", line)
        if match is None or program not in match[1]:
            continue
        words = shlex.split(match[1])
        launched = {key: int(count) for key, count in re.findall(r"--(nnodes|nproc_per_node)=(\d+)", match[1])}
        overrides = words[words.index("--config") + 2 :]
        ranks = launched.get("nnodes", 1) * launched.get("nproc_per_node", 1)
        found.append(Command(words, ranks, words[words.index("--config") + 1], overrides))
    return found


def written(path: Path, pattern: str) -> re.Match[str]:
    """The one line of the header that has this form."""
    matches = [match for line in header(path) if (match := re.fullmatch(pattern, line))]
    assert len(matches) == 1, f"{path.name} has {len(matches)} lines of the form {pattern!r} in its header"
    return matches[0]


def claim(path: Path, label: str) -> str:
    """What follows a label of a header, with the indented lines below."""
    (found,) = re.findall(rf"^# {label}: (.+(?:\n#     .+)*)", path.read_text(), re.MULTILINE)
    return found.replace("\n#    ", "")


def keys_of_the_prose(path: Path) -> list[str]:
    """`a.b=value` within sentences of a header, which no command holds."""
    prose = [line for line in header(path) if not re.match(r"[^:]+: (python|torchrun) ", line)]
    return re.findall(r"(?<![\w./-])([a-z_]+(?:\.[a-z_]+)*=[\w\[\],.]*[\w\]])", " ".join(prose))


class Printed(NamedTuple):
    """What the plan command of a header made: its text, and the plan that it is of."""

    text: str
    plan: Plan


@cache
def printed(path: Path) -> Printed:
    """Run the header's plan command, from the repository's root."""
    (command,) = commands(path, "mae_et plan")
    assert command.words[:4] == ["python", "-m", "mae_et", "plan"]
    assert REPOSITORY / command.config == path
    plans: list[Plan] = []

    def kept(plan: Plan) -> str:
        plans.append(plan)
        return original(plan)

    original, output = table.plan_table, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output):
        patch.chdir(REPOSITORY)
        patch.setattr(table, "plan_table", kept)
        assert main(command.words[3:]) == 0
    return Printed(output.getvalue(), plans[0])


def check_cost(path: Path, printed: str) -> None:
    """The header's cost is what `python -m mae_et plan` prints."""
    cost = written(path, r"cost: ([\d.]+) equivalent epochs, ([\d.]+ [TPE])FLOPs")
    assert f"cost: {cost[1]} equivalent epochs at B=" in printed
    assert f", {cost[2]}FLOPs in all" in printed


def check_estimate(path: Path, flops: float | None) -> None:
    """GPU hours follow from their assumption; what was run here gives what it took instead, in its `here` line."""
    if written(path, r"here: (.+)")[1] != "not run here":
        assert re.search(r"\d+(\.\d+)? (seconds|minutes|hours)", written(path, r"here: (.+)")[1])
        return
    estimate = written(
        path, r"estimate: ([\d.]+) GPU hours on H100 at (\d+) % of 989 TFLOP/s dense bf16 \(estimate, not measured\)"
    )
    assert flops is not None
    hours = flops / (int(estimate[2]) / 100 * H100_FLOPS) / 3600
    decimals = len(estimate[1].partition(".")[2])
    assert estimate[1] == f"{hours:.{decimals}f}"
    assert decimals >= 1
