"""The grid of linear probes: one head against torch's own layer and optimizer, the choice, and a real task."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from mae_et.evaluation import grid_probe as module
from mae_et.evaluation.features import Features
from mae_et.evaluation.grid_probe import RATES, GridResult, grid_probe, held_out_table, stratified_split

CPU = torch.device("cpu")


def blobs(images: int, seed: int, spread: float = 1.0, classes: int = 4, width: int = 6) -> Features:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).standard_normal((classes, width))
    labels = np.arange(images) % classes
    return Features((centres[labels] + spread * rng.standard_normal((images, width))).astype(np.float32), labels)


def settings(standardise: bool = False) -> module._Settings:
    return module._Settings(4, batch=16, epochs=3, least_steps=0, standardise=standardise, seed=5, device=CPU)


def by_torch(train: Features, rate: float, weight: np.ndarray, batch: int, epochs: int, seed: int) -> nn.Linear:
    """A linear layer, SGD and a cosine of torch's, on the same orders."""
    layer = nn.Linear(train.features.shape[1], weight.shape[1])
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight.T))
        layer.bias.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate * batch / 256, momentum=0.9)
    steps = len(train.labels) // batch
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * epochs)
    for epoch in range(epochs):
        order = np.random.Generator(np.random.Philox(key=[seed, (3 << 32) | epoch])).permutation(len(train.labels))
        for step in range(steps):
            chosen = order[step * batch : (step + 1) * batch]
            loss = nn.functional.cross_entropy(
                layer(torch.from_numpy(train.features[chosen])), torch.from_numpy(train.labels[chosen])
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return layer


def test_each_head_is_a_linear_layer_trained_by_sgd():
    train = blobs(70, seed=1)
    rates = [0.01, 1.0, 30.0]
    pieces = {
        "left": Features(train.features[:, :2], train.labels),
        "right": Features(train.features[:, 2:], train.labels),
    }
    kinds = {"left": ("left",), "both": ("left", "right")}
    own = module._train(pieces, np.arange(70), kinds, rates, settings())
    for kind, columns in (("left", slice(0, 2)), ("both", slice(0, 6))):
        start = module._new_heads(pieces, np.arange(70), kind, kinds[kind], rates, settings()).weight
        assert 0.004 < start.std().item() < 0.016
        for i, rate in enumerate(rates):
            part = Features(train.features[:, columns], train.labels)
            layer = by_torch(part, rate, start[:, i].numpy(), batch=16, epochs=3, seed=5)
            # 12 steps in fp32, sums in other orders: a few units in the last place of weights near 1.
            torch.testing.assert_close(own[kind].weight[:, i], layer.weight.detach().T, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(own[kind].bias[i], layer.bias.detach(), rtol=1e-5, atol=1e-5)
            assert not torch.allclose(layer.weight.detach().T, start[:, i], atol=1e-4)


def test_standardised_features_have_mean_0_and_deviation_1():
    train = blobs(50, seed=1)
    scaled = Features(train.features * np.array([1, 10, 100, 1e-3, 1, 0], np.float32) + np.float32(3), train.labels)
    rows = np.arange(10, 40)
    heads = module._new_heads({"x": scaled}, rows, "x", ("x",), [0.1], settings(standardise=True))
    inputs = heads.inputs({"x": scaled}, rows).numpy()
    expected = scaled.features[rows].astype(np.float64)
    deviation = expected.std(axis=0)
    deviation[-1] = 1
    # fp32 of values near 3 with a deviation of 1e-3: 3 * 2**-24 / 1e-3 = 2e-4.
    np.testing.assert_allclose(inputs, (expected - expected.mean(axis=0)) / deviation, atol=5e-4)
    assert not inputs[:, -1].any()


def test_the_split_is_stratified_and_whole():
    labels = np.repeat([0, 1, 2, 3, 4], [100, 10, 2, 1, 3])
    np.random.default_rng(0).shuffle(labels)
    fit, held = stratified_split(labels, 0.2, seed=3)
    assert sorted([*fit, *held]) == list(range(len(labels)))
    assert np.bincount(labels[held], minlength=5).tolist() == [20, 2, 1, 0, 1]
    assert (np.diff(fit) > 0).all()
    assert not np.array_equal(held, stratified_split(labels, 0.2, seed=4)[1])
    with pytest.raises(ValueError, match="no class has two training images"):
        stratified_split(np.arange(5), 0.2, seed=0)


RATES_HERE = (1e-3, 1e-2, 1e-1, 1.0)


def fast_probe(train: dict[str, Features], test: dict[str, Features], **changes: Any) -> GridResult:
    return grid_probe(train, test, **({"rates": RATES_HERE, "batch": 32, "epochs": 2, "least_steps": 30} | changes))


def test_the_same_seed_gives_the_same_result():
    train, test = {"a": blobs(120, 1, 2.0), "b": blobs(120, 3, 2.0)}, {"a": blobs(60, 2, 2.0), "b": blobs(60, 4, 2.0)}
    first = fast_probe(train, test, seed=1)
    assert fast_probe(train, test, seed=1) == first
    assert fast_probe(train, test, seed=2).held_out != first.held_out


def test_the_choice_is_the_best_on_held_out_images_and_test_data_do_not_matter():
    noise = np.random.default_rng(0).standard_normal((120, 6)).astype(np.float32)
    good = blobs(120, 1, 0.5)
    train = {"noise": Features(noise, good.labels), "good": good}
    test = {"noise": blobs(40, 2, 0.5), "good": Features(noise[:40], good.labels[:40])}
    result = fast_probe(train, test)
    # On the test data the other kind would do better: it has no say.
    assert result.kind == "good"
    assert result.accuracy < 0.6
    assert result.held_out[result.kind, result.rate] == max(result.held_out.values()) > 0.8
    assert set(result.held_out) == {(kind, rate) for kind in train for rate in RATES_HERE}


def test_a_kind_may_be_pieces_side_by_side():
    """Each half holds one bit of the class, so only both together tell it."""
    labels = np.arange(160) % 4
    bits = np.stack([labels // 2, labels % 2], axis=1).astype(np.float32) * 4 - 2
    noisy = bits + 0.3 * np.random.default_rng(0).standard_normal(bits.shape).astype(np.float32)
    pieces = {"high": Features(noisy[:, :1], labels), "low": Features(noisy[:, 1:], labels)}
    kinds = {"high": ("high",), "low": ("low",), "both": ("high", "low")}
    result = fast_probe(pieces, pieces, kinds=kinds)
    assert result.kind == "both"
    assert result.accuracy == 1.0
    assert max(accuracy for (kind, _), accuracy in result.held_out.items() if kind != "both") < 0.8


def test_a_choice_at_the_edge_of_the_grid_says_so():
    train, test = {"x": blobs(120, 1)}, {"x": blobs(60, 2)}
    low = fast_probe(train, test, rates=(1e-7, 1e-6, 1e-2))
    assert low.rate == 1e-2
    assert low.edge
    inner = fast_probe(train, test, rates=(1e-7, 1e-1, 1e7))
    assert inner.rate == 1e-1
    assert not inner.edge
    assert not fast_probe(train, test, rates=(1e-2,)).edge


def test_a_diverged_head_is_not_chosen_and_leaves_the_others_alone():
    large = blobs(120, 1)
    train = {"x": Features(1e15 * large.features, np.zeros(120, np.int64) + (np.arange(120) < 12))}
    scores = fast_probe(train, train, rates=(1e-30, 1e30))
    assert scores.rate == 1e-30
    assert scores.held_out["x", 1e30] == 0.0
    alone = fast_probe(train, train, rates=(1e-30,))
    assert alone.held_out["x", 1e-30] == scores.held_out["x", 1e-30]


def test_equal_accuracies_go_to_the_lower_loss():
    train = {"x": blobs(120, 1, spread=0.05)}
    result = fast_probe(train, train, rates=(0.5, 1.0, 2.0))
    assert set(result.held_out.values()) == {1.0}
    assert result.rate == 2.0


def test_a_class_that_only_the_test_has_is_wrong():
    train, test = blobs(120, 1, 0.1), blobs(60, 2, 0.1)
    unknown = Features(test.features, np.where(test.labels == 3, 9, test.labels))
    result = fast_probe({"x": train}, {"x": unknown})
    assert result.accuracy == 0.75


def test_few_images_are_trained_on_long_enough():
    train = {"x": blobs(20, 1)}
    result = grid_probe(train, train, rates=(0.1,), batch=256, epochs=1, least_steps=40)
    assert "batch 16," in result.protocol  # what is left of 20 when 4 are held out
    assert "SGD 40 epochs" in result.protocol


def test_the_table_marks_the_choice():
    result = module.GridResult(
        0.5, "b", 0.1, {("a", 0.01): 0.5, ("b", 0.01): 0.25, ("a", 0.1): 0.0, ("b", 0.1): 1.0}, True, ""
    )
    lines = held_out_table(result).splitlines()
    assert lines[0].split() == ["rate", "a", "b"]
    assert [line.split() for line in lines[2:]] == [["0.01", "50.0", "25.0"], ["0.1", "0.0", "100.0*"]]
    # The columns' digits stand under each other.
    assert lines[2].index("25.0") + 1 == lines[3].index("100.0*") + 2


def test_digits_are_read_about_as_well_as_by_logistic_regression():
    pixels, labels = load_digits(return_X_y=True)
    train = Features(pixels[:1200].astype(np.float32), labels[:1200].astype(np.int64))
    test = Features(pixels[1200:].astype(np.float32), labels[1200:].astype(np.int64))
    scale = StandardScaler().fit(train.features)
    regression = LogisticRegression(max_iter=300).fit(scale.transform(train.features), train.labels)
    expected = regression.score(scale.transform(test.features), test.labels)
    result = grid_probe({"pixels": train}, {"pixels": test}, batch=128, epochs=1, least_steps=300, standardise=True)
    assert len(result.held_out) == len(RATES) == 13
    # 597 test images: 1.5 % are nine of them.
    assert abs(result.accuracy - expected) < 0.015
    assert result.accuracy > 0.88
