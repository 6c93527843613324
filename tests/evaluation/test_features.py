"""Features of a labelled set: one kind or several, and what a network's last blocks hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from mae_et.evaluation.features import Features, extract_features, linear_kinds, stream_features, vit_features
from mae_et.models.vit import ViTShape, build_vit


class Colours:
    """Eleven images of one colour each, 10 times their number."""

    name, channels = "colours", 3
    classes: tuple[str, ...] = ("even", "odd")

    def __init__(self, unlabelled: int | None = None):
        self.labels = np.arange(11, dtype=np.int32) % 2
        if unlabelled is not None:
            self.labels[unlabelled] = -1

    def __len__(self) -> int:
        return 11

    def image(self, i: int) -> torch.Tensor:
        return torch.full((3, 9, 7), 10 * i, dtype=torch.uint8)

    def label(self, i: int) -> int:
        return int(self.labels[i])

    def describe(self, i: int) -> str:
        return f"colour #{i}"


def mean_colour(images: torch.Tensor) -> torch.Tensor:
    return images.double().mean(dim=(2, 3))


def test_features_and_labels_keep_their_order():
    indices = [1, 2, 5, 8, 10]
    found = extract_features(mean_colour, Colours(), indices, (4, 4), batch=2)
    np.testing.assert_array_equal(found.features, 10.0 * np.array(indices)[:, None].repeat(3, axis=1))
    np.testing.assert_array_equal(found.labels, [1, 0, 1, 0, 0])
    assert found.features.dtype == np.float32
    assert found.labels.dtype == np.int64


def test_several_kinds_come_from_one_pass():
    sizes = []

    def embed(images):
        sizes.append(len(images))
        return {"mean": mean_colour(images), "red": mean_colour(images)[:, :1] / 10}

    found = extract_features(embed, Colours(), list(range(11)), (4, 4), batch=4)
    assert sizes == [4, 4, 3]
    assert list(found) == ["mean", "red"]
    assert found["mean"].features.shape == (11, 3)
    np.testing.assert_array_equal(found["red"].features[:, 0], np.arange(11))
    np.testing.assert_array_equal(found["red"].labels, np.arange(11) % 2)


def test_a_stream_makes_one_batch_at_a_time():
    made = []

    def embed(images):
        made.append(len(images))
        return mean_colour(images)

    stream = stream_features(embed, Colours(), list(range(11)), (4, 4), batch=4)
    first = next(stream)
    assert isinstance(first, Features)
    assert made == [4]
    assert [len(part.labels) for part in stream] == [4, 3]


def test_an_image_without_a_label_is_named():
    with pytest.raises(ValueError, match="no label for colour #6"):
        extract_features(mean_colour, Colours(unlabelled=6), [1, 3, 5, 6, 7], (4, 4), batch=2)


SHAPE = {"size": (8, 8), "patch_size": 4, "width": 16, "depth": 3, "heads": 2}


def lively(net: VisionTransformer) -> VisionTransformer:
    """Random parameters everywhere, so that no norm or bias is neutral."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return net.eval()


def blocks_by_hand(net: VisionTransformer, images: torch.Tensor) -> list[torch.Tensor]:
    """Tokens after each block, by hooks on the whole network's own forward."""
    seen: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        seen.append(output)

    hooks = [block.register_forward_hook(keep) for block in net.blocks]
    net(images)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("layers", [1, 3])
@torch.no_grad()
def test_tokens_of_the_last_blocks_pass_the_nets_norm(pooling, layers):
    net = lively(build_vit(ViTShape(**SHAPE), pooling=pooling))
    images = torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(1))
    found = vit_features(net, images, layers)
    assert set(found) == {f"{kind}[-{i}]" for kind in ("cls", "mean") for i in range(1, layers + 1)}
    norm = net.fc_norm if pooling == "mean" else net.norm
    assert isinstance(norm, torch.nn.LayerNorm)
    for i in range(1, layers + 1):
        tokens = blocks_by_hand(net, images)[-i]
        # The same operations in fp32 on other shapes: some units in the last place of values near 1.
        torch.testing.assert_close(found[f"cls[-{i}]"], norm(tokens[:, 0]), rtol=0, atol=1e-5)
        mean = norm(tokens[:, 1:].mean(dim=1)) if pooling == "mean" else norm(tokens[:, 1:]).mean(dim=1)
        torch.testing.assert_close(found[f"mean[-{i}]"], mean, rtol=0, atol=1e-5)
    seen_by_head = net.forward_head(net.forward_features(images), pre_logits=True)
    torch.testing.assert_close(found["mean[-1]" if pooling == "mean" else "cls[-1]"], seen_by_head, rtol=0, atol=1e-5)


@pytest.mark.parametrize("registers", [0, 2])
@torch.no_grad()
def test_without_a_class_token_there_are_means_alone(registers):
    net = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=0,
        class_token=False, reg_tokens=registers, global_pool="avg",
    )  # fmt: skip
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    lively(net)
    found = vit_features(net, images, 2)
    assert list(found) == ["mean[-2]", "mean[-1]"]
    torch.testing.assert_close(found["mean[-1]"], net(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet10t", "test_convnext"])
@torch.no_grad()
def test_other_models_give_what_their_classifier_sees(name):
    net: Any = timm.create_model(name, num_classes=5).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found = vit_features(net, images)
    assert list(found) == ["pooled"]
    assert found["pooled"].shape == (2, net.num_features)
    torch.testing.assert_close(net.get_classifier()(found["pooled"]), net(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layers", [0, 4])
def test_a_net_has_only_so_many_blocks(layers):
    with pytest.raises(ValueError, match="the network has 3 blocks"):
        vit_features(build_vit(ViTShape(**SHAPE)), torch.zeros(1, 3, 8, 8), layers)


def test_a_linear_probe_sees_what_dinov2s_does():
    names = [f"{kind}[-{i}]" for i in (4, 3, 2, 1) for kind in ("cls", "mean")]
    tokens = ("cls[-4]", "cls[-3]", "cls[-2]", "cls[-1]")
    assert linear_kinds(names) == {
        "cls1": ("cls[-1]",),
        "cls1+mean": ("cls[-1]", "mean[-1]"),
        "cls4": tokens,
        "cls4+mean": (*tokens, "mean[-1]"),
    }
    assert list(linear_kinds(["cls[-1]", "mean[-1]"])) == ["cls1", "cls1+mean"]
    assert linear_kinds(["mean[-2]", "mean[-1]"]) == {"mean1": ("mean[-1]",), "mean2": ("mean[-2]", "mean[-1]")}
    assert linear_kinds(["pooled"]) == {"pooled": ("pooled",)}
