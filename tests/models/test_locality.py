"""Feed-forward layers with a convolution: their numbers, the grids that reach them, and all else as in timm."""

from __future__ import annotations

import copy
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from mae_et.engine.optim import layer_ids
from mae_et.models.backbones import build_backbone, check_sizes, multiply_adds
from mae_et.models.locality import LocalBlock, LocalFeedForward, add_locality
from mae_et.models.vit import ViTShape, build_vit

SHAPE = ViTShape((24, 32), 8, 3, width=16, depth=2, heads=2)
LOCAL = ViTShape((24, 32), 8, 3, width=16, depth=2, heads=2, locality=True)
SIZES = [(24, 32), (32, 24), (8, 64), (64, 8), (16, 16), (8, 8)]


def h_swish(x: np.ndarray) -> np.ndarray:
    return x * np.clip(x + 3, 0, 6) / 6


def reference(tokens: np.ndarray, prefix: int, grid: tuple[int, int], layer: LocalFeedForward) -> np.ndarray:
    """The layer in fp64, token by token and neighbour by neighbour."""
    first, kernel, last = (p.detach().numpy() for p in (layer.fc1.weight, layer.conv.weight, layer.fc2.weight))
    output = np.zeros_like(tokens)
    for n, image in enumerate(tokens):
        hidden = h_swish(image[prefix:] @ first.T).reshape(*grid, -1)
        for row in range(grid[0]):
            for column in range(grid[1]):
                total = np.zeros(hidden.shape[-1])
                for i in (-1, 0, 1):
                    for j in (-1, 0, 1):
                        if 0 <= row + i < grid[0] and 0 <= column + j < grid[1]:
                            total += kernel[:, 0, 1 + i, 1 + j] * hidden[row + i, column + j]
                output[n, prefix + row * grid[1] + column] = last @ h_swish(total)
    return output


def set_lively(net: torch.nn.Module) -> Any:
    """Weights large enough that every part shows in the output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return net.eval()


def pixels(size: tuple[int, int], count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(size[0]))


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (4, 1), (3, 4), (4, 3), (7, 7)])
@pytest.mark.parametrize(("count", "prefix"), [(1, 1), (3, 0), (2, 5)])
def test_the_layer_computes_what_its_definition_says(grid, count, prefix):
    torch.manual_seed(grid[0] * 8 + grid[1])
    layer = set_lively(LocalFeedForward(6, 20, prefix).double())
    tokens = 4 * torch.randn(count, prefix + grid[0] * grid[1], 6, dtype=torch.float64)
    with torch.no_grad():
        found = layer(tokens, grid).numpy()
    # Both in fp64, of values of some tens; sums of at most 20 products in other orders.
    np.testing.assert_allclose(found, reference(tokens.numpy(), prefix, grid, layer), rtol=0, atol=1e-12)
    assert not found[:, :prefix].any()


def test_the_first_weights():
    torch.manual_seed(0)
    layer = LocalFeedForward(64, 256, 1)
    for weight in (layer.fc1.weight, layer.fc2.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)  # 16,384 numbers tell a deviation to 1 %
    assert 0.32 < layer.conv.weight.abs().max().item() <= 1 / 3
    assert not [name for name, _ in layer.named_parameters() if "bias" in name]


def test_everything_else_is_timms():
    """The same tensors from the same seed; and the same outputs, to the bit, where feed-forward layers give nothing."""
    nets: list[Any] = []
    for shape in (SHAPE, LOCAL):
        torch.manual_seed(3)
        nets.append(build_vit(shape, classes=5).eval())
    plain, local = (net.state_dict() for net in nets)
    assert {name for name in plain if ".mlp." not in name} == {name for name in local if ".mlp." not in name}
    assert all(torch.equal(plain[name], local[name]) for name in plain if ".mlp." not in name and "head" not in name)
    nets[1].load_state_dict({**local, **{name: plain[name] for name in plain if ".mlp." not in name}})
    different = [net(pixels((24, 32))) for net in nets]
    assert not torch.equal(*different)
    for net in nets:
        for block in net.blocks:
            for parameter in block.mlp.fc2.parameters():
                parameter.data.zero_()
    for size in SIZES:
        assert torch.equal(nets[0](pixels(size)), nets[1](pixels(size)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["vit", "deit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_each_layer_is_given_the_grid_of_the_images(name, size):
    """By a network of the final size, for images of another; timm's own with and without register tokens."""
    if name == "vit":
        net = set_lively(build_vit(LOCAL, classes=5))
    else:
        arguments = {"depth": 2, "embed_dim": 12, "num_heads": 2, "patch_size": 8}
        net = set_lively(
            add_locality(build_backbone(name, classes=5, size=(24, 32), channels=3, drop_path=0.0, arguments=arguments))
        )
    seen = []
    for block in net.blocks:
        block.mlp.register_forward_hook(lambda layer, given, output: seen.append((layer, *given, output)))
    with torch.no_grad():
        net(pixels(size))
    assert len(seen) == 2
    for layer, tokens, grid, output in seen:
        assert grid == (size[0] // 8, size[1] // 8)
        expected = reference(tokens.double().numpy(), net.num_prefix_tokens, grid, layer)
        # fp32 against fp64 on values around 1.
        np.testing.assert_allclose(output.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_networks_of_one_size():
    """timm's patch embedding flattens its output where the network takes one size alone."""
    net = add_locality(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=(32, 64)))
    net(torch.zeros(1, 3, 32, 64))
    assert cast(LocalBlock, net.blocks[0]).grid.size == (2, 4)


def test_features_by_layer_are_those_of_the_forward_pass():
    net = set_lively(build_vit(LOCAL, classes=0))
    images = pixels((8, 64))
    found: Any = net.forward_intermediates(images, 1, intermediates_only=True, output_fmt="NLC", norm=True)
    assert torch.equal(found[0], net.forward_features(images)[:, 1:])


def test_a_copy_has_its_own_grid():
    net = build_vit(LOCAL)
    net(pixels((24, 32)))
    other: Any = copy.deepcopy(net)
    other(pixels((8, 64)))
    grids = [cast(LocalBlock, block).grid for block in (*net.blocks, *other.blocks)]
    assert [grid.size for grid in grids] == [(3, 4), (3, 4), (1, 8), (1, 8)]


def test_recomputed_activations_give_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        net = set_lively(build_vit(LOCAL, classes=5)).train()
        net.set_grad_checkpointing(recompute)
        net(pixels((16, 24))).square().sum().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients))


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own affairs
def test_one_compiled_graph_serves_all_grids():
    """Otherwise torch gives up compiling after eight sizes; one row of patches is a case of its own."""
    torch._dynamo.reset()
    graphs = []

    def as_it_is(graph, _examples):
        graphs.append(graph)
        return graph.forward

    plain = set_lively(build_vit(LOCAL, classes=5))
    compiled = copy.deepcopy(plain)
    for block in compiled.blocks:
        block.compile(dynamic=True, backend=as_it_is)
    counts = []
    for side in range(16, 112, 8):
        images = pixels((side, side + 8))
        with torch.no_grad():
            # The same operations on the same numbers.
            assert torch.equal(compiled(images), plain(images))
        counts.append(len(graphs))
    assert counts[-1] == counts[1] > 0
    assert counts[-1] <= 4
    torch._dynamo.reset()


@pytest.mark.parametrize("size", [(96, 96), (64, 160), (224, 224)])
def test_multiply_adds_hold_the_convolution(size):
    with torch.device("meta"):
        plain, local = (
            build_vit(ViTShape((224, 224), width=48, heads=3, depth=3, locality=locality)) for locality in (False, True)
        )
    patches = size[0] * size[1] // 256
    # Nine products a hidden number of a patch; none of the class token's.
    more = 3 * (patches * 9 * 192 - 2 * 48 * 192)
    assert multiply_adds(local, [size], 3)[size] == multiply_adds(plain, [size], 3)[size] + more


def test_sizes_are_tried_without_data():
    with torch.device("meta"):
        net = build_vit(LOCAL, classes=5)
    check_sizes(net, SIZES, 3)
    with pytest.raises(ValueError, match="cannot take B=20"):
        check_sizes(net, [(20, 20)], 3)


def test_layers_of_the_optimizer():
    layers = layer_ids(build_vit(LOCAL, classes=5))
    new = {name: layer for name, layer in layers.items() if ".mlp." in name}
    assert new == {f"blocks.{i}.mlp.{part}.weight": i + 1 for i in (0, 1) for part in ("fc1", "conv", "fc2")}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet18", {}, "this is a ResNet, leave it out"),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1)}, "this is a SwinTransformer"),
        ("deit_tiny_distilled_patch16_224", {"depth": 1}, "this is a VisionTransformerDistilled"),
        ("vit_tiny_patch16_224", {"depth": 1, "patch_drop_rate": 0.5}, "neither with patch_drop_rate"),
        ("vit_tiny_patch16_224", {"depth": 1, "scale_mlp_norm": True}, "nor with scale_mlp_norm"),
        ("vit_base_patch16_rpn_224", {"depth": 1, "embed_dim": 24}, "feed-forward layers of a plain ViT"),
    ],
)
def test_other_networks_are_refused(name, arguments, message):
    with torch.device("meta"):
        net = timm.create_model(name, **arguments)
    with pytest.raises(ValueError, match=message):
        add_locality(net)


def test_locality_is_added_once():
    net = build_vit(LOCAL)
    assert type(net) is VisionTransformer
    with pytest.raises(ValueError, match="plain ViT"):
        add_locality(net)
