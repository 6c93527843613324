"""Runs killed inside a save, and checkpoints damaged on disk: what is left must load, and lead to the same bits."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mae_et.engine import checkpoint
from tests.torture.kills import check_start, complete, newest_step
from tests.torture.runs import (
    PLAIN,
    Started,
    chance_of,
    check_loads,
    check_same,
    complete_checkpoints,
    copy_at,
    replace_everywhere,
    whole_run,
)

# Everything of `os` through which a save touches the disk.
CALLS = ("mkdir", "open", "write", "fsync", "close", "rename", "unlink", "rmdir")
EVERY = 2  # steps between saves
CALLS_OF_A_SAVE = 80  # an upper bound, with pruning; a kill that is due later comes with the next save


def die_inside_save(number: int, call: int, moment: str) -> None:
    """Let this process be killed by SIGKILL in its `number`-th save, at its `call`-th touch of the disk.

    Args:
        number: counted from 0.
        call: of CALLS, counted from 0 and from the start of that save, through later saves.
        moment: before the call, after it, or in the middle of it (half of what it should write).
    """
    saves, left = 0, call
    real_save = checkpoint.save_checkpoint
    armed = False

    def hooked(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def touch(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if not armed:
                return real(*args, **kwargs)
            left -= 1
            if left >= 0:
                return real(*args, **kwargs)
            if moment == "middle" and name == "write":
                real(args[0], args[1][: len(args[1]) // 2])
            elif moment == "after":
                real(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError("outlived SIGKILL")

        return touch

    def save(*args: Any, **kwargs: Any) -> Any:
        nonlocal saves, armed
        armed = saves >= number
        saves += 1
        try:
            return real_save(*args, **kwargs)
        finally:
            armed = False

    for name in CALLS:
        setattr(os, name, hooked(name, getattr(os, name)))
    replace_everywhere(real_save, save)


def kill_in_save(folder: Path, seed: int) -> None:
    """`kill -9` inside a save: before, in or after any of its writes, syncs, renames, deletions"""
    chance, whole, run = chance_of("kill_in_save", seed), whole_run(PLAIN, folder), folder / "run"
    keep = chance.choice((1, 2, 3))
    options = (f"saving.steps={EVERY}", f"saving.keep={keep}")

    def start(before: Callable[[], Any] = lambda: None) -> Started:
        return PLAIN.start(folder, run, *options, before=before)

    for _ in range(2):
        saved = newest_step(run)
        saves_to_come = (whole.steps - saved + EVERY - 1) // EVERY
        number, moment = chance.randrange(saves_to_come), chance.choice(("before", "middle", "after"))
        call = chance.randrange(CALLS_OF_A_SAVE if number + 3 < saves_to_come else 20)
        attempt = start(lambda n=number, c=call, m=moment: die_inside_save(n, c, m))
        code = attempt.wait()
        assert code == -signal.SIGKILL, f"not killed in save {number} at call {call}, but {code}: {attempt.said()}"
        check_start(attempt, saved)
        # The saves before that one are whole, so that one interval is lost at most.
        check_loads(run, saved + EVERY * number)
    complete(PLAIN, folder, run, whole, start, "after two kills inside saves:")


def flip_bit(file: Path, chance: random.Random) -> str:
    content = bytearray(file.read_bytes())
    bit = chance.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    return f"bit {bit} of {file.name} flipped"


def truncate(file: Path, chance: random.Random) -> str:
    size = file.stat().st_size
    kept = chance.choice((0, 1, size - 1, chance.randrange(size)))
    os.truncate(file, kept)
    return f"{file.name} cut to {kept} of {size} bytes"


def remove(file: Path, _chance: random.Random) -> str:
    file.unlink()
    return f"{file.name} missing"


def overwrite(file: Path, chance: random.Random) -> str:
    """Zeros where data were, as some file systems leave them after a power cut."""
    content = bytearray(file.read_bytes())
    first = chance.randrange(len(content))
    length = min(len(content) - first, chance.randrange(1, 4097))
    if not any(content[first : first + length]):
        content[first] = 1  # it was zeros: change it in another way
    else:
        content[first : first + length] = bytes(length)
    file.write_bytes(content)
    return f"{length} bytes of {file.name} from {first} on overwritten"


Damage = Callable[[Path, random.Random], str]


def damaged_newest(folder: Path, seed: int, kind: str, damage: Damage) -> None:
    """Damage the newest of three checkpoints in one file; the run names it, and continues from the one before."""
    chance, whole = chance_of(kind, seed), whole_run(PLAIN, folder)
    step = chance.randint(4, whole.steps)
    run = copy_at(step, whole, folder / "run", keep=3)
    newest = complete_checkpoints(run)[-1]
    done = damage(chance.choice(sorted(newest.iterdir())), chance)
    again = PLAIN.start(folder, run, "saving.steps=null")
    assert again.wait() == 0, f"{done}: {again.said()}"
    assert f"step-{step - 1:08} at step {step - 1}" in again.out, f"{done}: resumed from another: {again.said()}"
    assert f"checkpoint {newest.name} is broken and not used" in again.err, f"{done}: not named: {again.said()}"
    check_same(run, whole, done)


def bit_flip(folder: Path, seed: int) -> None:
    """One bit of the newest checkpoint flipped"""
    damaged_newest(folder, seed, "bit_flip", flip_bit)


def truncation(folder: Path, seed: int) -> None:
    """A file of the newest checkpoint cut off, to nothing or by one byte among others"""
    damaged_newest(folder, seed, "truncation", truncate)


def missing_file(folder: Path, seed: int) -> None:
    """A file of the newest checkpoint gone"""
    damaged_newest(folder, seed, "missing_file", remove)


def zeroed_run(folder: Path, seed: int) -> None:
    """A stretch of the newest checkpoint overwritten with zeros"""
    damaged_newest(folder, seed, "zeroed_run", overwrite)


def all_damaged(folder: Path, seed: int) -> None:
    """Every checkpoint damaged, or all of them gone"""
    chance, whole = chance_of("all_damaged", seed), whole_run(PLAIN, folder)
    step = chance.randint(4, whole.steps - 1)
    run = copy_at(step, whole, folder / "run", keep=3)
    gone = seed % 4 == 3
    for path in complete_checkpoints(run):
        if gone:
            shutil.rmtree(path)
        else:
            chance.choice((flip_bit, truncate, remove, overwrite))(chance.choice(sorted(path.iterdir())), chance)
    if gone:  # the folder's records say that there was one
        shutil.copy(whole.run / "status.json", run)
    before = contents(run)
    again = PLAIN.start(folder, run, f"saving.steps={EVERY}")
    code = again.wait()
    assert code not in (0, -signal.SIGKILL), f"began anew in silence: {again.said()}"
    assert "error: " in again.err, again.said()
    assert "Traceback" not in again.err, again.said()
    assert "starting at step 0" not in again.out, again.said()
    assert contents(run) == before, "the folder was changed by a run that was refused"


def contents(run: Path) -> dict[str, bytes]:
    """What a run has recorded, by path; the lock's text and the status say who was here last."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name not in (".lock", "status.json"))
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def leftovers(folder: Path, seed: int) -> None:
    """Half-written and half-deleted checkpoints of dead processes lie about; foreign files too"""
    chance, whole = chance_of("leftovers", seed), whole_run(PLAIN, folder)
    step = chance.randint(4, whole.steps - 3)
    run = copy_at(step, whole, folder / "run", keep=2)
    here = run / "checkpoints"
    dead = Started(0, folder / "none", folder / "none")
    dead.pid = os.fork()
    if dead.pid == 0:
        os._exit(0)
    dead.wait()
    for name in (f"step-{step + 2:08}.tmp-{dead.pid}", f"step-{step - 2:08}.trash-{dead.pid}"):
        shutil.copytree(here / f"step-{step:08}", here / name)
        chance.choice(sorted((here / name).iterdir())).unlink()
    (here / "notes.txt").write_text("mine")
    (here / "best").mkdir()
    again = PLAIN.start(folder, run, f"saving.steps={EVERY}")
    assert again.wait() == 0, again.said()
    check_same(run, whole)
    left = sorted(path.name for path in here.iterdir() if not path.name.startswith("step-"))
    assert left == ["best", "notes.txt"], f"touched what is not a checkpoint: {left}"
    strange = [path.name for path in here.glob("step-*.*")]
    assert not strange, f"left over: {strange}"


TRIALS: dict[str, Callable[[Path, int], None]] = {
    "kill_in_save": kill_in_save,
    "bit_flip": bit_flip,
    "truncation": truncation,
    "missing_file": missing_file,
    "zeroed_run": zeroed_run,
    "all_damaged": all_damaged,
    "leftovers": leftovers,
}
