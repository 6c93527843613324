"""Damaged checkpoints: what loads is right to the bit whatever happened to the files, and no run begins anew."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from mae_et.engine.checkpoint import Checkpoint, CheckpointError, latest_checkpoint, save_checkpoint
from tests.engine.saves import content, names

STEPS = (10, 20, 30)
Damage = Callable[[Path, random.Random], None]


def trial(folder: Path, seed: int) -> None:
    """Damage the newest checkpoints of a run in one of the ways below, and open it.

    Raises:
        AssertionError: what was loaded is not what was saved, is of another step than the newest whole one, nobody was
            told, or a folder of broken checkpoints was taken for an empty one.
    """
    draw = random.Random(seed)
    damage_and_open(folder, draw.choice(list(DAMAGES.values())), draw.randrange(1, len(STEPS) + 1), draw)


def damage_and_open(folder: Path, damage: Damage, count: int, draw: random.Random) -> None:
    """Damage the `count` newest of three checkpoints and check what `latest_checkpoint` makes of it."""
    folder.mkdir(parents=True, exist_ok=True)
    for step in STEPS:
        save_checkpoint(folder, step, *content(step), keep=len(STEPS))
    for step in STEPS[len(STEPS) - count :]:
        damage(folder / f"step-{step:08d}", draw)
    told: list[str] = []
    whole = STEPS[: len(STEPS) - count]
    what = f"{folder}: {damage.__name__} of {count}"
    try:
        found = latest_checkpoint(folder, told.append)
    except CheckpointError as error:
        assert not whole, f"{what}: a whole checkpoint was not used: {error}"
    else:
        assert found is not None, f"{what}: a run that was saved would begin anew"
        assert whole, f"{what}: step {found.step} was loaded though damaged"
        assert found.step == whole[-1], f"{what}: step {found.step} was loaded"
        assert_same(found, what)
    assert len(told) == count, f"{what}: {len(told)} broken checkpoints were reported: {told}"
    assert len(names(folder)) == len(STEPS), f"{what}: {names(folder)} is left"


def assert_same(found: Checkpoint, what: str) -> None:
    """Whether a checkpoint is what its step saved, to the bit."""
    tensors, state = content(found.step)
    assert found.state == state, what
    assert found.tensors.keys() == tensors.keys(), what
    for group, named in tensors.items():
        assert found.tensors[group].keys() == named.keys(), what
        for name, tensor in named.items():
            pair = [t.reshape(-1).contiguous().view(torch.uint8) for t in (found.tensors[group][name], tensor)]
            assert torch.equal(*pair), f"{what}: {group} {name} differs"


def _any_file(checkpoint: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(checkpoint.iterdir()))


def flip_bit(checkpoint: Path, draw: random.Random) -> None:
    """One bit of one file."""
    file = _any_file(checkpoint, draw)
    raw = bytearray(file.read_bytes())
    bit = draw.randrange(8 * len(raw))
    raw[bit // 8] ^= 1 << bit % 8
    file.write_bytes(raw)


def truncate(checkpoint: Path, draw: random.Random) -> None:
    """One file cut short, maybe to nothing."""
    file = _any_file(checkpoint, draw)
    raw = file.read_bytes()
    file.write_bytes(raw[: draw.randrange(len(raw))])


def zero_block(checkpoint: Path, draw: random.Random) -> None:
    """A stretch of one file in zeros, as after a power cut; its size is right."""
    file = _any_file(checkpoint, draw)
    raw = bytearray(file.read_bytes())
    start = draw.choice([place for place, byte in enumerate(raw) if byte])
    end = min(len(raw), start + draw.choice((1, 64, 4096)))
    raw[start:end] = bytes(end - start)
    file.write_bytes(raw)


def append(checkpoint: Path, draw: random.Random) -> None:
    """One file too long."""
    with _any_file(checkpoint, draw).open("ab") as file:
        file.write(draw.randbytes(draw.randrange(1, 100)))


def remove(checkpoint: Path, draw: random.Random) -> None:
    """One file missing."""
    _any_file(checkpoint, draw).unlink()


def swap_within(checkpoint: Path, draw: random.Random) -> None:
    """Two files under each other's names."""
    one, other = draw.sample(sorted(checkpoint.iterdir()), 2)
    raw = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(raw)


def take_from_another(checkpoint: Path, draw: random.Random) -> None:
    """One file of the save before, or all of them: a checkpoint under another step's name."""
    before = checkpoint.parent / f"step-{STEPS[0]:08d}"
    if before == checkpoint:  # the first one: of a save that is still to come
        before = save_checkpoint(checkpoint.parent.parent / f"{checkpoint.parent.name}-other", 40, *content(40))
    files = sorted(before.iterdir())
    for file in files if draw.random() < 0.3 else [draw.choice(files)]:
        shutil.copy(file, checkpoint / file.name)
    if before.parent != checkpoint.parent:
        shutil.rmtree(before.parent)


def empty(checkpoint: Path, _draw: random.Random) -> None:
    """Nothing but the folder is left."""
    for file in checkpoint.iterdir():
        file.unlink()


def replace_by_file(checkpoint: Path, _draw: random.Random) -> None:
    """A file in the folder's place."""
    shutil.rmtree(checkpoint)
    checkpoint.write_bytes(b"")


DAMAGES: dict[str, Damage] = {
    damage.__name__: damage
    for damage in (flip_bit, truncate, zero_block, append, remove, swap_within, take_from_another, empty)
} | {"replace_by_file": replace_by_file}


def _flip_or_truncate(folder: Path, seed: int) -> None:
    """Bit flips and truncations alone, in turn."""
    draw = random.Random(seed)
    damage_and_open(folder, (flip_bit, truncate)[seed % 2], draw.randrange(1, len(STEPS) + 1), draw)


TRIALS: dict[str, Callable[[Path, int], None]] = {
    "flip_or_truncate_checkpoint": _flip_or_truncate,
    "damage_checkpoint": trial,
}
