"""Runs of detection and segmentation, whole: what their folders hold, how they resume, what they refuse."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import torch

from mae_et.__main__ import main
from mae_et.config import ConfigError, DetectConfig, SegmentConfig, load_config
from mae_et.detecting import detect
from mae_et.engine.bad_images import BadImagesError
from mae_et.exchange.weights import open_weights
from mae_et.exporting import export_checkpoint
from mae_et.segmenting import segment
from mae_et.tracking import read_metrics
from tests.end_to_end.annotated import CLASSES, TINY_DETECT, TINY_SEGMENT, detect_here, segment_here, write_objects
from tests.end_to_end.labelled import finetune_here, write_classes
from tests.end_to_end.tiny import history, run_here, weights
from tests.engine.ranks import run_ranks

KEPT = ("config.yaml", "plan.json", "metrics.jsonl", "backbone.json", "run_id.txt")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_objects(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def pretrained(photos, tmp_path_factory):
    return run_here(photos, tmp_path_factory.mktemp("pretrained") / "run", "data.size=32", "model.patch_size=4")


@pytest.fixture(scope="module")
def detected(images, pretrained, tmp_path_factory):
    run = tmp_path_factory.mktemp("detected") / "run"
    changes = [f"checkpoint={pretrained}", "model.name=null", "saving.steps=1", "saving.keep=1000"]
    return detect_here(images, run, *changes)


@pytest.fixture(scope="module")
def segmented(images, pretrained, tmp_path_factory):
    run = tmp_path_factory.mktemp("segmented") / "run"
    changes = [f"checkpoint={pretrained}", "model.name=null", "saving.steps=1", "saving.keep=1000"]
    return segment_here(images, run, *changes, "evaluation.scales=[0.5,1.0]", "evaluation.flip=true")


def report(run):
    return json.loads((run / "report.json").read_text())


def test_a_detectors_folder_holds_all_of_the_run(detected, pretrained):
    found = report(detected)
    assert (found["val"]["images"], found["test"]["images"]) == (1, 4)
    assert 0 <= found["test"]["boxes"]["ap"] <= 1
    assert 0 <= found["test"]["masks"]["ap"] <= 1
    with (detected / "per_class.csv").open() as lines:
        assert [row["name"] for row in csv.DictReader(lines)] == list(CLASSES)
    for name in ("boxes", "masks"):
        assert {row["category_id"] for row in json.loads((detected / f"{name}.json").read_text())} <= {3, 7}
    assert (detected / "pictures" / "detections.png").stat().st_size > 3000
    assert (detected / "pictures" / "detections-00000004.png").exists()
    rows = history(detected)
    assert rows[0]["parent/path"].startswith(str(pretrained))
    assert [row["step"] for row in rows if "val/ap" in row] == [4, 8]
    assert [row["step"] for row in rows if "test/mask_ap" in row] == [8]


def test_a_segmenters_folder_holds_all_of_the_run(segmented):
    found = report(segmented)
    assert {"val", "test", "test_many_scales"} <= set(found)
    assert 0 < found["test"]["miou"] <= 1
    assert found["test"]["pixels"] == found["test_many_scales"]["pixels"]
    with (segmented / "per_class.csv").open() as lines:
        assert [row["name"] for row in csv.DictReader(lines)] == ["wall", *CLASSES]
    assert (segmented / "pictures" / "scenes.png").stat().st_size > 3000
    assert [row["step"] for row in history(segmented) if "val/miou" in row] == [4, 8]


@pytest.mark.parametrize("kind", ["detected", "segmented"])
def test_it_begins_with_the_checkpoints_weights(kind, images, pretrained, tmp_path):
    """One step at a learning rate of nothing leaves the network as it came; the class token is left behind."""
    here = detect_here if kind == "detected" else segment_here
    changes = ["optim.lr=1e-30", "optim.weight_decay=0", "steps=1", "model.name=null", "evaluation.every=null"]
    run = here(images, tmp_path / "run", f"checkpoint={pretrained}", *changes)
    ours, theirs = open_weights(run).tensors, open_weights(pretrained).tensors
    assert set(theirs) - set(ours) == {"cls_token"}
    for name, tensor in ours.items():
        expected = theirs[name][:, 1:] if name == "pos_embed" else theirs[name]
        assert torch.equal(tensor, expected), name


def test_its_network_serves_others(detected, tmp_path):
    labelled = write_classes(tmp_path / "labelled")
    run = finetune_here(labelled, tmp_path / "run", f"checkpoint={detected}", "epochs=1")
    assert history(run)[0]["parent/path"].startswith(str(detected))


@pytest.mark.parametrize("kind", ["detected", "segmented"])
@pytest.mark.parametrize("step", [1, 5])
def test_a_resumed_run_has_the_same_bits(request, kind, step, images, pretrained, tmp_path):
    whole = request.getfixturevalue(kind)
    here, run = (detect_here if kind == "detected" else segment_here), tmp_path / "run"
    run.mkdir()
    for name in KEPT:
        shutil.copy(whole / name, run)
    shutil.copytree(whole / "checkpoints" / f"step-{step:08}", run / "checkpoints" / f"step-{step:08}")
    changes = [f"checkpoint={pretrained}", "model.name=null", "data.workers=1"]
    if kind == "segmented":
        changes += ["evaluation.scales=[0.5,1.0]", "evaluation.flip=true"]
    here(images, run, *changes)
    assert history(run) == history(whole)
    assert weights(run) == weights(whole)


def test_it_is_examined_again(detected, images, pretrained):
    before, said = report(detected), []
    changes = [f"checkpoint={pretrained}", "model.name=null"]
    detect_here(images, detected, *changes, "evaluation.size=64", only_evaluate=True, said=said.append)
    after = report(detected)
    assert (before["size"], after["size"]) == ([32, 32], [64, 64])
    assert any(line.startswith("test: boxes: AP ") for line in said)


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("detect", ["model.head=mask_rcnn"]),
        ("detect", ["model.head=cascade_mask_rcnn"]),
        ("detect", ["model.head=retinanet"]),
        ("detect", ["model.head=mask_rcnn", "engine.parallel=fsdp"]),
        ("segment", []),
        ("segment", ["engine.parallel=fsdp", "model.auxiliary=0.4"]),
    ],
    ids=["mask_rcnn", "cascade", "retinanet", "fsdp", "upernet", "upernet-fsdp"],
)
def test_two_ranks_train_as_one(task, changes, images, tmp_path):
    """What is sampled, dropped and averaged does not know of ranks; scores are shared out."""
    changes = [*changes, "engine.precision=fp32", "model.drop_path=0.2", "steps=4"]
    here = detect_here if task == "detect" else segment_here
    # R-CNN's losses are means over what is sampled in a micro-batch: it is one image here and there.
    alone = history(here(images, tmp_path / "alone", *changes, "optim.accumulation=4"))
    run_ranks(2, _train, task, str(images), str(tmp_path / "together"), [*changes, "optim.accumulation=2"])
    together = history(tmp_path / "together")
    losses = [[row["train/loss"] for row in rows if "train/loss" in row] for rows in (together, alone)]
    assert len(losses[0]) == 4
    # fp32 sums over ranks in another order, and what four steps of training make of them.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    score = "test/ap50" if task == "detect" else "test/pixel_accuracy"
    (found,), (expected,) = ([row[score] for row in rows if score in row] for rows in (together, alone))
    assert found == pytest.approx(expected, abs=0.02)


def test_retinanet_and_upernet_do_not_know_of_micro_batches(images, tmp_path):
    changes = ["engine.precision=fp32", "model.drop_path=0.2", "steps=4", "evaluation.every=null"]
    for here, more in ((detect_here, ["model.head=retinanet"]), (segment_here, ["model.dropout=0.3"])):
        losses = []
        for accumulation in (1, 2):
            run = here(
                images,
                tmp_path / f"{here.__name__}-{accumulation}",
                *changes,
                *more,
                f"optim.accumulation={accumulation}",
            )
            losses.append([row["train/loss"] for row in history(run) if "train/loss" in row])
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def _train(task: str, images: str, run: str, changes: list[str]) -> None:
    tiny, schema = (TINY_DETECT, DetectConfig) if task == "detect" else (TINY_SEGMENT, SegmentConfig)
    config = load_config(None, [*tiny, f"data={images}", f"run={run}", *changes], schema)
    assert (detect if task == "detect" else segment)(config, say=lambda _line: None) == 0


@pytest.mark.parametrize(
    "changes",
    [
        ["model.name=timm/resnet10t"],
        ["model.name=timm/convnext_atto", "model.arguments={depths: [1,1,1,1], dims: [8,8,16,16]}"],
        ["model.window=2", "model.global_blocks=1", "model.checkpointing=true", "model.drop_path=0.3"],
    ],
    ids=["resnet", "convnext", "windows"],
)
@pytest.mark.parametrize("task", ["detect", "segment"])
def test_other_networks_train(task, changes, images, tmp_path):
    here = detect_here if task == "detect" else segment_here
    run = here(images, tmp_path / "run", *changes, "model.head=retinanet" if task == "detect" else "model.taps=last")
    losses = [row["train/loss"] for row in history(run) if "train/loss" in row]
    assert len(losses) == 8
    assert losses[-1] < losses[0]


def test_plans_need_no_data(tmp_path, capsys):
    for task, tiny in (("detect", TINY_DETECT), ("segment", TINY_SEGMENT)):
        config = tmp_path / f"{task}.yaml"
        config.write_text(f"task: {task}\n")
        line = ["plan", "--config", str(config), *tiny, "steps=1000", "data.images=100", "data.classes=2"]
        assert main(line) == 0
        assert "baseline: 1,000 steps, 4,000 images, 40.0 passes over 100 images" in capsys.readouterr().out


def test_a_bad_image_is_replaced_and_listed(images, tmp_path):
    copy = shutil.copytree(images, tmp_path / "images")
    (copy / "train" / "03.png").write_bytes(b"no image")
    run = detect_here(copy, tmp_path / "run", "data.max_bad=0.5", "data.holdout=0", "steps=6")
    rows = read_metrics(run / "bad_images.jsonl")
    assert [row["path"] for row in rows] == [str(copy / "train" / "03.png")]
    assert max(row.get("data/bad_images", 0) for row in history(run)) == 1


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("detect", ["data.root=null"], "data.root is not set"),
        ("detect", ["data.size=null"], "data.size=null"),
        ("segment", ["data.size=null"], "data.size=null"),
        ("detect", ["data.scale=[2,1]"], "data.scale"),
        ("segment", ["data.scale=[2,1]"], "data.scale"),
        ("segment", ["evaluation.scales=[.nan]"], "scales"),
        ("segment", ['data.names=["a\\nb",blue,red]'], "a name that can be printed"),
        ("detect", ["model.name=timm/beit_base_patch16_224", "evaluation.size=64"], "another size or model"),
        ("detect", ["data.size=40"], "data.size=40: sides must be multiples of 32 px for this network"),
        ("detect", ["evaluation.size=40"], "evaluation.size=40: sides must be multiples of 32 px"),
        ("detect", ["data.train_split=val"], "val"),
        ("detect", ["optim.drops=[1.5]", "optim.decay=steps"], "drops"),
        ("detect", ["model.name=timm/vit_no_such"], "timm has no model"),
        ("segment", ["data.names=[wall,blue]"], "value 2"),
        ("segment", ["data.names=[]"], "classes.txt"),
        ("segment", ["evaluation.window=48"], "evaluation.window=48: sides must be multiples of 32 px"),
        ("segment", ["evaluation.scales=[]"], "scales"),
    ],
)
def test_it_refuses(task, changes, message, images, tmp_path):
    here = detect_here if task == "detect" else segment_here
    with pytest.raises((ConfigError, BadImagesError), match=message):
        here(images, tmp_path / "run", *changes)


def test_masks_are_not_made_up(images, tmp_path):
    copy = shutil.copytree(images, tmp_path / "images")
    for split in ("train", "test"):
        values = json.loads((copy / f"{split}.json").read_text())
        for annotation in values["annotations"]:
            del annotation["segmentation"]
        (copy / f"{split}.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"has none: choose model\.head=faster_rcnn"):
        detect_here(copy, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"choose model\.head=cascade_rcnn"):
        detect_here(copy, tmp_path / "run", "model.head=cascade_mask_rcnn")
    detect_here(copy, tmp_path / "run", "model.head=faster_rcnn", "steps=2", "evaluation.every=null")


def test_its_network_leaves_without_the_head(detected, tmp_path):
    """With mean pooling, since it has no class token any more."""
    written = export_checkpoint(str(detected), "timm", str(tmp_path / "timm"), say=lambda _line: None)
    assert written.difference < 1e-5
    assert "label_names" not in json.loads((tmp_path / "timm" / "config.json").read_text())


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_rectangles(task, images, pretrained, tmp_path):
    here = detect_here if task == "detect" else segment_here
    changes = [f"checkpoint={pretrained}", "model.name=null", "data.size=[32,64]", "steps=2", "evaluation.every=null"]
    run = here(images, tmp_path / "run", *changes)
    assert json.loads((run / "plan.json").read_text())["stages"][0]["bandwidth"] == [32, 64]
    assert {"val", "test"} <= set(report(run))


def test_dropout_of_the_network_resumes_too(images, tmp_path):
    """timm's own draws from torch's generator, which no checkpoint holds."""
    network = ["model.name=timm/vit_tiny_patch16_224", "model.head=retinanet", "data.size=64", "steps=4"]
    network += ["model.patch_size=16", "model.arguments={embed_dim: 16, depth: 2, num_heads: 2, proj_drop_rate: 0.3}"]
    found = []
    for name, stops in (("whole", (1.0,)), ("interrupted", (0.5, 1.0))):
        changes = [*TINY_DETECT, *network, f"data={images}", f"run={tmp_path / name}", "evaluation.every=null"]
        for until in stops:
            assert detect(load_config(None, changes, DetectConfig), say=lambda _line: None, until=until) == 0
        found.append(weights(tmp_path / name))
    assert found[0] == found[1]


def test_every_split_must_have_the_masks_that_are_scored(images, tmp_path):
    copy = shutil.copytree(images, tmp_path / "images")
    values = json.loads((copy / "test.json").read_text())
    for annotation in values["annotations"]:
        del annotation["segmentation"]
    (copy / "test.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"coco test has none"):
        detect_here(copy, tmp_path / "run")
