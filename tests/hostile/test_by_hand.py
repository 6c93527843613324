"""Files damaged by hand: each is named."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from mae_et.config import ConfigError, FinetuneConfig, load_config
from mae_et.curriculum.calibration import Calibration
from mae_et.engine.checkpoint import CheckpointError, load_checkpoint
from mae_et.exchange.backbone import Backbone
from mae_et.exchange.records import read_shape
from mae_et.exchange.weights import WeightsError, open_weights
from tests.hostile.small import BACKBONE, CONFIG, SHAPE

JUNK = ["", "null", "5", '"text"', "[]", "{}", "[[1]]", '{"a": NaN}', "{", "\x00\xff", '{"shape": 3, "size": "x"}']


@pytest.mark.parametrize("text", JUNK)
def test_json_damaged_by_hand_is_named(tmp_path, pretrained, tuned, text):
    (tuned / "backbone.json").write_text(text)
    with pytest.raises(WeightsError, match=r"backbone\.json: does not describe a backbone"):
        open_weights(tuned)
    with pytest.raises(ValueError, match=r"."):
        Backbone.from_json(text)
    with pytest.raises(ValueError, match="not a calibration"):
        Calibration.from_json(text)
    checkpoint = tuned / "checkpoints" / "step-00000004"
    (checkpoint / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("text", ["", "null", "5", "text", "[1]", "a: [", "model: 5", "model: [1]", "seed: x"])
def test_yaml_damaged_by_hand_is_named(pretrained, text):
    path = pretrained / "config.yaml"
    path.write_text(text)
    with pytest.raises(WeightsError, match=r"config\.yaml"):
        open_weights(pretrained)
    if text in ("", "null"):
        return  # no key is a configuration, of defaults
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_config(path)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        *(("model", key, value) for key in ("width", "depth", "heads") for value in (-1, "16", 2.5, [1], 10**9)),
        *(("model", "patch_size", value) for value in (0, "4", True)),
        *(("model", "mlp_ratio", value) for value in (-2.0, "x", 1e300)),
        *(("data", key, value) for key in ("mean", "std") for value in ("abc", ["a"], [0.1, -1e999], 3)),
        *(("data", "size", value) for value in (0, "8", [8, 8, 8], 10**9, {})),
        *(("model", "name", value) for value in (None, [], {}, 4)),
    ],
)
def test_numbers_damaged_by_hand_are_named(pretrained, section, key, value):
    config = {**CONFIG, section: {**CONFIG[section], key: value}}
    (pretrained / "config.yaml").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"config\.yaml|shape that the run states|cannot be read"):
        open_weights(pretrained)


@pytest.mark.parametrize("change", [{"depth": "1"}, {"heads": 3}, {"patch_size": 0}, {"extra": 1}, {"locality": 1}])
def test_a_shape_damaged_by_hand_is_refused(change):
    assert read_shape(asdict(SHAPE)) == SHAPE
    with pytest.raises(ValueError, match=next(iter(change))):
        read_shape({**asdict(SHAPE), **change})


@pytest.mark.parametrize(
    "change",
    [{"channels": "3"}, {"channels": 1}, {"std": [0, 1, 1]}, {"size": 0}, {"model": 5}, {"shape": None}, {"more": 1}],
)
def test_a_backbone_damaged_by_hand_is_refused(change):
    assert Backbone.from_json(BACKBONE.to_json()) == BACKBONE
    with pytest.raises(ValueError, match=r"."):
        Backbone.from_json(json.dumps({**json.loads(BACKBONE.to_json()), **change}))


def calibration(**changes: Any) -> dict[str, Any]:
    timing = {
        **{"bandwidth": [8, 8], "visible": 4, "batch": 8, "filtered": False, "seconds": 0.1, "spread": 0.0},
        **{"step_seconds": 0.1, "data_seconds": 0.0, "memory": None, "image": [3, 8, 8]},
        **{"flops_per_image": None, "blocks": 3},
    }
    whole = {"title": "t", "device": "d", "processes": 1, "threads": 1, "workers": 0, "precision": "fp32"}
    inner = {key: value for key, value in changes.items() if key in timing}
    outer = {key: value for key, value in changes.items() if key not in timing}
    return {"timings": [{**timing, **inner}], **whole, "torch": "2", "date": "today", **outer}


@pytest.mark.parametrize(
    "changes",
    [
        *({"seconds": value} for value in (0, -1, "1", None, [])),
        *({"bandwidth": value} for value in ([8], 8, ["a", "b"], [8, -8])),
        *({"processes": "1"}, {"timings": []}, {"timings": [3]}, {"timings": 3}, {"filtered": 0}, {"memory": "much"}),
        *({"image": [3, 8]}, {"flops_per_image": -1}, {"title": 4}, {"unknown": 1}, {"batch": 8.5}),
    ],
    ids=str,
)
def test_a_calibration_damaged_by_hand_is_refused(tmp_path, changes):
    Calibration.from_json(json.dumps(calibration()))
    with pytest.raises(ValueError, match="not a calibration"):
        Calibration.from_json(json.dumps(calibration(**changes)))


@pytest.mark.parametrize("text", ["curriculum: null", "curriculum: [1]", "5: 1", "stages: 5"])
def test_a_curriculum_damaged_by_hand_is_refused(tmp_path, text):
    path = tmp_path / "found.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"curriculum"):
        load_config(None, [f"curriculum={path}"])


@pytest.mark.parametrize("text", ["curriculum: {growth: 5}", "model: {arguments: 4}", "data: [1]", "optim: x"])
def test_sections_damaged_by_hand_are_named(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(f"task: finetune\n{text}\n")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_config(path, schema=FinetuneConfig)
