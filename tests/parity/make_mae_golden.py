"""Makes data/mae_golden.json: losses and predictions of MAE (arXiv 2111.06377) by the arithmetic of its official code.

    python tests/parity/make_mae_golden.py

An independent rewrite in NumPy and float64 that follows facebookresearch/mae step by step where `mae_et` goes another
way: all patches are embedded and get their position before any is dropped, the decoder puts mask tokens among the
encoded ones and brings them into picture order, predicts every patch, and the loss is weighted with the mask.

Weights, images and noise come from splitmix64 (Steele, Lea, Flood 2014), one stream per name, seeded with the name's
CRC-32, so that any language can make them again. The names are those of `MaskedAutoencoder`'s state dict.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

GOLDEN = Path(__file__).parent / "data" / "mae_golden.json"
TARGETS = ("pixel", "norm_pixel", "hog")

CHANNELS, PATCH, CELL, BINS = 3, 4, 2, 9
WIDTH, DEPTH, HEADS = 24, 3, 3
DECODER_WIDTH, DECODER_DEPTH, DECODER_HEADS = 16, 2, 2
BATCH, MASK_RATIO = 3, 0.75
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# (rows, columns) of patches; a quarter of 25 or of 21 is no whole number.
GRIDS = {"square": (5, 5), "rectangle": (3, 7)}

Weights = dict[str, np.ndarray]


class Result(NamedTuple):
    """Loss, predictions for all patches [N, L, values], and the mask [N, L], 1 where a patch was removed."""

    loss: float
    prediction: np.ndarray
    mask: np.ndarray


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [0, 1), multiples of 2^-24: the high bits of the stream of a name."""
    counter = np.arange(1, math.prod(shape) + 1, dtype=np.uint64)
    z = np.uint64(zlib.crc32(name.encode())) + counter * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(40)).astype(np.float64).reshape(shape) / 2**24


def parameter(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight with variance 1 / inputs (gains around 1, biases and tokens of size 1/4), exact in float32."""
    spread = uniform(name, shape) * 2 - 1
    if len(shape) in (2, 4):
        value = spread * math.sqrt(3 / math.prod(shape[1:]))
    else:
        value = spread / 4 + (1 if "norm" in name and name.endswith("weight") else 0)
    return value.astype(np.float32).astype(np.float64)


def make_weights(target: str) -> Weights:
    """All parameters of the model for a target, by their names in the state dict."""
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.patch_embed.proj.weight": (WIDTH, CHANNELS, PATCH, PATCH),
        "encoder.cls_token": (1, 1, WIDTH),
        "decoder.mask_token": (1, 1, DECODER_WIDTH),
        "decoder.embed.weight": (DECODER_WIDTH, WIDTH),
        "decoder.head.weight": (CHANNELS * (BINS * 4 if target == "hog" else PATCH**2), DECODER_WIDTH),
    }
    for part, width, depth in (("encoder", WIDTH, DEPTH), ("decoder", DECODER_WIDTH, DECODER_DEPTH)):
        shapes[f"{part}.norm.weight"] = (width,)
        for block in (f"{part}.blocks.{i}" for i in range(depth)):
            shapes |= {f"{block}.norm{i}.weight": (width,) for i in (1, 2)}
            shapes |= {f"{block}.attn.qkv.weight": (3 * width, width), f"{block}.attn.proj.weight": (width, width)}
            shapes |= {f"{block}.mlp.fc1.weight": (4 * width, width), f"{block}.mlp.fc2.weight": (width, 4 * width)}
    for name, shape in list(shapes.items()):
        if name.endswith("weight"):
            shapes[name.removesuffix("weight") + "bias"] = shape[:1]
    return {name: parameter(name, shape) for name, shape in shapes.items()}


def make_images(case: str) -> np.ndarray:
    """uint8 [N, C, H, W]: noise, with one flat patch and one that rises to the right in every image."""
    rows, columns = GRIDS[case]
    shape = (BATCH, CHANNELS, rows * PATCH, columns * PATCH)
    images = np.floor(uniform(f"images {case}", shape) * 256).astype(np.uint8)
    images[:, :, :PATCH, PATCH : 2 * PATCH] = 77
    images[:, :, PATCH : 2 * PATCH, :PATCH] = 30 * np.arange(PATCH, dtype=np.uint8)
    return images


def standardise(images: np.ndarray) -> np.ndarray:
    """What the encoder sees, rounded to float32 so that both implementations start from the same numbers."""
    mean, std = (np.array(values).reshape(-1, 1, 1) for values in (MEAN, STD))
    return ((images / 255 - mean) / std).astype(np.float32)


def make_noise(case: str) -> np.ndarray:
    """[N, L] without ties."""
    return uniform(f"noise {case}", (BATCH, GRIDS[case][0] * GRIDS[case][1]))


def positions(grid: tuple[int, int], width: int) -> np.ndarray:
    """Sin-cos of the column in the first half of the channels, of the row in the second; zeros for the class token."""
    frequencies = 10000.0 ** -(np.arange(width // 4) / (width // 4))
    halves = []
    for coordinate in reversed(np.indices(grid)):
        angles = coordinate.reshape(-1, 1) * frequencies
        halves += [np.sin(angles), np.cos(angles)]
    return np.concatenate([np.zeros((1, width)), np.concatenate(halves, axis=1)])


def layer_norm(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def attention(x: np.ndarray, weights: Weights, name: str, heads: int) -> np.ndarray:
    n, tokens, width = x.shape
    size = width // heads
    qkv = linear(x, weights, f"{name}.qkv").reshape(n, tokens, 3, heads, size)
    query, key, value = (qkv[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
    scores = query @ key.transpose(0, 1, 3, 2) / math.sqrt(size)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    mixed = (shares @ value).transpose(0, 2, 1, 3).reshape(n, tokens, width)
    return linear(mixed, weights, f"{name}.proj")


def transformer(x: np.ndarray, weights: Weights, part: str, depth: int, heads: int) -> np.ndarray:
    for block in (f"{part}.blocks.{i}" for i in range(depth)):
        x = x + attention(layer_norm(x, weights, f"{block}.norm1"), weights, f"{block}.attn", heads)
        hidden = gelu(linear(layer_norm(x, weights, f"{block}.norm2"), weights, f"{block}.mlp.fc1"))
        x = x + linear(hidden, weights, f"{block}.mlp.fc2")
    return layer_norm(x, weights, f"{part}.norm")


def cut(images: np.ndarray, order: str) -> np.ndarray:
    """[N, C, H, W] to patches row by row [N, L, values], their values in an order such as "pqc"."""
    n, c, height, width = images.shape
    parts = images.reshape(n, c, height // PATCH, PATCH, width // PATCH, PATCH)
    return np.einsum(f"nchpwq->nhw{order}", parts).reshape(n, -1, c * PATCH**2)


def encode(inputs: np.ndarray, noise: np.ndarray, weights: Weights) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features [N, 1 + V, D] of the class token and visible patches, the mask [N, L], and the way back [N, L]."""
    n, tokens = noise.shape
    visible = int(tokens * (1 - MASK_RATIO))
    grid = (inputs.shape[2] // PATCH, inputs.shape[3] // PATCH)
    place = positions(grid, WIDTH)
    kernel = weights["encoder.patch_embed.proj.weight"].reshape(WIDTH, -1)
    x = cut(inputs.astype(np.float64), "cpq") @ kernel.T + weights["encoder.patch_embed.proj.bias"] + place[1:]
    shuffle = np.argsort(noise, axis=1)
    restore = np.argsort(shuffle, axis=1)
    x = np.take_along_axis(x, shuffle[:, :visible, None], axis=1)
    mask = np.take_along_axis(np.repeat(np.arange(tokens)[None] >= visible, n, axis=0).astype(float), restore, axis=1)
    first = np.repeat(weights["encoder.cls_token"] + place[:1], n, axis=0)
    x = transformer(np.concatenate([first, x], axis=1), weights, "encoder", DEPTH, HEADS)
    return x, mask, restore


def decode(x: np.ndarray, restore: np.ndarray, grid: tuple[int, int], weights: Weights) -> np.ndarray:
    """Predictions [N, L, values] of all patches, in picture order."""
    x = linear(x, weights, "decoder.embed")
    n, tokens = restore.shape
    missing = np.broadcast_to(weights["decoder.mask_token"], (n, tokens + 1 - x.shape[1], DECODER_WIDTH))
    patches = np.take_along_axis(np.concatenate([x[:, 1:], missing], axis=1), restore[:, :, None], axis=1)
    x = np.concatenate([x[:, :1], patches], axis=1) + positions(grid, DECODER_WIDTH)
    x = transformer(x, weights, "decoder", DECODER_DEPTH, DECODER_HEADS)
    return linear(x, weights, "decoder.head")[:, 1:]


def hog(images: np.ndarray) -> np.ndarray:
    """MaskFeat's histograms [N, L, C * bins * cells] of 8-bit images, in float64."""
    x = np.pad(images.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    smooth_rows = x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]
    smooth_columns = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    gx = smooth_rows[..., :-2] - smooth_rows[..., 2:]
    gy = smooth_columns[:, :, :-2] - smooth_columns[:, :, 2:]
    index = np.floor(BINS * np.arctan2(gx, gy) / np.pi).astype(int) % BINS
    image, channel, row, column = np.indices(images.shape)
    n, c, height, width = images.shape
    cells = np.zeros((n, c, BINS, height // CELL, width // CELL))
    np.add.at(cells, (image, channel, index, row // CELL, column // CELL), np.hypot(gx, gy))
    cells /= np.maximum(np.sqrt((cells**2).sum(axis=2, keepdims=True)), 1e-12)
    k = PATCH // CELL
    parts = cells.reshape(n, c, BINS, height // PATCH, k, width // PATCH, k)
    return np.einsum("ncbhiwj->nhwcbij", parts).reshape(n, -1, c * BINS * k * k)


def make_target(kind: str, images: np.ndarray) -> np.ndarray:
    if kind == "hog":
        return hog(images)
    patches = cut(standardise(images).astype(np.float64), "pqc")
    if kind == "pixel":
        return patches
    spread = patches.var(axis=-1, ddof=1, keepdims=True)
    return (patches - patches.mean(axis=-1, keepdims=True)) / np.sqrt(spread + 1e-6)


def run(case: str, target: str) -> Result:
    """One forward pass."""
    images, weights = make_images(case), make_weights(target)
    x, mask, restore = encode(standardise(images), make_noise(case), weights)
    prediction = decode(x, restore, GRIDS[case], weights)
    per_patch = ((prediction - make_target(target, images)) ** 2).mean(axis=-1)
    return Result(float((per_patch * mask).sum() / mask.sum()), prediction, mask)


def summary(result: Result) -> dict[str, object]:
    """What is stored: the loss, the removed patches, and the first values predicted for four of them per image."""
    removed = [np.flatnonzero(row) for row in result.mask]
    samples = [(n, int(patch)) for n, patches in enumerate(removed) for patch in patches[[0, 5, 10, -1]]]
    return {
        "loss": result.loss,
        "masked": [patches.tolist() for patches in removed],
        "predictions": [
            {"image": n, "patch": patch, "values": result.prediction[n, patch, :6].tolist()} for n, patch in samples
        ],
    }


def make_golden() -> dict[str, dict[str, dict[str, object]]]:
    """The content of the golden file: by case, by target."""
    return {case: {target: summary(run(case, target)) for target in TARGETS} for case in GRIDS}


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(make_golden()) + "\n")
