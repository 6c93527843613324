"""The file that says what became of a run."""

from __future__ import annotations

import json

import pytest

from mae_et.engine.run_folder import RunFolderError
from mae_et.engine.status import StatusFile, saved_before


def test_it_follows_the_run(tmp_path):
    path = tmp_path / "status.json"
    assert saved_before(path) is None
    status = StatusFile(path, None, writes=True)
    status.update()
    assert json.loads(path.read_text()) == {
        "state": "running", "saved_step": None, "reason": None, "requeued": False
    }  # fmt: skip
    assert saved_before(path) is None
    status.update(saved_step=40)
    status.update(state="interrupted", reason="SIGTERM")
    assert json.loads(path.read_text())["state"] == "interrupted"
    assert saved_before(path) == 40


def test_other_ranks_write_nothing(tmp_path):
    StatusFile(tmp_path / "status.json", None, writes=False).update(saved_step=3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"saved_step": "4"}', '{"saved_step": -1}', '{"saved_step": true}', "[" * 100_000]
)
def test_a_damaged_file_is_no_reason_to_begin_anew(tmp_path, text):
    path = tmp_path / "status.json"
    path.write_text(text)
    with pytest.raises(RunFolderError, match=r"status\.json is damaged"):
        saved_before(path)


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    StatusFile(tmp_path / "gone" / "status.json", None, writes=True).update(saved_step=3)
    assert "status.json could not be written" in capsys.readouterr().err
