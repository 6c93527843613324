"""How alike what two runs have learned is, checkpoint by checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from mae_et.config import ConfigError, PretrainConfig
from mae_et.curriculum.table import write_csv
from mae_et.data.loader import RequestDataset, batches_of, build_loader
from mae_et.data.sources import Source, available_splits
from mae_et.data.transforms import EvalTransform
from mae_et.evaluation.features import InOrder, subset_indices, vit_features
from mae_et.evaluation.similarity import cka_table
from mae_et.labelled import open_labelled
from mae_et.pretraining import build_source
from mae_et.running import prepare_device
from mae_et.studies.runs import (
    Kept,
    Network,
    StudiedRun,
    file_name,
    network_channels,
    open_encoder,
    open_runs,
    results_folder,
)
from mae_et.tracking.studies import SimilarityMap, similarity_picture

COLUMNS = ("first", "first_step", "first_compute", "second", "second_step", "second_compute", "block", "cka", "images")
BATCH = 256


def similarity(
    runs: Sequence[str | Path],
    blocks: str = "last",
    checkpoints: str = "all",
    images: int | None = 1000,
    folder: str | Path | None = None,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> list[SimilarityMap]:
    """Linear CKA between the features of runs for all pairs of their checkpoints.

    Writes `similarity.csv`, and `similarity-<first>-<second>.png` for every two runs; a single run is compared with
    itself. Features are the mean over the patches of a ViT's block, behind the network's own final norm, or the pooled
    features of other networks. All runs see the same images: the first run's test images, or what it has of others,
    each at its own final size.

    Args:
        runs: their folders.
        blocks: "last", or "all": each block of one ViT with the same of the other.
        checkpoints: "all" in each run's folder, or the "last".
        images: how many; None takes all.
        folder: of the results; None is `studies/` of the first run.
        overrides: `key=value` changes to the runs' configurations, such as data.root.
        say: where announcements go.

    Raises:
        ConfigError: a folder without a run or checkpoint, or blocks that have no counterpart.

    Source: EfficientTrain++ (arXiv 2405.08768), Figure 6; CKA: Kornblith et al. 2019 (arXiv 1905.00414).
    """
    studied = open_runs(runs, overrides)
    prepare_device(studied[0].config)
    kept = {run.name: run.checkpoints(checkpoints) for run in studied}
    source_of = cache(partial(_images, studied[0]))  # by channels: opening a set may take seconds
    features = {}
    for run in studied:
        source = source_of(network_channels(run))
        features[run.name] = [
            _features(open_encoder(run, checkpoint), source, studied[0], blocks, images)
            for checkpoint in kept[run.name]
        ]
        say(f"{run.name}: {len(kept[run.name])} checkpoints, {_describe(features[run.name][0])}")
    target = results_folder(folder, studied)
    maps, rows = [], []
    pairs = list(itertools.combinations(studied, 2)) or [(studied[0], studied[0])]
    for first, second in pairs:
        found = _maps(first.name, second.name, kept, features)
        similarity_picture(found, target / f"similarity-{file_name(first)}-{file_name(second)}.png")
        rows += [row for drawn in found for row in _rows(drawn, kept, features)]
        ends = ", ".join(f"{drawn.block}: {drawn.values[-1, -1]:.3f}" for drawn in found)
        say(f"{first.name} and {second.name}, CKA of their last checkpoints: {ends}")
        maps += found
    write_csv(target / "similarity.csv", COLUMNS, rows)
    say(f"everything is in {target}")
    return maps


Blocks = dict[str, np.ndarray]


def _maps(
    first: str, second: str, kept: dict[str, list[Kept]], features: dict[str, list[Blocks]]
) -> list[SimilarityMap]:
    """One map a block of two runs."""
    blocks, others = (list(features[name][0]) for name in (first, second))
    if len(blocks) != len(others):
        raise ConfigError(
            f"{first} has {len(blocks)} blocks and {second} {len(others)}: compare their last ones, with --blocks last"
        )
    rows, columns = ([checkpoint.compute for checkpoint in kept[name]] for name in (first, second))
    maps = []
    for block, other in zip(blocks, others):
        table = cka_table([f[block] for f in features[first]], [f[other] for f in features[second]])
        maps.append(SimilarityMap(first, second, rows, columns, block, table))
    return maps


def _rows(drawn: SimilarityMap, kept: dict[str, list[Kept]], features: dict[str, list[Blocks]]) -> list[tuple]:
    images = len(next(iter(features[drawn.first][0].values())))
    return [
        (
            drawn.first,
            a.step,
            a.compute,
            drawn.second,
            b.step,
            b.compute,
            drawn.block,
            float(drawn.values[i, j]),
            images,
        )
        for i, a in enumerate(kept[drawn.first])
        for j, b in enumerate(kept[drawn.second])
    ]


def _features(network: Network, source: Source, shown: StudiedRun, blocks: str, images: int | None) -> Blocks:
    """Features [N, D] of a network by block, of images cropped as those of the run `shown`; needs no labels."""
    crop_fraction, workers = shown.config.evaluation.crop_fraction, shown.config.data.workers or 0
    dataset = RequestDataset(source, EvalTransform(network.size, crop_fraction))
    order = InOrder(subset_indices(len(source), images), network.size, BATCH)
    parts: dict[str, list[np.ndarray]] = {}
    with batches_of(build_loader(dataset, order, workers, pin_memory=False)) as batches:
        for batch in batches:
            for block, values in _embed(network, blocks, batch.images).items():
                parts.setdefault(block, []).append(values.float().cpu().numpy())
    return {block: np.concatenate(values) for block, values in parts.items()}


def _embed(network: Network, blocks: str, images: torch.Tensor) -> dict[str, torch.Tensor]:
    net = network.model.net
    if not isinstance(net, VisionTransformer):
        if blocks == "all":
            raise ConfigError(f"--blocks all is for plain ViTs, and a run's network is a {type(net).__name__}")
        return {"last": network.embed(vit_features, images)["pooled"]}
    depth = len(net.blocks)
    found = network.embed(partial(vit_features, layers=depth if blocks == "all" else 1), images)
    means = [values for name, values in found.items() if name.startswith("mean[")]
    names = ["last"] if blocks == "last" else [f"block {number}" for number in range(1, depth + 1)]
    return dict(zip(names, means, strict=True))


def _images(run: StudiedRun, channels: int) -> Source:
    """A run's test images, or else those held out, or the training images."""
    config = run.config
    if not isinstance(config, PretrainConfig):
        parts = open_labelled(config.data, channels, training=False)
        return parts.test or parts.val or parts.train
    config = replace(config, data=replace(config.data, channels=channels))
    other = config.evaluation
    kind, root = other.source or config.data.source, other.root
    root = config.data.root if root is None and other.source is None else root
    if other.test_split in available_splits(kind, root):
        return build_source(config, other.test_split, evaluation=True)
    return build_source(config)


def _describe(blocks: Blocks) -> str:
    images, width = next(iter(blocks.values())).shape
    note = "" if images >= 2 * width else "; so few images make everything look alike, take twice the width at least"
    return f"{images:,} images, features of width {width}{note}"
