"""Checkpoints damaged by hand and at random; `make torture` tries more."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from mae_et.engine.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint
from tests.engine.saves import save
from tests.engine.test_checkpoint import rewrite_manifest
from tests.torture.hostile import DAMAGES, damage_and_open, trial


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": -1}, "its step is -1"),
        ({"step": "1"}, "its step is '1'"),
        ({"step": True}, "its step is True"),
        ({"step": 2}, "is of step"),
        ({"files": []}, "lists no files"),
        ({"files": {}}, r"does not list state\.json"),
        ({"files": {"state.json": 3}}, "does not give the size"),
        ({"files": {"state.json": {"bytes": -1, "sha256": ""}}}, "does not give the size"),
    ],
)
def test_a_manifest_that_fits_itself_and_nothing_else(tmp_path, changes, message):
    path = save(tmp_path, 1)
    rewrite_manifest(path, **changes)
    with pytest.raises(CheckpointError, match=rf"(manifest|state)\.json: {message}"):
        load_checkpoint(path)


@pytest.mark.parametrize("text", ["[]", "3", "null", '{"step": 2}', '{"step": "1"}', '{"step": true}', '{"x": NaN}'])
def test_a_state_that_fits_its_hash_and_nothing_else(tmp_path, text):
    path = save(tmp_path, 1)
    (path / "state.json").write_text(text)
    rewrite_manifest(path)
    with pytest.raises(CheckpointError, match=r"state\.json: "):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="none of the 1"):
        latest_checkpoint(tmp_path, lambda _line: None)


def test_a_checkpoint_under_another_steps_name(tmp_path):
    save(tmp_path, 10)
    (tmp_path / "step-00000010").rename(tmp_path / "step-00000099")
    with pytest.raises(CheckpointError, match="is of step 10, not of the step that the folder is named by"):
        load_checkpoint(tmp_path / "step-00000099")
    (tmp_path / "step-00000099").rename(tmp_path / "a copy")
    assert load_checkpoint(tmp_path / "a copy").step == 10


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("count", [1, 3])
def test_damaged_checkpoints_are_never_loaded(tmp_path, damage: Callable, count):
    damage_and_open(tmp_path / "checkpoints", damage, count, random.Random(count))


@pytest.mark.parametrize("seed", range(8))
def test_trials_of_damage(tmp_path, seed):
    trial(tmp_path / "checkpoints", seed)


def test_a_trial_notices_what_loads_though_it_is_damaged(tmp_path):
    def no_damage(_checkpoint: Path, _draw: random.Random) -> None:
        pass

    with pytest.raises(AssertionError, match="was loaded"):
        damage_and_open(tmp_path, no_damage, 1, random.Random(0))
