"""Every head learns two pictures by heart, in a run like any other: what cannot, has a fault."""

from __future__ import annotations

import json

import pytest

from tests.end_to_end.annotated import detect_here, segment_here, write_objects

# Nothing that would make two views of an image differ, and one learning rate for all layers.
PLAIN = [
    *("data.size=64", "data.scale=[1,1]", "data.flip=false", "data.holdout=0", "data.test_split=train"),
    *("model.width=32", "model.channels=32", "model.drop_path=0", "engine.precision=fp32", "evaluation.every=null"),
    *("optim.batch=2", "optim.layer_decay=null", "optim.weight_decay=0", "optim.warmup=0.1", "optim.clip=1.0"),
    *("tracking.pictures=false", "tracking.every=50"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_objects(tmp_path_factory.mktemp("images"), train=2, test=1)


def found(run):
    return json.loads((run / "report.json").read_text())["test"]


# Faster and Cascade R-CNN are parts of these; benchmarks/overfit.py has them all, on photos.
@pytest.mark.parametrize("head", ["retinanet", "mask_rcnn", "cascade_mask_rcnn"])
def test_detectors(head, images, tmp_path):
    changes = ["model.representation=64", "model.mask_channels=16", "model.samples=32", "model.anchor_scale=0.5"]
    changes += [f"model.head={head}", "optim.lr=2e-3", "steps=140"]
    scores = found(detect_here(images, tmp_path / "run", *PLAIN, *changes))
    assert scores["boxes"]["ap50"] > 0.9
    assert (scores["masks"] is None) == ("mask" not in head)
    if scores["masks"] is not None:
        assert scores["masks"]["ap50"] > 0.9


@pytest.mark.parametrize("head", ["upernet", "linear"])
def test_segmenters(head, images, tmp_path):
    changes = ["model.head_channels=32", "model.dropout=0", "data.photometric=false", "data.category_share=1"]
    changes += [f"model.head={head}", "optim.lr=4e-3", "steps=80"]
    scores = found(segment_here(images, tmp_path / "run", *PLAIN, *changes))
    assert scores["miou"] > 0.95
