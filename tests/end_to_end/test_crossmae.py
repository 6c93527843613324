"""Runs with CrossMAE's decoder, whole: they resume to the bit, spread over ranks, and leave an encoder as any other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from mae_et.__main__ import main
from mae_et.config import ConfigError, load_config
from mae_et.exchange.weights import open_weights
from mae_et.planning import build_plan, model_cost
from mae_et.pretraining import build_model, pretrain
from tests.end_to_end.labelled import finetune_here, probe_here, write_classes
from tests.end_to_end.tiny import TINY, arguments, history, run_here, weights
from tests.engine.ranks import run_ranks

CROSS = ("model.decoder=crossmae", "model.prediction_ratio=0.25", "model.decoder_depth=2")
# Of a step in the middle, so that gradients of both stages' shapes are behind it.
MIDDLE = 22


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory) -> Path:
    pictures = ("tracking.pictures=true", "tracking.picture_samples=2")
    run = tmp_path_factory.mktemp("crossmae") / "run"
    return run_here(photos, run, *CROSS, *pictures, "engine.precision=fp32", "saving.steps=1", "saving.keep=1000")


def losses(run: Path) -> list[float]:
    return [row["train/loss"] for row in history(run) if "train/loss" in row]


def test_it_learns_and_draws(whole):
    found = losses(whole)
    assert sum(found[-5:]) < 0.9 * sum(found[:5])
    assert list((whole / "pictures").glob("stage-*.png"))


def test_a_run_that_is_continued_ends_in_the_same_bits(photos, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("step-*"))
    step = f"step-{MIDDLE:08}"
    shutil.copytree(whole / "checkpoints" / step, run / "checkpoints" / step)
    kept = ("engine.precision=fp32", "tracking.pictures=true", "tracking.picture_samples=2")
    run_here(photos, run, *CROSS, *kept, "saving.steps=1", "saving.keep=1000")
    assert weights(run) == weights(whole)
    assert losses(run) == losses(whole)


def pretrain_quietly(photos: Path, run: Path, *changes: str) -> None:
    pretrain(load_config(None, arguments(photos, run, *changes)), say=lambda _line: None)


def test_ranks_train_as_one_process(photos, whole, tmp_path):
    run = tmp_path / "run"
    # DDP would stop at a parameter that is left out of a step.
    run_ranks(2, pretrain_quietly, photos, run, *CROSS, "engine.precision=fp32")
    # Another order of fp32 sums, as in test_layouts.py.
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)


def test_the_encoder_leaves_as_any_other(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["export", str(whole), "--to", "timm", "--folder", str(tmp_path / "timm")]) == 0
    exported = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert isinstance(exported, VisionTransformer)
    encoder = build_model(load_config(None, [*TINY, *CROSS])).encoder
    encoder.load_state_dict(open_weights(str(whole)).tensors, strict=True)
    # The final LayerNorm is in the path of every level but the first ones, and has been trained.
    assert float((encoder.get_parameter("norm.weight").detach() - 1).abs().max()) > 1e-3
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(exported.forward_features(images), encoder(images), rtol=0, atol=2e-5)


def test_it_is_scored_and_fine_tuned_as_any_other(whole, tmp_path):
    images = write_classes(tmp_path / "images")
    probe_here(images, tmp_path / "knn", f"checkpoint={whole}", "neighbours.k=[1,5]", knn=True)
    tuned = finetune_here(images, tmp_path / "tuned", f"checkpoint={whole}", "epochs=0.3")
    assert losses(tuned)


def test_a_plan_counts_what_is_predicted():
    def flops(*changes: str) -> float:
        total = build_plan(load_config(None, ["data.images=100000", *changes]), 100_000).total_flops
        assert total is not None
        return total

    cross = ("model.decoder=crossmae", "model.decoder_depth=12")
    assert flops(*cross, "model.prediction_ratio=0.25") < flops(*cross, "model.prediction_ratio=0.75") < flops()
    assert flops(*cross) == flops(*cross, "model.prediction_ratio=0.75")
    assert model_cost(load_config(None, [*cross, "model.prediction_ratio=0.5"])).prediction_ratio == 0.5


def test_a_part_needs_the_decoder_that_can_predict_it():
    with pytest.raises(ConfigError, match=r"model\.prediction_ratio=0\.25 needs model\.decoder=crossmae.*null"):
        build_plan(load_config(None, ["model.prediction_ratio=0.25"]), 100_000)
    for wrong in (0, 1.5):
        with pytest.raises(ConfigError, match="prediction_ratio"):
            load_config(None, ["model.decoder=crossmae", f"model.prediction_ratio={wrong}"])
