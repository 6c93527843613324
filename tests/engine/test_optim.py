"""Groups of parameters and optimizers against MAE's formulas, and their trips through a checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mae_et.engine.optim import (
    OptimizerSettings,
    build_optimizer,
    decay_groups,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rate,
    supervised_groups,
)
from mae_et.models.backbones import build_backbone
from mae_et.models.vit import ViTShape, build_vit


def rates_and_decays(net: nn.Module, groups) -> dict[str, tuple[float, float]]:
    """Parameter name -> (scale of its learning rate, weight decay)."""
    names = {parameter: name for name, parameter in net.named_parameters()}
    return {names[p]: (group.get("lr_scale", 1.0), group["weight_decay"]) for group in groups for p in group["params"]}


def mae_layer(name: str, depth: int) -> int:
    """The layer of a parameter by MAE's rule (methods: id 0 for embeddings, i + 1 for block i, depth + 1 after)."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks") else depth + 1


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize(("depth", "decay"), [(1, 0.65), (3, 0.65), (12, 0.75)])
def test_layer_decay_is_maes(depth, decay, pooling):
    net = build_vit(ViTShape((16, 16), 4, width=16, depth=depth, heads=2), classes=5, pooling=pooling)
    found = rates_and_decays(net, supervised_groups(net, 0.05, decay))
    assert set(found) == {name for name, _ in net.named_parameters()}
    for name, parameter in net.named_parameters():
        scale, weight_decay = found[name]
        assert scale == pytest.approx(decay ** (depth + 1 - mae_layer(name, depth)), rel=1e-12), name
        spared = parameter.ndim == 1 or name in ("pos_embed", "cls_token")
        assert weight_decay == (0.0 if spared else 0.05), name


def test_without_layer_decay_all_learn_alike():
    net = build_vit(ViTShape((16, 16), 4, width=16, depth=2, heads=2), classes=5)
    found = rates_and_decays(net, supervised_groups(net, 0.1, None))
    assert {scale for scale, _ in found.values()} == {1.0}
    assert found["pos_embed"][1] == found["blocks.0.norm1.weight"][1] == found["head.bias"][1] == 0.0
    assert found["head.weight"][1] == found["blocks.1.mlp.fc1.weight"][1] == 0.1


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224", "caformer_s18"])
def test_layer_decay_of_other_networks_rises_towards_the_head(name):
    with torch.device("meta"):
        net = build_backbone(name, classes=5, size=(224, 224), channels=3, drop_path=0.0, arguments={})
    groups = supervised_groups(net, 0.05, 0.9)
    found = rates_and_decays(net, groups)
    scales = [found[parameter][0] for parameter, _ in net.named_parameters()]
    assert scales[0] == min(scales) < 0.9
    assert scales[-1] == max(scales) == 1.0
    assert len(set(scales)) > 3


def test_frozen_parameters_are_in_no_group():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    net[0].requires_grad_(False)
    assert sum(len(group["params"]) for group in decay_groups(net, 0.1)) == 2


def test_rates_are_set_to_scale():
    parameters = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    groups = [{"params": [parameters[0]], "lr_scale": 0.25}, {"params": [parameters[1]]}]
    optimizer = build_optimizer(groups, OptimizerSettings("sgd", momentum=0.0))
    set_learning_rate(optimizer, 0.4)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.4]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lars_is_maes(weight_decay):
    """g += wd * p; g *= 0.001 |p| / |g| for matrices; m = 0.9 m + g; p -= lr * m. In float64, over ten steps.

    With weight decay timm's trust ratio divides by |g| + wd |p| where MAE divides by |g + wd p|: MAE probes without
    any, so equality is asked for there, and elsewhere only that vectors do not decay.
    """
    generator = np.random.default_rng(0)
    matrix, vector = generator.normal(size=(4, 3)), generator.normal(size=4)
    weight, bias = (nn.Parameter(torch.tensor(values)) for values in (matrix.copy(), vector.copy()))
    groups = [{"params": [weight, bias], "weight_decay": weight_decay}]
    optimizer = build_optimizer(groups, OptimizerSettings("lars", momentum=0.9))
    momenta = [np.zeros_like(matrix), np.zeros_like(vector)]
    for step in range(10):
        rate = 0.5 / (step + 1)
        gradients = [generator.normal(size=(4, 3)), generator.normal(size=4)]
        weight.grad, bias.grad = (torch.tensor(gradient) for gradient in gradients)
        set_learning_rate(optimizer, rate)
        optimizer.step()
        adapted = gradients[0] * 0.001 * np.linalg.norm(matrix) / np.linalg.norm(gradients[0])
        momenta = [0.9 * momenta[0] + adapted, 0.9 * momenta[1] + gradients[1]]
        matrix, vector = matrix - rate * momenta[0], vector - rate * momenta[1]
        # timm adds 1e-8 to the divisor, of norms near 3: 3e-9 relative.
        np.testing.assert_allclose(bias.detach().numpy(), vector, rtol=1e-12)
        if weight_decay == 0:
            np.testing.assert_allclose(weight.detach().numpy(), matrix, rtol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "lamb", "lars", "sgd"])
def test_a_restored_optimizer_goes_on_to_the_bit(name):
    def train(net: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            set_learning_rate(optimizer, 0.1 / (step + 1))
            net(torch.full((2, 3), float(step))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        return net, build_optimizer(decay_groups(net, 0.1), OptimizerSettings(name))

    net, optimizer = fresh()
    train(net, optimizer, 0, 4)
    saved = {key: value.clone() for key, value in optimizer_tensors(net, optimizer).items()}
    model = {key: value.clone() for key, value in net.state_dict().items()}
    train(net, optimizer, 4, 8)
    again, other = fresh()
    again.load_state_dict(model)
    restore_optimizer(again, other, saved)
    train(again, other, 4, 8)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))
    with pytest.raises(ValueError, match="holds 'nobody', which the model has not"):
        restore_optimizer(again, other, {"nobody.momentum_buffer": torch.zeros(1)})


def test_unknown_optimizers_are_refused():
    with pytest.raises(ValueError, match="unknown optimizer 'adam'; known: adamw, lamb, lars, sgd"):
        build_optimizer([{"params": [nn.Parameter(torch.ones(1))]}], OptimizerSettings("adam"))
