"""Whole runs: on real photos, with every way of down-sampling and every target, and what the folder holds after."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from omegaconf import OmegaConf
from PIL import Image

from mae_et.config import ConfigError, FinetuneConfig, PretrainConfig, load_config
from mae_et.curriculum import Plan
from mae_et.engine.bad_images import BadImagesError
from mae_et.engine.checkpoint import CheckpointError, latest_checkpoint
from mae_et.engine.faults import TrainingError
from mae_et.engine.run_folder import RunFolder, RunFolderError
from mae_et.pretraining import pretrain
from mae_et.report import evaluate_run
from mae_et.resuming import FREE_KEYS
from mae_et.running import exit_with
from tests.end_to_end.tiny import arguments, history, run_here

PHOTO_RUN = [
    *("data.size=64", "model.patch_size=8", "model.width=48", "model.heads=3", "epochs=0.5", "optim.batch=16"),
    *("data.images=null", "tracking.pictures=true", "tracking.picture_samples=2"),
]


@pytest.mark.parametrize("method", ["resize", "lanczos", "fourier", "fourier_pixel0", "bilinear", "nearest"])
def test_every_way_of_downsampling_trains_on_photos(shared_data, tmp_path, method):
    run = run_here(shared_data / "clothing" / "test", tmp_path / "run", *PHOTO_RUN, f"data.downsample={method}")
    rows = [row for row in history(run) if "train/loss" in row]
    assert {row["stage/bandwidth"] for row in rows} == {24, 48, 64}
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


@pytest.mark.parametrize("target", ["hog", "pixel", "norm_pixel"])
def test_every_target_trains_on_photos_and_is_drawn(shared_data, tmp_path, target):
    run = run_here(shared_data / "clothing" / "test", tmp_path / "run", *PHOTO_RUN, f"target.kind={target}")
    for size in (24, 48, 64):
        (picture,) = (run / "pictures").glob(f"stage-*-B{size}.png")
        with Image.open(picture) as image:
            assert image.width > 400
            assert np.asarray(image.convert("L")).std() > 10


def test_rectangles_in_grey(photos, tmp_path):
    run = run_here(photos, tmp_path / "run", "data.size=[16,24]", "data.channels=1")
    plan = Plan.from_dict(json.loads((run / "plan.json").read_text()))
    assert [stage.bandwidth for stage in plan.stages] == [(6, 10), (12, 18), (16, 24)]


def test_the_folder_holds_all_of_the_run(photos, tmp_path):
    run = run_here(photos, tmp_path / "run")
    config = load_config(run / "config.yaml")
    assert config == load_config(None, arguments(photos, run))
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "plan.json", "metrics.jsonl", "checkpoints"}
    plan = Plan.from_dict(json.loads((run / "plan.json").read_text()))
    last = history(run)[-1]
    assert last["step"] == plan.total_steps
    assert last["compute/fraction"] == pytest.approx(1.0)
    assert last["compute/flops"] == plan.total_flops
    assert last["images_seen"] == plan.total_images


def test_the_encoder_leaves_as_a_timm_model(photos, tmp_path):
    run = run_here(photos, tmp_path / "run")
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    encoder = {
        name.removeprefix("encoder."): tensor
        for name, tensor in checkpoint.tensors["model"].items()
        if name.startswith("encoder.")
    }
    vit = timm.models.VisionTransformer(img_size=16, patch_size=2, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    vit.load_state_dict(encoder, strict=True)


def test_a_finished_run_is_left_as_it_is(photos, tmp_path):
    run = run_here(photos, tmp_path / "run")
    before = (run / "metrics.jsonl").read_bytes()
    said: list[str] = []
    assert pretrain(load_config(None, arguments(photos, run)), say=said.append) == 0
    assert any("resuming from" in line for line in said)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_another_configuration_is_refused_and_named(photos, tmp_path):
    run = run_here(photos, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"another configuration, by its config\.yaml \(optim.batch: 8 -> 4\)"):
        run_here(photos, run, "optim.batch=4")
    with pytest.raises(ConfigError, match="already holds a run"):
        pretrain(load_config(None, arguments(photos, run)), resume="never", say=lambda _: None)
    run_here(photos, run, "tracking.every=5", "data.workers=1")


def test_a_checkpoint_can_begin_a_run_in_another_folder_only(photos, tmp_path):
    whole = run_here(photos, tmp_path / "whole", "saving.steps=5", "saving.keep=100")
    earlier = str(whole / "checkpoints" / "step-00000010")
    with pytest.raises(ConfigError, match=r"already holds a run, up to .*step-"):
        pretrain(load_config(None, arguments(photos, whole)), resume=earlier, say=lambda _: None)
    other = tmp_path / "other"
    assert pretrain(load_config(None, arguments(photos, other)), resume=earlier, say=lambda _: None) == 0
    assert history(other) == history(whole)[10:]
    wider = load_config(None, arguments(photos, tmp_path / "third", "model.width=32"))
    with pytest.raises(CheckpointError, match=r"step-00000010 does not fit this configuration: .*size mismatch"):
        pretrain(wider, resume=earlier, say=lambda _: None)


def test_free_keys_exist():
    keys: set[str] = set()
    for schema in (PretrainConfig, FinetuneConfig):
        config = OmegaConf.structured(schema)
        keys |= {key for key in FREE_KEYS if OmegaConf.select(config, key.rstrip("."), default="absent") != "absent"}
    assert keys == set(FREE_KEYS)


def test_a_changed_data_set_is_refused(photos, tmp_path):
    run = run_here(photos, tmp_path / "run")
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for path in sorted(photos.iterdir())[:30]:
        (fewer / path.name).write_bytes(path.read_bytes())
    with pytest.raises(
        ConfigError, match=r"made for 45 images .* the plan now is for 30 images .* the data set has changed"
    ):
        run_here(fewer, run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.root=null", "data: kind 'folder' needs the place of the images; set data.root=..."),
        ("data.root=/nowhere", "data: /nowhere is not a folder; set data.root=..."),
        ("data.scale=[0.9,0.2]", "data: crop scale (0.9, 0.2)"),
        ("data.size=15", "15"),
        ("model.width=18", "model.width=18 must be a multiple of 4 and of its 2 heads"),
        ("target.cell=3", "patch_size 2 is not a multiple of cell 3"),
        ("mask_ratio=0", "stage 1 (B=6): no patch is masked, so there is nothing to predict; raise mask_ratio"),
        ("evaluation.every=0.5", "evaluation: "),
    ],
)
def test_what_cannot_run_says_so_before_it_starts(photos, tmp_path, change, message):
    with pytest.raises(ConfigError) as caught:
        run_here(photos, tmp_path / "run", change)
    assert message in str(caught.value)


def test_a_second_run_is_kept_out(photos, tmp_path):
    run = tmp_path / "run"
    with RunFolder(run), pytest.raises(RunFolderError, match="is in use by"):
        run_here(photos, run)


def test_a_bad_image_stops_a_run_that_allows_none(photos, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in photos.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "07.png").write_bytes(b"<html>not found</html>")
    with pytest.raises(BadImagesError, match=r"07\.png: not an image") as here:
        run_here(folder, tmp_path / "run", "data.max_bad=0")
    with pytest.raises(BadImagesError, match=r"07\.png: not an image") as worker:
        run_here(folder, tmp_path / "run", "data.max_bad=0", "data.workers=1")
    for caught in (here, worker):
        assert exit_with(caught.value) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: 1 of 45 images could not be read, more than data.max_bad=0 allows: ")
        assert f"{folder}/07.png: not an image" in error


def test_gradients_that_are_never_finite_stop_the_run(photos, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"not finite for 3 steps in a row \(engine\.max_skipped=3\)"):
        # Pixels divided by a deviation of 1e-30 overflow fp32 squares at once.
        run_here(photos, run, "target.kind=pixel", "data.std=[1e-30,1e-30,1e-30]", "engine.max_skipped=3")
    assert not list((run / "checkpoints").iterdir())


def test_skipped_steps_leave_weights_and_moments_alone(photos, tmp_path):
    from mae_et.engine.state import TrainState
    from mae_et.engine.step import apply_update
    from mae_et.pretraining import Ranks, build_state

    state: TrainState = build_state(load_config(None, arguments(photos, tmp_path)), Ranks(0, 1, torch.device("cpu")))
    parameters = list(state.model.parameters())

    def update(gradient: float) -> None:
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, gradient)
        state.optimizer.param_groups[0]["lr"] = state.optimizer.param_groups[1]["lr"] = 0.1
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        apply_update(state, norm)

    update(1.0)
    before = {name: tensor.clone() for group in state.tensors().values() for name, tensor in group.items()}
    for bad in (float("nan"), float("inf")):
        update(bad)
    after = {name: tensor for group in state.tensors().values() for name, tensor in group.items()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (state.skipped.item(), state.skipped_in_a_row.item()) == (2, 2)
    update(1.0)
    assert not torch.equal(before["encoder.cls_token"], state.model.state_dict()["encoder.cls_token"])
    assert (state.skipped.item(), state.skipped_in_a_row.item()) == (2, 0)


def test_scores_during_and_after_pretraining(shared_data, tmp_path, capsys):
    root = shared_data / "clothing"
    labelled = ["evaluation.every=0.5", "evaluation.train_images=100", "evaluation.test_images=50"]
    run = run_here(root, tmp_path / "run", *PHOTO_RUN, "data.split=test", *labelled)
    scored = [row for row in history(run) if "eval/knn20" in row]
    assert len(scored) == 2
    assert scored[-1]["compute/fraction"] == pytest.approx(1.0)
    assert all(0 <= row["eval/probe"] <= 1 for row in scored)
    scores = evaluate_run(str(run))
    # The same encoder on the same images: the run's own last score, again.
    assert scores["pretrained"]["probe"] == scored[-1]["eval/probe"]
    assert scores["pretrained"]["knn20"] == scored[-1]["eval/knn20"]
    assert json.loads((run / "evaluation.json").read_text())["scores"] == scores
    printed = capsys.readouterr().out
    for text in ("pretrained encoder", "same encoder, untrained", "raw pixels", "relative, planned"):
        assert text in printed
    assert (run / "pictures" / "curves.png").stat().st_size > 5000
