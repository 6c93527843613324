"""Pooling, heads and normalisation after pretraining, against MAE's definitions."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

from mae_et.models.classifier import Classifier, FrozenProbe, head_name, reset_head
from mae_et.models.encoder import Encoder
from mae_et.models.normalised import pixel_statistics
from mae_et.models.vit import ViTShape, build_vit

SHAPE = ViTShape((24, 32), 8, 3, width=16, depth=2, heads=2)


@pytest.mark.parametrize("size", [(24, 32), (16, 16), (48, 24)])
def test_mean_pooling_is_a_new_norm_of_the_mean_of_patches(size):
    """MAE's fine-tuning: the mean of patch tokens without the class token, a norm of its own, the head."""
    torch.manual_seed(0)
    net = build_vit(SHAPE, classes=5, pooling="mean").eval()
    images = torch.randn(3, 3, *size)
    tokens = net.forward_features(images)
    assert tokens.shape == (3, 1 + size[0] * size[1] // 64, 16)
    mean = tokens[:, 1:].mean(dim=1)
    centred = mean - mean.mean(dim=1, keepdim=True)
    normed = centred / (mean.var(dim=1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    expected = (normed * net.fc_norm.weight + net.fc_norm.bias) @ net.head.weight.T + net.head.bias
    # fp32 sums in another order
    torch.testing.assert_close(net(images), expected, atol=1e-5, rtol=1e-5)


def test_class_token_pooling_is_our_encoders():
    torch.manual_seed(0)
    encoder = Encoder((24, 32), 8, 3, 16, 2, 2).eval()
    net = build_vit(SHAPE, pooling="cls").eval()
    net.load_state_dict(encoder.state_dict())
    images = torch.randn(2, 3, 24, 32)
    torch.testing.assert_close(net(images), encoder(images)[:, 0], atol=1e-5, rtol=1e-5)


def test_drop_path_rises_to_its_maximum():
    net = build_vit(ViTShape((16, 16), 8, width=16, depth=5, heads=2), drop_path=0.2)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in net.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "caformer_s18", "vit_tiny_patch16_224"])
def test_the_last_layer_alone_is_drawn_anew(name):
    net = timm.create_model(name, num_classes=300)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    reset_head(net, 2e-5)
    changed = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    assert all(key.startswith(head_name(net)) for key in changed)
    weight = next(net.state_dict()[key] for key in changed if key.endswith("weight"))
    # A normal distribution cut at two deviations keeps 0.88 of its deviation; timm cuts at 2, which is never.
    assert weight.std().item() == pytest.approx(2e-5, rel=0.05)
    assert weight.shape[0] == 300


def test_pixels_are_normalised_inside():
    model = Classifier(torch.nn.Identity(), (0.5, 0.25, 0.0), (0.5, 0.5, 1.0))
    pixels = np.arange(12, dtype=np.uint8).reshape(1, 3, 2, 2) * 20
    expected = (pixels / 255 - np.array([0.5, 0.25, 0]).reshape(3, 1, 1)) / np.array([0.5, 0.5, 1]).reshape(3, 1, 1)
    np.testing.assert_allclose(model(torch.from_numpy(pixels)).numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(model(torch.from_numpy(pixels).float() / 255).numpy(), expected, atol=1e-6)
    assert not model.state_dict()


def test_seeds_decide_what_is_dropped_and_only_in_training():
    torch.manual_seed(0)
    net = build_vit(ViTShape((16, 16), 8, 3, width=16, depth=4, heads=2), classes=5, drop_path=0.7)
    names = list(net.state_dict())
    images, seeds = torch.rand(8, 3, 16, 16), torch.arange(8)
    plain = net.eval()((images - 0.5) / 0.25)
    model = Classifier(net, (0.5,) * 3, (0.25,) * 3)
    assert list(model.state_dict()) == [f"net.{name}" for name in names]
    assert torch.equal(model.eval()(images), plain)
    assert torch.equal(model(images, seeds), plain)
    dropped = model.train()(images, seeds)
    assert not torch.equal(dropped, plain)
    state = torch.get_rng_state()
    assert not torch.equal(model(images, seeds + 8), dropped)
    assert torch.equal(model(images, seeds), dropped)
    assert torch.equal(model(images), plain)
    assert torch.equal(torch.get_rng_state(), state)


def test_statistics():
    assert pixel_statistics(3)[0] == (0.485, 0.456, 0.406)
    assert pixel_statistics(1) == ((0.5,), (0.25,))
    assert pixel_statistics(1, [0.3], [0.1]) == ((0.3,), (0.1,))
    with pytest.raises(ValueError, match="one number for each of 1 channels"):
        pixel_statistics(1, [0.3, 0.2], [0.1, 0.1])


def test_a_probe_normalises_features_and_trains_its_head_alone():
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Dropout(0.9), torch.nn.BatchNorm1d(6))
    probe = FrozenProbe(net, lambda network, images: network(images), 6, 3).train()
    features = torch.randn(32, 4)
    assert not net.training
    assert [name for name, p in probe.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    embedded = net(features).double()
    spread = (embedded.var(dim=0, unbiased=False) + 1e-6).sqrt()
    expected = (embedded - embedded.mean(dim=0)) / spread @ probe.head.weight.double().T
    torch.testing.assert_close(probe(features).double(), expected, atol=1e-5, rtol=1e-5)
    assert net[2].num_batches_tracked.item() == 0
