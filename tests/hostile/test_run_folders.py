"""Real run folders that a stranger has changed, and every command on them: refused by name, or gone on with rightly."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mae_et.config import ConfigError, load_config
from mae_et.engine.run_folder import RunFolderError
from mae_et.pretraining import pretrain
from tests.end_to_end.tiny import history, run_here, weights
from tests.hostile.strangers import COMMANDS, DAMAGES, of_masked, write_world

SCORED = [("masked", "evaluate"), ("masked", "spectrum"), ("tuned", "similarity")]
OPENED = [("masked", "knn"), ("masked", "export"), ("masked", "finetune from it"), ("tuned", "export")]
RESUMED = [("masked", "pretrain"), ("tuned", "finetune")]
FEW = ("cut", "deep", "huge", "lists", "link")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    for kind, command in RESUMED:  # what a whole run comes to
        shutil.copytree(folder / kind, folder / "whole" / kind)
        assert COMMANDS[command](folder, folder / "whole" / kind, folder / "none") == 0
    return folder


@pytest.fixture
def at(world, tmp_path) -> Path:
    """Copies of the runs, and a file of the reader's own outside of them."""
    for kind in ("masked", "tuned"):
        shutil.copytree(world / kind, tmp_path / kind)
    (tmp_path / "victim").write_text("precious")
    return tmp_path


def outside(at: Path, run: Path) -> dict[Path, bytes | str]:
    """Everything there but the run and what a command was told to write."""
    files = (path for path in at.rglob("*") if not {run, at / "out"} & {path, *path.parents})
    return {path: path.read_bytes() if path.is_file() else "folder" for path in files}


def damage(file: Path, how: str) -> None:
    if how == "link":
        (file.parent.parent / "victim").write_bytes(file.read_bytes())
        file.unlink()
        file.symlink_to(file.parent.parent / "victim")
        return
    raw = file.read_bytes()
    changed = DAMAGES[how](raw)
    assert changed != raw, f"{how} does nothing to {file.name}"
    file.write_bytes(changed)


def attempt(world: Path, at: Path, kind: str, command: str, capsys) -> tuple[int, str]:
    """Exit code of a command, and its last words; nothing outside the run may have changed."""
    run = at / kind
    before = outside(at, run)
    capsys.readouterr()
    code = COMMANDS[command](world, run, at / "out")
    lines = capsys.readouterr().err.strip().splitlines()
    assert outside(at, run) == before
    assert not any("Traceback" in line for line in lines)
    assert sum(line.startswith("error: ") for line in lines) == (code != 0)
    return code, lines[-1] if lines else ""


def refuses(world: Path, at: Path, kind: str, command: str, file: str, how: str, capsys) -> None:
    damage(at / kind / file, how)
    code, said = attempt(world, at, kind, command, capsys)
    assert code in (1, 2)
    assert said.startswith("error: ")
    assert file in said


@pytest.mark.parametrize("how", [*DAMAGES, "link"])
@pytest.mark.parametrize(
    ("kind", "command", "file"),
    [
        ("masked", "similarity", "plan.json"),
        ("tuned", "export", "backbone.json"),
    ],
)
def test_records_are_refused_by_name(world, at, capsys, kind, command, file, how):
    refuses(world, at, kind, command, file, how, capsys)


@pytest.mark.parametrize("how", [*FEW, "texts", "infinite", "negative"])
def test_calibrations_are_refused_by_name(world, at, capsys, how):
    refuses(world, at, "masked", "pretrain", "calibration.json", how, capsys)


@pytest.mark.parametrize("how", ["empty", "cut", "bytes", "null", "list", "nothing", "deep", "link"])
def test_names_of_classes_are_refused_by_name(world, at, capsys, how):
    refuses(world, at, "tuned", "export", "classes.json", how, capsys)
    code, said = attempt(world, at, "tuned", "spectrum", capsys)
    assert (code, "classes.json" in said) == (2, True)


@pytest.mark.parametrize("how", [name for name in [*DAMAGES, "link"] if name != "cut"])
@pytest.mark.parametrize(("kind", "command"), [*SCORED, *OPENED[1:2]])
def test_configurations_are_refused_by_name(world, at, capsys, kind, command, how):
    """But for one that is cut between two keys, which may well be a whole one."""
    refuses(world, at, kind, command, "config.yaml", how, capsys)


@pytest.mark.parametrize(
    ("file", "how"),
    [
        *(("config.yaml", how) for how in ("cut", "huge")),
        *(("plan.json", how) for how in ("cut", "link")),
        *(("metrics.jsonl", how) for how in ("cut", "deep", "huge")),
    ],
)
@pytest.mark.parametrize(("kind", "command"), RESUMED)
def test_runs_do_not_go_on_from_damaged_records(world, at, capsys, kind, command, file, how):
    if file == "metrics.jsonl" and how in ("cut", "huge"):
        damage(at / kind / file, how)  # rows are missing, or are of steps that were lost
        assert attempt(world, at, kind, command, capsys)[0] == 0
        assert weights(at / kind) == weights(world / "whole" / kind)
        return
    refuses(world, at, kind, command, file, how, capsys)


@pytest.mark.parametrize("how", [*FEW, "null"])
@pytest.mark.parametrize("file", ["backbone.json", "lineage.json"])
def test_runs_do_not_go_on_from_a_damaged_beginning(world, at, capsys, file, how):
    refuses(world, at, "tuned", "finetune", file, how, capsys)


@pytest.mark.parametrize("how", ["bytes", "list", "nothing", "deep", "texts", "huge", "infinite", "lists"])
def test_metrics_are_not_drawn_by_chance(world, at, capsys, how):
    refuses(world, at, "masked", "evaluate", "metrics.jsonl", how, capsys)


@pytest.mark.parametrize("how", ["empty", "bytes", "deep", "link"])
@pytest.mark.parametrize(("kind", "command"), OPENED)
def test_ids_of_runs_are_not_passed_on(world, at, capsys, kind, command, how):
    refuses(world, at, kind, command, "run_id.txt", how, capsys)


@pytest.mark.parametrize(
    ("kind", "command", "file", "how"),
    [
        *(("masked", "pretrain", "status.json", how) for how in ("cut", "deep")),
        *(("masked", "pretrain", "run_id.txt", how) for how in ("bytes", "huge")),
        ("tuned", "finetune", "status.json", "list"),
        ("tuned", "finetune", "run_id.txt", "deep"),
    ],
)
def test_runs_go_on_without_what_they_do_not_need(world, at, capsys, kind, command, file, how):
    if (file, how) == ("run_id.txt", "huge"):
        (at / kind / file).write_text("7" * 100_000)
    else:
        damage(at / kind / file, how)
    assert attempt(world, at, kind, command, capsys)[0] == 0
    assert weights(at / kind) == weights(world / "whole" / kind)
    assert history(at / kind) == history(world / "whole" / kind)


@pytest.mark.parametrize("how", ["bytes", "null", "list", "nothing", "deep", "texts", "lists"])
def test_a_run_without_checkpoints_believes_no_damaged_status(world, at, capsys, how):
    shutil.rmtree(at / "masked" / "checkpoints")
    refuses(world, at, "masked", "pretrain", "status.json", how, capsys)


@pytest.mark.parametrize("how", ["bytes", "list", "deep"])
def test_a_run_that_was_lost_before_its_first_checkpoint_names_damaged_metrics(world, at, capsys, how):
    shutil.rmtree(at / "masked" / "checkpoints")
    (at / "masked" / "status.json").unlink()
    refuses(world, at, "masked", "pretrain", "metrics.jsonl", how, capsys)


# Folders of others.


@pytest.mark.parametrize("text", ["theme: dark\n", "", "[1]\n", "a: [", "run: 1\nseed: 2\n", "\x00"])
def test_a_folder_with_the_configuration_of_another_program_is_refused(world, tmp_path, text):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml is there already, and no run wrote it"):
        run_here(world / "images", run)
    assert (run / "config.yaml").read_text() == text
    assert not list(run.glob("*.json*"))


def test_a_link_to_another_programs_configuration_is_left_alone(world, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "config.yaml").write_text("theme: dark\n")
    (run / "config.yaml").symlink_to(tmp_path / "config.yaml")
    with pytest.raises(RunFolderError, match=r"config\.yaml is a link to a file"):
        run_here(world / "images", run)
    assert (tmp_path / "config.yaml").read_text() == "theme: dark\n"


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(world, tmp_path):
    run = tmp_path / "masked"
    shutil.copytree(world / "masked", run)
    shutil.rmtree(run / "checkpoints")
    (run / "status.json").write_text('{"state": "running", "saved_step": null, "reason": null, "requeued": false}\n')
    said: list[str] = []
    assert pretrain(load_config(None, of_masked(world, run)), say=said.append) == 0
    assert any("an earlier start got to step 4, and ended before its first checkpoint" in line for line in said)
    assert weights(run) == weights(world / "whole" / "masked")
