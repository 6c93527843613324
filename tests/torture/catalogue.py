"""Every kind of trial: what is done to a run, what it must do, and how often it is tried."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.torture.runner import Trial

MODULES = (
    *("kills", "saves", "disk", "folders", "workers", "numbers", "images", "configs"),
    *("elastic", "hosts", "hostile", "wandb_groups"),
)


@dataclass(frozen=True)
class Kind:
    """One row of the table.

    Attributes:
        outcome: what happens, in words.
        trials, short: how often it is tried in the long run and in CI. CI leaves to other tests what they do well.
        each: faults that one trial holds, in words; empty for one.
        fault: what is done; empty takes the first line of the trial's docstring.
    """

    outcome: str
    trials: int
    short: int = 1
    each: str = ""
    fault: str = ""


SAME = "the same command continues; weights and metrics equal the uninterrupted run's to the bit"
KILLS, THREE = f"a whole checkpoint is always there; {SAME}", "3 kills"
NAMED = "its hash tells; the run names it, continues from the one before, and ends in the same bits"
WANDB = "people are told once; weights, metrics and exit code are those of a run without W&B"  # CI: tests/tracking
DAMAGED = "refused by name, or the one before is used; never loaded, never a start from zero"
REFUSED = "refused with a line that says why; nothing is changed"

KINDS: dict[str, Kind] = {
    "kill": Kind(KILLS, 40, 0, THREE),  # CI: tests/end_to_end/test_bits.py
    "kill_workers": Kind(KILLS, 20, 1, THREE),
    "kill_accumulation": Kind(KILLS, 10, 1, THREE, "`kill -9` under gradient accumulation"),
    "kill_replay": Kind(KILLS, 10, 1, THREE, "`kill -9` of a run that replays images"),
    "kill_large_batch": Kind(KILLS, 10, 1, THREE, "`kill -9` of a run whose batch size changes with the stage"),
    "kill_infobatch": Kind(KILLS, 10, 1, THREE, "`kill -9` of a run that leaves samples out by their losses"),
    "kill_finetune": Kind(KILLS, 10, 1, THREE, "`kill -9` of fine-tuning with drop path and RandAugment"),
    "kill_clock": Kind(KILLS, 10, 1, THREE),
    "signals": Kind(f"saved at the step it was at; exit code 128 + signal; {SAME}", 20, 1, "4 signals"),
    "two_signals": Kind(f"one that follows within 2 s is the same told twice; {SAME}", 10, 1),
    "kill_in_save": Kind(f"one interval is lost at most; {SAME}", 40, 2, "2 kills"),
    "bit_flip": Kind(NAMED, 130, 2),
    "truncation": Kind(NAMED, 100, 1),
    "missing_file": Kind(NAMED, 20, 1),
    "zeroed_run": Kind(NAMED, 20, 1),
    "all_damaged": Kind("an error that names them; never a silent start from zero", 20, 4),
    "leftovers": Kind("removed; what is not a checkpoint is left alone; the same bits", 10, 1),
    "disk_full_for_a_while": Kind(
        "a warning; what was saved before is intact; saved when there is room; same bits", 10, 2
    ),
    "disk_full_for_good": Kind(f"an error after three saves in a row that failed; with room again, {SAME}", 6, 1),
    "disk_full_for_metrics": Kind(f"an error, never a hole or a torn row; with room again, {SAME}", 6, 1),
    "disk_too_small": Kind("an error; the first checkpoint is intact, and nothing else is left", 4, 1),
    "two_runs": Kind("the second is refused, and told who holds the folder; the first does not notice", 10, 1),
    "dead_holder": Kind("the folder is free at once; the same bits", 10, 1),
    "race_for_a_folder": Kind("one runs, the others are refused; the same bits", 5, 1),
    "unusable_folder": Kind(REFUSED, 4, 4),
    "worker_killed": Kind("an error in a line, exit code 1, no process left", 8, 1),
    "worker_killed_and_resumed": Kind(f"an error in a line, exit code 1; {SAME}", 8, 1),
    "worker_raises": Kind(f"the error, exit code 1; {SAME}", 8, 1),
    "worker_hangs": Kind(f"an error when the time is over, exit code 1; {SAME}", 6, 1),
    "worker_hangs_and_run_killed": Kind(f"the worker ends as well; {SAME}", 4, 1),
    "one_bad_step": Kind("all ranks leave the step out; counted; weights as of a run that left it out", 32, 4),
    "bad_steps_in_a_row": Kind(
        "an error after `engine.max_skipped`; the samples are listed; no bad weights saved", 10, 1
    ),
    "bad_weights": Kind(f"never saved; an error; {SAME}", 10, 1),
    "fuzzed_images": Kind(
        "pixels or an error that names the file, in bounded time and memory; no crash", 40, 3, "25 images"
    ),
    "damaged_data_set": Kind("others in their place, always the same ones; all listed; the same bits", 10, 1),
    "too_many_damaged": Kind("an error that names `data.max_bad`", 4, 1),
    "bad_config": Kind("exit code 2, a line that names the key or the file, nothing written, within 5 s", 61, 12),
    "fuzzed_config": Kind("a configuration, or an error for people", 20, 2, "20 values"),
    "flip_or_truncate_checkpoint": Kind(
        DAMAGED, 100, 2, "", "Bits flipped in the newest checkpoints, or their ends cut off"
    ),
    "damage_checkpoint": Kind(DAMAGED, 100, 2, "", "The newest checkpoints damaged in any of nine ways"),
    # CI leaves these to the tests of their own rooms: each takes many starts by torchrun.
    "world_sizes": Kind("the same images in the same batches; losses within rounding", 8, 0, "4 changes"),
    "two_hosts": Kind("the images and losses of one process", 2, 0),
    "host_cut_off": Kind("the other goes on alone from the last checkpoint, without being asked", 3, 0),
    "host_comes_back": Kind("it joins the run that went on without it", 2, 0),
    "rendezvous_lost": Kind("the other ends with an error; started again, the run completes", 2, 0),
    "wandb_install": Kind(WANDB, 12, 0, "", "W&B missing, empty, or broken on import"),
    "wandb_keys": Kind(WANDB, 6, 0, "", "W&B logged out, or with a key that is bad or refused"),
    "wandb_server": Kind(WANDB, 18, 0, "", "W&B's server unreachable, silent, slow, dying, or talking rubbish"),
    "wandb_helper": Kind(WANDB, 10, 0, "", "W&B's helper process killed or frozen"),
    "wandb_disk": Kind(WANDB, 4, 0, "", "no room, or no right to write, for W&B's files"),
    "wandb_killed": Kind(
        f"the same W&B run continues, no row twice; {SAME}", 3, 0, "", "`kill -9` of a run that logs to W&B"
    ),
    "wandb_calls": Kind(WANDB, 12, 0, "", "a call of W&B's raises, or wants to exit"),
}


def find_trials() -> dict[str, Trial]:
    """All kinds of trials, by name, in the order of the table."""
    found: dict[str, Trial] = {}
    for name in MODULES:
        if (Path(__file__).parent / f"{name}.py").exists():
            found.update(getattr(importlib.import_module(f"tests.torture.{name}"), "TRIALS", {}))
    return found


def kind_of(name: str) -> Kind:
    """Its row; a kind that has none here is tried a few times, and says itself what happens."""
    return KINDS.get(name, Kind("", 3))


def counts(names: Sequence[str], short: bool) -> dict[str, int]:
    """How many trials of each kind."""
    numbers = {name: kind_of(name).short if short else kind_of(name).trials for name in names}
    return {name: number for name, number in numbers.items() if number}


def described(name: str, trial: Any) -> tuple[str, str]:
    """(fault, what happens), from the table or from the trial's docstring."""
    kind = kind_of(name)
    first, _, rest = (inspect.getdoc(trial) or name.replace("_", " ")).partition("\n")
    return kind.fault or first.strip(), kind.outcome or " ".join(rest.split())


def command(name: str, number: int) -> str:
    """What repeats these trials."""
    return f"python -m tests.torture --kinds {name} --trials {name}={number}"


def table(rows: Sequence[Mapping[str, Any]], trials: Mapping[str, Any]) -> str:
    """The table of a log, as Markdown: a line per kind of which it has trials, and a line of sums."""
    lines = ["| fault | what happens | trials | passed | command |", "|---|---|---|---|---|"]
    for name, trial in trials.items():
        held = [row for row in rows if row["kind"] == name and row["outcome"] != "skipped"]
        if not held:
            continue
        fault, outcome = described(name, trial)
        passed = sum(row["outcome"] == "passed" for row in held)
        each = f" × {kind_of(name).each}" if kind_of(name).each else ""
        shown = f"{passed}" if passed == len(held) else f"**{passed}**"
        lines.append(f"| {fault} | {outcome} | {len(held)}{each} | {shown} | `{command(name, len(held))}` |")
    by = {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in ("passed", "FAILED", "skipped")}
    hours = sum(row["seconds"] for row in rows) / 3600
    lines += [
        "",
        f"{len(rows) - by['skipped']:,} trials, {by['passed']:,} passed, {by['FAILED']:,} failed, {by['skipped']:,} "
        f"skipped for what the machine lacks; {hours:.1f} hours of trials.",
    ]
    return "\n".join(lines)
