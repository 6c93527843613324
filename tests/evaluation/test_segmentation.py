"""Confusion counts against NumPy and torchmetrics; whole scenes, windows, scales and mirrors against each other."""

from __future__ import annotations

import csv
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

from mae_et.engine.precision import Precision
from mae_et.evaluation.segmentation import (
    ConfusionTally,
    SceneExamination,
    _logits,
    predict_scene,
    worst_iou_table,
    write_iou_csv,
)
from tests.engine.children import start_child, wait_child


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scenes(classes: int, true: list[int], predicted: list[int], seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Pairs (prediction, truth) of several sizes, of chosen classes, agreeing more often than not."""
    rng = np.random.default_rng(seed)
    pairs = []
    for size in [(30, 40), (1, 7), (25, 25)]:
        truth = rng.choice(true, size)
        guess = np.where((rng.random(size) < 0.6) & np.isin(truth, predicted), truth, rng.choice(predicted, size))
        truth[rng.random(size) < 0.2] = 255
        assert guess.max() < classes
        pairs.append((torch.from_numpy(guess.astype(np.uint8)), torch.from_numpy(truth.astype(np.uint8))))
    return pairs


def count(pairs, classes):
    tally = ConfusionTally(classes, "cpu")
    for guess, truth in pairs:
        tally.add(guess, truth)
    return tally.result()


CASES = {
    "all": (4, [0, 1, 2, 3], [0, 1, 2, 3]),
    "neither true nor predicted": (6, [0, 2, 4], [0, 2, 4]),
    "predicted, never true": (5, [0, 1, 2], [0, 1, 2, 4]),
    "true, never predicted": (5, [0, 1, 2, 4], [0, 1, 2]),
    "many": (255, list(range(0, 255, 2)), list(range(255))),
}


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_numpy(case):
    classes, true, predicted = CASES[case]
    pairs = scenes(classes, true, predicted)
    result = count(pairs, classes)
    guess = np.concatenate([g.numpy().ravel() for g, _ in pairs]).astype(int)
    truth = np.concatenate([t.numpy().ravel() for _, t in pairs]).astype(int)
    guess, truth = guess[truth != 255], truth[truth != 255]
    ious, accuracies = {}, {}
    for number in range(classes):
        either = (guess == number) | (truth == number)
        if either.any():
            ious[number] = ((guess == number) & (truth == number)).sum() / either.sum()
        if (truth == number).any():
            accuracies[number] = (guess[truth == number] == number).mean()
    assert result.iou == tuple(ious.get(number) for number in range(classes))
    assert result.accuracy == tuple(accuracies.get(number) for number in range(classes))
    # Means of up to 255 numbers, summed in another order
    assert result.miou == pytest.approx(np.mean(list(ious.values())), rel=1e-13)
    assert result.mean_accuracy == pytest.approx(np.mean(list(accuracies.values())), rel=1e-13)
    assert result.pixel_accuracy == (guess == truth).mean()
    assert result.pixels == len(truth) == result.confusion.sum()
    for (row, column), number in np.ndenumerate(result.confusion[:6, :6]):
        assert number == ((truth == row) & (guess == column)).sum()


@pytest.mark.parametrize("case", CASES)
def test_miou_is_that_of_torchmetrics(case):
    """Its macro average leaves out the same classes."""
    classes, true, predicted = CASES[case]
    pairs = scenes(classes, true, predicted, seed=1)
    metric = MulticlassJaccardIndex(num_classes=classes, average="macro", ignore_index=255)
    for guess, truth in pairs:
        metric.update(guess.long().flatten(), truth.long().flatten())
    assert count(pairs, classes).miou == pytest.approx(metric.compute().item(), rel=1e-6)  # it counts in float32


def test_the_absent_class_rule():
    truth = torch.tensor([[0, 0, 1, 1]], dtype=torch.uint8)
    result = count([(torch.tensor([[0, 0, 1, 3]], dtype=torch.uint8), truth)], 4)
    assert result.iou == (1.0, 0.5, None, 0.0)
    assert result.miou == 0.5
    assert result.accuracy == (1.0, 0.5, None, None)
    assert result.mean_accuracy == 0.75


def test_grouping_does_not_matter():
    guess, truth = scenes(4, [0, 1, 2], [0, 1, 2, 3])[0]
    parts = [(guess[i : i + 7], truth[i : i + 7]) for i in range(0, 30, 7)]
    stacked = [(torch.stack([guess[:15], guess[15:]]), torch.stack([truth[:15], truth[15:]]))]
    for other in (parts, reversed(parts), stacked):
        np.testing.assert_array_equal(count(other, 4).confusion, count([(guess, truth)], 4).confusion)


def test_nothing_to_score():
    ignored = torch.full((3, 3), 255, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"no pixel has a label.*data\.ignore"):
        count([(torch.zeros(3, 3, dtype=torch.uint8), ignored)], 2)


def test_ranks_add_up(tmp_path):
    def body(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=2)
        tally = ConfusionTally(3, "cpu")
        for image in range(rank, 3, 2):
            tally.add(torch.full((2, 2), image, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8))
        confusion = tally.reduce().result().confusion
        assert confusion.tolist() == [[4, 4, 4], [0, 0, 0], [0, 0, 0]]
        dist.barrier()  # the one that is done first takes the connection with it

    children = [start_child(partial(body, rank)) for rank in range(2)]
    assert [wait_child(child) for child in children] == [0, 0]


# Scenes


class Trunk:
    grain = 8


class Model(nn.Module):
    """Logits of any function of the pixels in [0, 1]; keeps what it was shown."""

    def __init__(self, function):
        super().__init__()
        self.function, self.trunk, self.shown = function, Trunk(), []
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        self.shown.append(tuple(images.shape[2:]))
        assert all(side % self.trunk.grain == 0 for side in self.shown[-1])
        return self.function(images.float() / 255)


def colours(images: Tensor) -> Tensor:
    """The class of a px is its strongest channel."""
    return 8 * images


def context() -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(3, 4, 9, padding=4).requires_grad_(False)


def scene(height: int = 60, width: int = 90, seed: int = 0) -> Tensor:
    """Blobs of colour."""
    rough = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (1, 3, 6, 9)).astype(np.uint8))
    return F.interpolate(rough.float(), (height, width), mode="bilinear")[0].byte()


def test_colours_are_found_at_the_images_own_size():
    image = scene()
    model = Model(colours)
    found = predict_scene(model, image, SceneExamination(60), "cpu")
    assert (found.shape, found.dtype) == ((60, 90), torch.uint8)
    assert torch.equal(found, image.argmax(0).byte())
    assert model.shown == [(64, 96)]
    # At half the size, borders between classes move by less than a px.
    halved = predict_scene(model, image, SceneExamination(30), "cpu")
    assert model.shown[1:] == [(32, 48)]
    assert halved.shape == (60, 90)
    assert (halved == found).float().mean() > 0.96
    predict_scene(model, scene(60, 300), SceneExamination(30, longest=100), "cpu")
    assert model.shown[2:] == [(24, 104)]


@pytest.mark.parametrize("window", [(64, 96), (128, 128), (64, 200)])
def test_one_window_over_all_is_the_whole_image(window):
    model = Model(context())
    whole = predict_scene(model, scene(), SceneExamination(60), "cpu")
    assert torch.equal(predict_scene(model, scene(), SceneExamination(60, window=window), "cpu"), whole)
    assert model.shown == [(64, 96)] * 2
    assert len(whole.unique()) > 1


def test_windows_slide_over_all_and_are_averaged():
    """Of a model that tells where in its window a px lies: NumPy counts the windows and their mean."""
    where = torch.arange(32.0).view(32, 1) + 3 * torch.arange(40.0)
    shown = []

    def function(images: Tensor) -> Tensor:
        shown.append(images[0, 0])
        return torch.stack([where, torch.full_like(where, 70)])[None]

    image = scene(80, 96)
    how = SceneExamination(80, window=(32, 40), stride=(24, 32))
    found = _logits(Model(function), image[None], how)
    total, times = np.zeros((80, 96)), np.zeros((80, 96))
    tops, lefts = [0, 24, 48], [0, 32, 56]
    for top in tops:
        for left in lefts:
            total[top : top + 32, left : left + 40] += where.numpy()
            times[top : top + 32, left : left + 40] += 1
            assert torch.equal(shown.pop(0), image[0, top : top + 32, left : left + 40].float() / 255)
    assert times.min() == 1
    assert not shown
    # float32 sums of at most four small integers
    np.testing.assert_allclose(found[0, 0].numpy(), total / times, rtol=1e-6)
    assert (found[0, 1] == 70).all()
    assert torch.equal(predict_scene(Model(function), image, how, "cpu"), found[0].argmax(0).byte())


def test_windows_of_a_local_model_are_the_whole_image():
    model, image = Model(colours), scene(90, 60)
    whole = predict_scene(model, image, SceneExamination(60), "cpu")
    assert torch.equal(predict_scene(model, image, SceneExamination(60, window=(32, 32)), "cpu"), whole)
    assert set(model.shown[1:]) == {(32, 32)}
    assert len(model.shown) > 7
    # Narrow in one direction only
    assert torch.equal(predict_scene(model, image, SceneExamination(60, window=(32, 80)), "cpu"), whole)
    assert model.shown[-1] == (32, 64)


@pytest.mark.parametrize("window", [None, (32, 32)])
@pytest.mark.parametrize("flip", [False, True])
def test_constant_logits_are_constant(window, flip):
    constant = torch.tensor([0.1, 0.3, 0.2]).view(1, 3, 1, 1)
    model = Model(lambda images: constant.expand(1, 3, *images.shape[2:]))
    how = SceneExamination(50, window=window, scales=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75), flip=flip)
    assert predict_scene(model, scene(), how, "cpu").unique().tolist() == [1]


def test_scales_and_mirrors_average_probabilities():
    """Each view has an opinion of its own, told by its size and by where the red px is."""
    opinions = iter([(9.0, 0.0, 0.0), (0.0, 3.0, 0.0), (0.0, 3.0, 0.0), (0.0, 0.0, 0.0)])
    shown = []

    def function(images: Tensor) -> Tensor:
        shown.append((tuple(images.shape[2:]), bool(images[..., 0].mean() > images[..., -1].mean())))
        return torch.tensor(next(opinions)).view(1, 3, 1, 1).expand(1, 3, *images.shape[2:])

    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, :, :16] = 255
    how = SceneExamination(32, scales=(0.5, 1.5), flip=True)
    # Sums of logits are 9, 6, 0; of probabilities 1.42, 2.15, 0.42.
    assert predict_scene(Model(function), image, how, "cpu").unique().tolist() == [1]
    assert shown == [((16, 16), True), ((16, 16), False), ((48, 48), True), ((48, 48), False)]


def test_mirrored_scenes_have_mirrored_classes():
    """With flip, of any model: both views are seen either way. Sizes that need no padding, which lies at one side."""
    model, image = Model(context()), scene(64, 96)
    for window in (None, (32, 32)):
        how = SceneExamination(64, window=window, stride=window and (16, 16), flip=True)
        found = predict_scene(model, image, how, "cpu")
        mirrored = predict_scene(model, image.flip(2), how, "cpu")
        assert (found.flip(1) == mirrored).all()
    alone = SceneExamination(64)
    one, two = (predict_scene(model, picture, alone, "cpu") for picture in (image, image.flip(2)))
    assert (one.flip(1) != two).any()
    weight = model.function.weight
    weight.copy_((weight + weight.flip(3)) / 2)  # a symmetric model needs no flip
    one, two = (predict_scene(model, picture, alone, "cpu") for picture in (image, image.flip(2)))
    assert (one.flip(1) == two).float().mean() > 0.999  # float32 sums in another order


def test_precision_reaches_the_model():
    seen = []

    def function(images: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return images

    for precision in (None, Precision("bf16", "cpu")):
        predict_scene(Model(function), scene(), SceneExamination(64), "cpu", precision)
    assert seen == [False, True]


def test_a_window_that_does_not_fit_the_model():
    with pytest.raises(ValueError, match="a window of 30x32 px does not fit the model: choose multiples of 8 px"):
        predict_scene(Model(colours), scene(), SceneExamination(60, window=(30, 32)), "cpu")


@pytest.mark.parametrize(
    "options",
    [
        {"short": 0},
        {"scales": ()},
        {"scales": (0.5, 0.0)},
        {"longest": 10},
        {"stride": (8, 8)},
        {"window": (32, 32), "stride": (33, 8)},
        {"window": (32, 32), "stride": (0, 8)},
    ],
)
def test_examinations_out_of_range(options):
    name = next(reversed(options))
    with pytest.raises(ValueError, match=f"{name}=.*: (choose|give)"):
        SceneExamination(**{"short": 64} | options)


# For people


def test_csv_and_table(tmp_path):
    truth = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 255]], dtype=torch.uint8)
    guess = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 0]], dtype=torch.uint8)
    result = count([(guess, truth)], 4)
    names = ["sky", "a, b", "tree", "x" * 40]
    write_iou_csv(tmp_path / "deep/iou.csv", result, names)
    with (tmp_path / "deep/iou.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["class", "name", "pixels", "iou", "accuracy", "mistaken_for", "mistaken_pixels"],
        ["0", "sky", "4", "0.750000", "0.750000", "a, b", "1"],
        ["1", "a, b", "2", "0.000000", "0.000000", "tree", "2"],
        ["2", "tree", "1", "0.333333", "1.000000", "", ""],
        ["3", "x" * 40, "0", "", "", "", ""],
    ]
    table = worst_iou_table(result, names, count=2).splitlines()
    assert [line.split()[0] for line in table[2:]] == ["a,", "tree"]
    assert "tree (100 %)" in table[2]
    assert len(worst_iou_table(result, names).splitlines()) == 5
    for function in (lambda: worst_iou_table(result, names[:3]), lambda: write_iou_csv(tmp_path / "b", result, [])):
        with pytest.raises(ValueError, match="names for 4 classes"):
            function()
