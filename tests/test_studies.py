"""Studies of tiny runs: their numbers against the same asked for by hand, and what they write."""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae_et.config import ConfigError, load_config
from mae_et.data.transforms import EvalTransform
from mae_et.engine.checkpoint import load_checkpoint
from mae_et.engine.precision import Precision
from mae_et.evaluation.scores import LabelledSets, embed_with, score
from mae_et.evaluation.similarity import linear_cka
from mae_et.evaluation.spectrum import Filter, default_radii, filtered
from mae_et.ops.filters import high_pass, low_pass
from mae_et.pretraining import build_model, build_source
from mae_et.studies import add_commands
from mae_et.studies.runs import open_encoder, open_runs
from mae_et.studies.similarity import similarity
from mae_et.studies.spectrum import spectrum
from mae_et.tracking import read_metrics
from mae_et.tracking.studies import SimilarityMap, SpectrumPoint, similarity_picture, spectrum_by_compute_picture
from tests.end_to_end.labelled import TINY_CONVNET, TINY_VIT, finetune_here, probe_here, write_classes
from tests.end_to_end.tiny import run_here

MANY = ("saving.keep=20", "saving.steps=2")
FP32 = ["engine.precision=fp32"]
QUIET = {"say": lambda _line: None}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_classes(tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="module")
def pretrained(images, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "masked"
    changes = (f"evaluation.root={images}", "evaluation.knn=[3]", "evaluation.crop_fraction=1", "epochs=1.5")
    return run_here(images, run, *changes, *MANY)


@pytest.fixture(scope="module")
def tuned(images, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "labelled"
    return finetune_here(images, run, *TINY_VIT, *MANY, "saving.steps=6", "optim.ema=0.5", "model.pooling=cls")


@pytest.fixture(scope="module")
def convnet(images, tmp_path_factory) -> Path:
    return finetune_here(images, tmp_path_factory.mktemp("runs") / "convnet", *TINY_CONVNET, "epochs=1")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def width(picture: Path) -> int:
    with Image.open(picture) as opened:
        return opened.width


def test_default_radii_go_from_2_to_half_the_shorter_side():
    assert default_radii((224, 224)) == [2, 4, 6, 11, 20, 35, 63, 112]
    assert default_radii((28, 40))[::6] == [2, 14]
    assert default_radii((4, 4)) == [2]


def test_filtered_images_keep_the_networks_zero():
    pixels = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8)
    mean = torch.tensor([0.2, 0.5, 0.7]).view(3, 1, 1)
    assert filtered(pixels, Filter("none", None), mean) is pixels
    assert torch.equal(filtered(pixels, Filter("low", 3), mean), low_pass(pixels, 3))
    high = filtered(pixels, Filter("high", 3), mean)
    torch.testing.assert_close(high - mean, high_pass(pixels, 3), atol=1e-6, rtol=0)
    # float32 sums of 144 values below 1.
    torch.testing.assert_close(high.mean(dim=(2, 3)), mean.view(1, 3).expand(2, 3), atol=1e-5, rtol=0)


def test_without_a_filter_an_encoder_scores_what_evaluation_says(pretrained, tmp_path):
    points = spectrum([pretrained], [2, 8], folder=tmp_path, overrides=FP32, **QUIET)
    config = load_config(pretrained / "config.yaml")
    model = build_model(config).eval()
    newest = max((pretrained / "checkpoints").iterdir())
    model.load_state_dict(load_checkpoint(newest).tensors["model"])
    sets = LabelledSets(*(build_source(config, split, evaluation=True) for split in ("train", "test")))
    expected = score(partial(embed_with, model, Precision("fp32", "cpu"), "mean"), sets, config.evaluation, (16, 16))
    assert {p.score: p.value for p in points if p.filter == "none"} == expected
    assert {(p.filter, p.radius) for p in points} == {("none", None)} | {
        (k, r) for k in ("low", "high") for r in (2, 8)
    }


def test_filters_reach_the_test_images_and_no_others(pretrained, images, tmp_path):
    """Classes differ by their mean colour, which low-pass filters keep and high-pass filters take away."""
    points = spectrum([pretrained], [1, 4], folder=tmp_path, **QUIET)
    value = {(p.filter, p.radius): p.value for p in points if p.score == "probe"}
    assert value["none", None] == 1
    assert value["low", 1] >= 0.9
    assert value["high", 4] <= 0.6  # of three classes


def test_a_run_on_labels_scores_as_its_report_and_by_compute(tuned, tmp_path):
    points = spectrum([tuned], [2, 4, 8], checkpoints="all", folder=tmp_path, **QUIET)
    report = json.loads((tuned / "report.json").read_text())
    whole = [point for point in points if point.filter == "none"]
    assert whole[-1].value == report["test"]["top1"]
    assert len(whole) >= 3
    rows = read_metrics(tuned / "metrics.jsonl")
    spent = {row["step"]: row["compute/fraction"] for row in rows if "compute/fraction" in row}
    assert [p.compute for p in whole] == pytest.approx([spent[p.step] for p in whole])
    held_out = spectrum([tuned], [2], on="val", folder=tmp_path / "val", **QUIET)
    assert held_out[0].value == report["val"]["top1"]
    assert held_out[0].images == report["val"]["images"]
    rows = read(tmp_path / "spectrum.csv")
    assert [tuple(row) for row in rows[:1]] == [SpectrumPoint._fields]
    assert [float(row["value"]) for row in rows] == pytest.approx([p.value for p in points], abs=1e-6)
    for name in ("spectrum.png", "spectrum-by-compute-labelled.png", "filters.png"):
        assert width(tmp_path / name) == 1200


def test_several_runs_share_one_table(pretrained, tuned, convnet, tmp_path):
    said: list[str] = []
    points = spectrum([pretrained, tuned, convnet], [4], images=10, folder=tmp_path, say=said.append)
    assert {(p.run, p.score) for p in points} == {
        *(("masked", "knn3"), ("masked", "probe"), ("labelled", "top1"), ("convnet", "top1"))
    }
    assert {point.images for point in points} == {10}
    assert "convnet top1 low | high" in said[-1]
    assert not (tmp_path / "spectrum-by-compute-labelled.png").exists()


def test_similarity_of_every_pair_of_checkpoints(pretrained, tuned, tmp_path):
    (drawn,) = similarity([pretrained, tuned], folder=tmp_path, overrides=FP32, **QUIET)
    runs = open_runs([pretrained, tuned], FP32)
    kept = [run.checkpoints("all") for run in runs]
    assert drawn.values.shape == (len(kept[0]), len(kept[1]))
    assert min(drawn.values.shape) > 2
    assert list(drawn.first_compute) == sorted(drawn.first_compute)
    assert drawn.second_compute[-1] == 1

    config = load_config(pretrained / "config.yaml")
    source = build_source(config, "test", evaluation=True)
    batch = torch.stack([EvalTransform((16, 16), 1.0)(source.image(i)) for i in range(len(source))])
    for row, column in ((0, 0), (0, -1), (-1, -1)):
        networks = open_encoder(runs[0], kept[0][row]), open_encoder(runs[1], kept[1][column])
        means = [
            n.embed(lambda net, x: net.forward_features(x)[:, 1:].mean(1), batch).float().numpy() for n in networks
        ]
        # The final norm and the mean of the patches are taken apart here or there: float32 rounding of the features.
        assert drawn.values[row, column] == pytest.approx(linear_cka(*means), abs=1e-5)
    assert abs(drawn.values[0, 0] - drawn.values[-1, 0]) > 1e-3
    rows = read(tmp_path / "similarity.csv")
    assert len(rows) == drawn.values.size
    assert float(rows[-1]["cka"]) == pytest.approx(drawn.values[-1, -1], abs=1e-6)
    assert (rows[-1]["first"], rows[-1]["second"], rows[-1]["images"]) == ("masked", "labelled", "18")
    assert width(tmp_path / "similarity-masked-labelled.png") == 1200


def test_blocks_are_compared_one_by_one(pretrained, tuned, convnet, tmp_path):
    first, second = similarity([pretrained, tuned], blocks="all", folder=tmp_path, **QUIET)
    (last,) = similarity([pretrained, tuned], folder=tmp_path, **QUIET)
    assert (first.block, second.block, last.block) == ("block 1", "block 2", "last")
    np.testing.assert_array_equal(second.values, last.values)
    assert not np.allclose(first.values, second.values, atol=1e-3)
    with pytest.raises(ConfigError, match="plain ViTs"):
        similarity([convnet], blocks="all", folder=tmp_path, **QUIET)


def test_one_run_is_compared_with_itself_and_three_by_two(pretrained, tuned, convnet, tmp_path):
    (drawn,) = similarity([pretrained], folder=tmp_path, **QUIET)
    np.testing.assert_allclose(np.diag(drawn.values), 1, atol=1e-9)
    np.testing.assert_allclose(drawn.values, drawn.values.T, atol=1e-9)
    maps = similarity([tuned, convnet, pretrained], checkpoints="last", folder=tmp_path, **QUIET)
    assert [(m.first, m.second) for m in maps] == [
        ("labelled", "convnet"),
        ("labelled", "masked"),
        ("convnet", "masked"),
    ]
    assert {m.values.shape for m in maps} == {(1, 1)}
    assert len({row["cka"] for row in read(tmp_path / "similarity.csv")}) == 3


def test_images_without_labels_have_a_similarity(photos_without_labels, tmp_path):
    run = run_here(photos_without_labels, tmp_path / "run", "epochs=4")
    (drawn,) = similarity([run], **QUIET)
    assert drawn.values[0, 0] == pytest.approx(1)
    assert (run / "studies" / "similarity.csv").exists()


@pytest.fixture
def photos_without_labels(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(12):
        pixels = np.random.default_rng(index).integers(0, 255, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def test_refusals(images, tuned, tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        spectrum([tmp_path], **QUIET)
    with pytest.raises(ConfigError, match="positive numbers"):
        spectrum([tuned], [0], **QUIET)
    (tmp_path / "begun").mkdir()
    for name in ("config.yaml", "plan.json"):
        (tmp_path / "begun" / name).write_text((tuned / name).read_text())
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        similarity([tmp_path / "begun"], **QUIET)
    scored = probe_here(images, tmp_path / "scores", f"checkpoint={tuned}", "protocol=logistic")
    with pytest.raises(ConfigError, match="study the run that made the encoder"):
        spectrum([scored], **QUIET)


def test_pictures_of_many_checkpoints_fit(tmp_path):
    u = np.linspace(0.02, 1, 50)
    names = {"first": "a" * 30, "second": "b" * 30, "first_compute": u, "second_compute": u}
    maps = [
        SimilarityMap(**names, block=f"block {b}", values=np.exp(-np.abs(u[:, None] - u) * b)) for b in range(1, 13)
    ]
    similarity_picture(maps, tmp_path / "maps.png")
    points = [
        SpectrumPoint("run", int(100 * c), c, "top1", kind, radius, c / 2, 10)
        for c in u
        for kind, radius in [("none", None), *((k, r) for k in ("low", "high") for r in (2, 4, 8))]
    ]
    spectrum_by_compute_picture(points, tmp_path / "points.png")
    assert width(tmp_path / "maps.png") == width(tmp_path / "points.png") == 1200


def test_the_commands_run_and_their_help_loads_no_torch(tuned, tmp_path, capsys):
    code = "import sys, argparse, mae_et.studies as s; s.add_commands(argparse.ArgumentParser().add_subparsers())"
    assert (
        subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], check=False).returncode == 0
    )
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    for line in (f"spectrum {tuned} --radii 2 4 --images 8", f"similarity {tuned} {tuned} --images 8"):
        options = parser.parse_args([*line.split(), "--folder", str(tmp_path), "--set", "engine.threads=1"])
        assert options.action(options) == 0
    assert "unfiltered" in capsys.readouterr().out
    assert len(read(tmp_path / "spectrum.csv")) == 5
