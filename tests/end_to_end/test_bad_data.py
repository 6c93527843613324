"""Runs on images from the world: some cannot be read, or there are hardly any."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mae_et.config import load_config
from mae_et.data.decode import ImageError
from mae_et.data.sources import Source, open_source
from mae_et.engine.bad_images import BadImagesError
from mae_et.pretraining import pretrain
from mae_et.tracking import read_metrics
from pretrain import main
from tests.data.trees import write_images
from tests.data.zoo import refused, vanish, write_zoo
from tests.end_to_end.tiny import arguments, history, run_here, weights

SHORT = ("epochs=2", "data.max_bad=0.5", "tracking.every=3")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> tuple[Path, Source]:
    """The folder, and its images as a run lists them before one of them vanishes."""
    folder = tmp_path_factory.mktemp("data") / "zoo"
    write_zoo(folder)
    source = open_source("folder", folder)
    vanish(folder)
    return folder, source


def run_zoo(zoo: tuple[Path, Source], run: Path, *changes: str) -> Path:
    config = load_config(None, arguments(zoo[0], run, *SHORT, *changes))
    assert pretrain(config, say=lambda _: None, source=zoo[1]) == 0
    return run


@pytest.fixture(scope="module")
def whole(zoo, tmp_path_factory) -> Path:
    return run_zoo(zoo, tmp_path_factory.mktemp("runs") / "whole", "saving.steps=1", "saving.keep=1000")


def test_a_run_replaces_counts_and_lists_what_cannot_be_read(zoo, whole, tmp_path):
    folder, source = zoo
    rows = read_metrics(whole / "bad_images.jsonl")
    names = {str(Path(source.describe(row["image"])).relative_to(folder)) for row in rows}
    bad = refused(write_zoo(tmp_path / "zoo")) | {"gone.png"}
    assert names <= bad
    assert len(names) == len(rows) > 0.9 * len(bad)  # every pass leaves out what fills no batch
    assert all(row["path"].endswith((".jpg", ".png")) and row["error"] for row in rows)
    last = history(whole)[-1]
    assert last["data/bad_images"] == len(rows)
    assert last["data/replaced"] >= len(rows)
    assert last["images_seen"] > last["data/replaced"]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_neither_the_run_nor_its_list(zoo, whole, tmp_path, workers):
    run = run_zoo(zoo, tmp_path / "run", f"data.workers={workers}")
    assert (history(run), weights(run)) == (history(whole), weights(whole))
    assert (run / "bad_images.jsonl").read_bytes() == (whole / "bad_images.jsonl").read_bytes()


@pytest.mark.parametrize("step", [1, 4, 6])
def test_interruptions_change_neither_the_run_nor_its_list(zoo, whole, tmp_path, step):
    """As a run leaves its folder that saved `step` and went on: rows of lost steps, and a torn one."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "plan.json", "metrics.jsonl", "bad_images.jsonl"):
        shutil.copy(whole / name, run)
    saved = f"checkpoints/step-{step:08}"
    shutil.copytree(whole / saved, run / saved)
    with (run / "bad_images.jsonl").open("a") as file:
        file.write('{"step": 7')
    run_zoo(zoo, run)
    assert (history(run), weights(run)) == (history(whole), weights(whole))
    assert (run / "bad_images.jsonl").read_bytes() == (whole / "bad_images.jsonl").read_bytes()


def test_too_many_bad_images_end_the_run_and_pictures_do_not(zoo, tmp_path):
    config = load_config(None, arguments(zoo[0], tmp_path / "run", "data.max_bad=0.05", "tracking.pictures=true"))
    with pytest.raises(BadImagesError, match=r"of \d+ images could not be read, more than data.max_bad=0.05 allows"):
        pretrain(config, say=lambda _: None, source=zoo[1])
    assert "bad_images.jsonl lists them all" in (tmp_path / "run" / "status.json").read_text()


def test_pictures_show_the_next_image_that_can_be_read(zoo, tmp_path):
    run = run_zoo(zoo, tmp_path / "run", "tracking.pictures=true", "tracking.picture_samples=64", "epochs=1")
    assert list((run / "pictures").glob("stage-*.png"))


def test_a_folder_that_is_gone_ends_the_run(tmp_path):
    write_images(tmp_path / "photos", *(f"{i}.png" for i in range(20)))
    source = open_source("folder", tmp_path / "photos")
    shutil.rmtree(tmp_path / "photos")
    config = load_config(None, arguments(tmp_path / "photos", tmp_path / "run"))
    with pytest.raises(ImageError, match=r"10 images in a row of .* No such file .*is the disk"):
        pretrain(config, say=lambda _: None, source=source)


# Hardly any images


def test_five_images_are_trained_on_by_batches_of_eight(tmp_path):
    write_images(tmp_path / "photos", *(f"{i}.png" for i in range(5)))
    run_here(tmp_path / "photos", tmp_path / "run")
    assert history(tmp_path / "run")[-1]["images_seen"] >= 3 * 5


def test_one_image_is_trained_on_one_by_one_and_refused_for_larger_batches(tmp_path, capsys):
    write_images(tmp_path / "photos", "only.png")
    run_here(tmp_path / "photos", tmp_path / "run", "optim.batch=1")
    assert history(tmp_path / "run")[-1]["images_seen"] >= 3
    (tmp_path / "empty.yaml").write_text("{}\n")
    line = ["--config", str(tmp_path / "empty.yaml"), *arguments(tmp_path / "photos", tmp_path / "few")]
    assert main(line) == 2
    assert "3 epochs of 1 images are too few for a batch of 8" in capsys.readouterr().err


def test_a_class_without_images_is_refused_by_name(tmp_path, capsys):
    write_images(tmp_path / "photos", *(f"{name}/{i}.png" for name in "ac" for i in range(8)))
    (tmp_path / "photos" / "b").mkdir()
    (tmp_path / "empty.yaml").write_text("{}\n")
    line = ["--config", str(tmp_path / "empty.yaml"), *arguments(tmp_path / "photos", tmp_path / "run")]
    assert main(line) == 2
    assert f"class folder {tmp_path / 'photos' / 'b'} has no images (1 such); fill it" in capsys.readouterr().err
