"""Folders from a stranger: nothing outside of them is written."""

from __future__ import annotations

import os

import pytest

from mae_et.engine.run_folder import RunFolder, RunFolderError, write_text_atomic
from tests.engine.saves import save

WRITTEN = ["metrics.jsonl", "metrics.jsonl.tmp", "run_id.txt", "status.json", "bad_images.jsonl", ".lock"]


@pytest.mark.parametrize("name", [*WRITTEN, "pictures/reconstruction.png", "studies/spectrum.csv"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_run_writes_through_no_link(tmp_path, name, exists):
    victim, link = tmp_path / "victim", tmp_path / "run" / name
    if exists:
        victim.write_text("precious")
    link.parent.mkdir(parents=True)
    link.symlink_to(victim)
    with pytest.raises(RunFolderError, match=f"{link} is a link to a file"):
        RunFolder(tmp_path / "run").acquire()
    assert victim.exists() == exists
    assert not exists or victim.read_text() == "precious"


def test_a_lock_that_becomes_a_link(tmp_path):
    folder = RunFolder(tmp_path / "run")
    (tmp_path / "victim").write_text("precious")
    folder.lock_path.symlink_to(tmp_path / "victim")
    with pytest.raises(RunFolderError, match=r"\.lock"):
        folder.acquire()
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_pipe_in_a_run_folder(tmp_path):
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "metrics.jsonl")
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl is a pipe or a device"):
        RunFolder(tmp_path / "run")


def test_folders_may_be_links_to_another_disk(tmp_path):
    for name in ("checkpoints", "pictures"):
        (tmp_path / "big" / name).mkdir(parents=True)
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).symlink_to(tmp_path / "big" / name)
    (tmp_path / "run" / "wandb").mkdir()
    (tmp_path / "run" / "wandb" / "debug.log").symlink_to(tmp_path / "log")  # as W&B makes it
    with RunFolder(tmp_path / "run") as folder:
        save(folder.checkpoints, 1)
        assert (tmp_path / "big" / "checkpoints" / "step-00000001" / "manifest.json").exists()


def test_a_folder_that_is_only_read_is_not_touched(tmp_path):
    folder = RunFolder(tmp_path / "absent", writes=False)
    assert folder.checkpoints == tmp_path / "absent" / "checkpoints"
    assert not (tmp_path / "absent").exists()


def test_texts_take_the_place_of_links(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "config.yaml").symlink_to(tmp_path / "victim")
    write_text_atomic(tmp_path / "config.yaml", "ours")
    assert not (tmp_path / "config.yaml").is_symlink()
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_save_empties_no_linked_folder(tmp_path):
    """Links under the names of leftovers and of old checkpoints."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").touch()
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("step-00000001", f"step-00000002.trash-{os.getpid()}", f"step-00000003.tmp-{os.getpid()}"):
        (folder / name).symlink_to(victim)
    for step in (3, 4, 5):
        save(folder, step, keep=1)
    assert [path.name for path in folder.iterdir()] == ["step-00000005"]
    assert (victim / "precious").exists()
