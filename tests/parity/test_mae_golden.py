"""Our masked autoencoder against golden losses and predictions made by the arithmetic of MAE's official code."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mae_et.curriculum.stage import visible_tokens
from mae_et.models.mae import MAEOutput, MaskedAutoencoder

# Five blocks in float32 on numbers of size 1 to 4, each sum of up to 96 products right to 1e-7 of them; 2e-6 seen.
LOSS_TOLERANCE = 1e-5
PREDICTION_TOLERANCE = 1e-5


def load_maker() -> ModuleType:
    path = Path(__file__).with_name("make_mae_golden.py")
    specification = importlib.util.spec_from_file_location("make_mae_golden", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


make = load_maker()
GOLDEN: dict[str, dict[str, dict[str, Any]]] = json.loads(make.GOLDEN.read_text())

every_case = pytest.mark.parametrize("case", list(make.GRIDS))
every_target = pytest.mark.parametrize("target", make.TARGETS)


def run_ours(case: str, target: str) -> MAEOutput:
    rows, columns = make.GRIDS[case]
    hog = target == "hog"
    model = MaskedAutoencoder(
        size=(rows * make.PATCH, columns * make.PATCH),
        patch_size=make.PATCH,
        channels=make.CHANNELS,
        width=make.WIDTH,
        depth=make.DEPTH,
        heads=make.HEADS,
        decoder_width=make.DECODER_WIDTH,
        decoder_depth=make.DECODER_DEPTH,
        decoder_heads=make.DECODER_HEADS,
        target=target,  # pyright: ignore[reportArgumentType]
        cell=make.CELL,
        bins=make.BINS,
        mean=make.MEAN if hog else (0.0, 0.0, 0.0),
        std=make.STD if hog else (1.0, 1.0, 1.0),
    )
    weights = {name: torch.from_numpy(value).float() for name, value in make.make_weights(target).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ["encoder.pos_embed"]
    assert unexpected == []
    # Pixel targets start from the very same floats; HOG from integers, which the model standardises itself.
    images = make.make_images(case) if hog else make.standardise(make.make_images(case))
    visible = visible_tokens(rows * columns, make.MASK_RATIO)
    with torch.no_grad():
        return model(torch.from_numpy(images), torch.from_numpy(make.make_noise(case)), visible)


@every_case
@every_target
def test_loss_and_predictions(case, target):
    golden, output = GOLDEN[case][target], run_ours(case, target)
    assert output.masked_ids.sort(dim=1).values.tolist() == golden["masked"]
    assert abs(float(output.loss) - golden["loss"]) <= LOSS_TOLERANCE
    for entry in golden["predictions"]:
        n, values = entry["image"], torch.tensor(entry["values"], dtype=torch.float64)
        place = output.masked_ids[n].tolist().index(entry["patch"])
        ours = output.prediction[n, place, : len(values)].double()
        torch.testing.assert_close(ours, values, rtol=0, atol=PREDICTION_TOLERANCE)


@every_case
@every_target
def test_whole_prediction_and_target(case, target):
    output, reference = run_ours(case, target), make.run(case, target)
    at = output.masked_ids[:, :, None]
    for ours, theirs in (
        (output.prediction, reference.prediction),
        (output.target, make.make_target(target, make.make_images(case))),
    ):
        expected = torch.from_numpy(theirs).gather(1, at.expand_as(ours))
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=PREDICTION_TOLERANCE)


@every_case
@every_target
def test_golden_file_is_what_the_script_makes(case, target):
    made, golden = make.make_golden()[case][target], GOLDEN[case][target]
    assert made["masked"] == golden["masked"]
    # Float64 on another machine: the same to a few units in the last place, over five blocks.
    assert made["loss"] == pytest.approx(golden["loss"], rel=1e-11)
    for new, old in zip(made["predictions"], golden["predictions"], strict=True):
        assert (new["image"], new["patch"]) == (old["image"], old["patch"])
        assert new["values"] == pytest.approx(old["values"], rel=1e-9, abs=1e-11)
