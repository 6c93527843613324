"""Losses of single samples, what becomes of them as scores, and their trip through a checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mae_et.config import SelectionConfig
from mae_et.curriculum import Curriculum
from mae_et.data.loader import Batch
from mae_et.data.selection import PassSampler
from mae_et.engine.selection import SelectedTask, Selection, choose_selection, selected
from mae_et.engine.tasks import Classification, Reconstruction
from mae_et.models.classifier import Classifier
from mae_et.models.mae import MaskedAutoencoder

CPU = torch.device("cpu")
PLAN = Curriculum.preset("baseline", 8, 2).plan(epochs=20.0, images=20, batch=4, patch_size=2, mask_ratio=0.75)


def make_selection(ratio=0.5) -> Selection:
    selection = choose_selection(SelectionConfig("infobatch", ratio), PLAN, seed=1)
    assert selection is not None
    return selection


def make_batch(indices, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = len(indices)
    return Batch(
        images=torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator),
        labels=torch.arange(count) % 5,
        seeds=torch.arange(count) + 100,
        indices=torch.tensor(indices),
    )


def as_is(images, _bandwidth):
    return images


@pytest.fixture(params=["reconstruction", "classification", "mixed"])
def setting(request):
    """(task, network)."""
    torch.manual_seed(0)
    if request.param == "reconstruction":
        sizes: dict[str, Any] = {
            "width": 16,
            "depth": 1,
            "heads": 2,
            "decoder_width": 16,
            "decoder_depth": 1,
            "decoder_heads": 2,
        }
        return Reconstruction(as_is), MaskedAutoencoder((8, 8), 2, **sizes, target="pixel")
    mixing = {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1} if request.param == "mixed" else {}
    network = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), (0.0,) * 3, (1.0,) * 3)
    return Classification(5, as_is, seed=3, **mixing), network


def reference_losses(task, network, inputs, now):
    """Image by image, in fp64."""
    with torch.no_grad():
        if isinstance(task, Reconstruction):
            output = network(inputs.images, inputs.noise, now.stage.visible)
            prediction, target = output.prediction.double().numpy(), output.target.double().numpy()
            return [((p - t) ** 2).mean() for p, t in zip(prediction, target)]
        logits, targets = network(inputs.images).double().numpy(), inputs.targets.double().numpy()
    return [-(t * (z - np.log(np.exp(z).sum()))).sum() for z, t in zip(logits, targets)]


def test_losses_are_those_of_the_images_and_average_to_the_loss(setting):
    task, network = setting
    now = PLAN.at(3)
    inputs = task.prepare(make_batch([3, 9, 0, 7]), now, CPU)
    losses = task.losses(network, inputs, now)
    assert losses.dtype == torch.float32
    # Sums of up to 48 x 12 fp32 terms.
    np.testing.assert_allclose(losses.detach().numpy(), reference_losses(task, network, inputs, now), rtol=1e-5)
    torch.testing.assert_close(losses.mean(), task.loss(network, inputs, now), rtol=1e-6, atol=0)


def test_the_gradient_is_that_of_the_weighted_mean(setting):
    task, network = setting
    selection, now, batch = make_selection(), PLAN.at(3), make_batch([3, 9, 0, 7])
    selection.passes.running.weights[[3, 9, 0, 7]] = [2, 1, 1, 2]
    chosen = selected(task, selection)
    loss = chosen.loss(network, chosen.prepare(batch, now, CPU), now)
    found = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)

    singles = task.losses(network, task.prepare(batch, now, CPU), now)
    by_hand = (2 * singles[0] + singles[1] + singles[2] + 2 * singles[3]) / 4
    expected = torch.autograd.grad(by_hand, list(network.parameters()), allow_unused=True)
    for ours, theirs in zip(found, expected):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    selection.gather()
    np.testing.assert_array_equal(selection.scores[[3, 9, 0, 7]], singles.detach())  # without weights
    assert selection.scores.isnan().sum() == 16


def test_scores_are_the_latest_that_are_finite():
    selection = make_selection()
    selection.record(torch.tensor([0, 1, 2]), torch.tensor([1.0, 2.0, 3.0]))
    selection.gather()
    selection.record(torch.tensor([1, 4]), torch.tensor([5.0, torch.inf]))
    selection.record(torch.tensor([2, 5]), torch.tensor([torch.nan, 6.0]))
    assert selection.scores[1] == 2  # not before it is gathered
    selection.gather()
    np.testing.assert_array_equal(selection.scores[:6], [1, 5, np.nan, np.nan, np.nan, 6])


def run_through(selection, stop=None):
    """Images by step, with losses that are a function of the image and the step."""
    sampler, shown, step = PassSampler(selection.passes), [], 0
    for _ in selection.passes_from(0, sampler):
        for requests in sampler:
            indices = torch.tensor([request.image for request in requests])
            shown.append(indices.tolist())
            selection.record(indices, torch.sin(indices * 7.0 + step) + 1)
            step += 1
            if step == stop:
                return shown
    return shown


@pytest.mark.parametrize("stop", [3, 5, 9, 12])
def test_what_a_checkpoint_holds_is_all_there_is(stop):
    whole = make_selection()
    shown = run_through(whole)
    assert len(shown) == PLAN.total_steps
    assert whole.passes.running.number > 20
    first = make_selection()
    run_through(first, stop)
    first.gather()
    again = make_selection()
    again.restore({name: tensor.clone() for name, tensor in first.tensors().items()}, first.values())
    assert again.metrics(stop) == first.metrics(stop)
    sampler, step = PassSampler(again.passes), stop
    for _ in again.passes_from(stop, sampler):
        for requests in sampler:
            indices = [request.image for request in requests]
            assert indices == shown[step]
            again.record(torch.tensor(indices), torch.sin(torch.tensor(indices) * 7.0 + step) + 1)
            step += 1
    assert step == len(shown)
    assert again.values() == whole.values()


def test_no_selection_is_the_task_itself():
    task = Reconstruction(as_is)
    assert choose_selection(SelectionConfig(), PLAN, seed=1) is None
    assert selected(task, None) is task
    assert isinstance(selected(task, make_selection()), SelectedTask)
