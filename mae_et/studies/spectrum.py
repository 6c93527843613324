"""Which frequencies a network uses: its scores on filtered images, at the end of a run or all along it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mae_et.config import ConfigError, FinetuneConfig, PretrainConfig
from mae_et.curriculum.table import text_table, write_csv
from mae_et.data.sources import Source
from mae_et.data.splits import hold_out
from mae_et.data.transforms import EvalTransform
from mae_et.evaluation.features import Features, extract_features, subset_indices
from mae_et.evaluation.spectrum import (
    Filter,
    FrozenScores,
    Scores,
    classifier_scores,
    default_radii,
    embed_filtered,
    filtered,
    filters,
    key,
)
from mae_et.labelled import open_labelled
from mae_et.pretraining import build_source
from mae_et.probing import pooled
from mae_et.running import prepare_device
from mae_et.studies.runs import (
    Kept,
    Network,
    StudiedRun,
    file_name,
    network_channels,
    open_classifier,
    open_encoder,
    open_runs,
    results_folder,
)
from mae_et.tracking.studies import SpectrumPoint, filter_picture, spectrum_by_compute_picture, spectrum_picture

HELD_OUT = 0.1  # share of a pretraining run's labelled training images that "val" takes


def spectrum(
    runs: Sequence[str | Path],
    radii: Sequence[float] | None = None,
    checkpoints: str = "last",
    on: str = "test",
    images: int | None = 2000,
    train_images: int | None = 10_000,
    folder: str | Path | None = None,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> list[SpectrumPoint]:
    """Score runs on low-pass and high-pass filtered images, and write `spectrum.csv` and pictures.

    Runs on labels have their top-1; encoders of pretraining runs what `evaluation` of their configuration asks for,
    kNN and a logistic probe, both of unfiltered training images. Pictures: `spectrum.png` of the last checkpoints;
    with all checkpoints also `spectrum-by-compute-<run>.png`, which shows what frequencies are learned when; and
    `filters.png`, what the first run is shown.

    Args:
        runs: their folders.
        radii: of the filters, in cycles over the image's shorter side; None takes `default_radii` of the first run.
        checkpoints: "last", or "all" in each run's folder.
        on: "test", or "val": what a run on labels held out, a tenth of train for pretraining runs.
        images: how many to score; None takes all.
        train_images: for kNN and probes; None takes all.
        folder: of the results; None is `studies/` of the first run.
        overrides: `key=value` changes to the runs' configurations, such as data.root.
        say: where the table goes.

    Raises:
        ConfigError: a folder without a run or checkpoint, images that are not there, radii that are not positive.

    Source: EfficientTrain (arXiv 2211.09703) and EfficientTrain++ (arXiv 2405.08768), Table 1 and Figures 3, 4.
    """
    if radii is not None and not all(radius > 0 for radius in radii):
        raise ConfigError(f"--radii {' '.join(map(str, radii))}: radii are positive numbers of cycles per image")
    studied = open_runs(runs, overrides)
    prepare_device(studied[0].config)
    points: list[SpectrumPoint] = []
    target = results_folder(folder, studied)
    for run in studied:
        train, test = labelled_images(run, on)
        for checkpoint in run.checkpoints(checkpoints):
            network = _open(run, checkpoint)
            radii = default_radii(network.size) if radii is None else sorted(set(radii))
            if not points:
                _draw_filters(network, test, run.config.evaluation.crop_fraction, radii, target / "filters.png")
            learn_from = None if train is None else (train, subset_indices(len(train), train_images))
            indices = subset_indices(len(test), images)
            scores = filtered_scores(run, network, filters(radii), learn_from, (test, indices))
            points += _points(run, checkpoint, filters(radii), scores, len(indices))
            unfiltered = ", ".join(f"{name} {100 * value:.1f} %" for name, value in scores["none"].items())
            say(f"{run.name}, step {checkpoint.step:,}, {100 * checkpoint.compute:.0f} % of its compute: {unfiltered}")
    write_csv(target / "spectrum.csv", SpectrumPoint._fields, points)
    note = _draw(studied, points, target, on)
    say(f"\naccuracy in %:\n\n{spectrum_table(last_points(points))}\n\n{note}; everything is in {target}")
    return points


def labelled_images(run: StudiedRun, on: str) -> tuple[Source | None, Source]:
    """(what classifiers of frozen features learn from, None for runs on labels; what is scored).

    Raises:
        ConfigError: there are no such images.
    """
    config = run.config
    if isinstance(config, PretrainConfig):
        train, test = config.evaluation.train_split, config.evaluation.test_split
        learn_from = build_source(config, train, evaluation=True)
        if on == "test":
            return learn_from, build_source(config, test, evaluation=True)
        try:
            return hold_out(learn_from, HELD_OUT, 0)
        except ValueError as error:
            raise ConfigError(f"evaluation: {error}") from None
    parts = open_labelled(config.data, network_channels(run), training=False)
    chosen = parts.test if on == "test" else parts.val
    if chosen is None:
        raise ConfigError(
            f"{run.path}: {parts.train.name} has no {on} images; use --on {'val' if on == 'test' else 'test'}"
        )
    return None, chosen


def filtered_scores(
    run: StudiedRun,
    network: Network,
    wanted: Sequence[Filter],
    learn_from: tuple[Source, list[int]] | None,
    test: tuple[Source, list[int]],
) -> dict[str, Scores]:
    """Scores of one network by the filters' names.

    Args:
        run: whose `evaluation` says how images are cropped, and what scores there are.
        network: the whole one of a run on labels, else the encoder.
        wanted: the filters.
        learn_from: images and their numbers for classifiers of frozen features; None where the network has a head.
        test: images and their numbers to filter and score.
    """
    config = run.config
    showing: dict[str, Any] = {"size": network.size, "crop_fraction": config.evaluation.crop_fraction}
    showing["workers"] = config.data.workers or 0
    if isinstance(config, PretrainConfig):
        embed = partial(network.embed, partial(pooled, pooling=config.evaluation.pooling))
        assert learn_from is not None
        train = extract_features(embed, *learn_from, **showing)
        scorer: Callable[[Features], Scores] = FrozenScores(train, config.evaluation.knn, config.evaluation.probe)
    else:
        embed, scorer = partial(network.embed, _logits), classifier_scores
    found = extract_features(partial(embed_filtered, embed, wanted, network.model.mean), *test, **showing)
    return {name: scorer(features) for name, features in found.items()}


def spectrum_table(points: Sequence[SpectrumPoint]) -> str:
    """One row a radius: scores in per cent of what is coarser | of what is finer, for each run and score."""
    columns = list(dict.fromkeys((point.run, point.score) for point in points))
    values = {(p.run, p.score, p.filter, p.radius): f"{100 * p.value:.1f}" for p in points}
    radii = sorted({point.radius for point in points if point.radius is not None})
    header = ["radius", *(f"{run} {score} low | high" for run, score in columns)]
    rows = []
    for radius in radii:
        pairs = [[values.get((*column, kind, radius), "-") for kind in ("low", "high")] for column in columns]
        rows.append([f"{radius:g}", *(f"{low:>5} | {high:>5}" for low, high in pairs)])
    rows.append(["unfiltered", *(values[(*column, "none", None)] for column in columns)])
    return text_table(header, rows)


def _open(run: StudiedRun, checkpoint: Kept) -> Network:
    return (open_classifier if isinstance(run.config, FinetuneConfig) else open_encoder)(run, checkpoint)


def _logits(net: nn.Module, images: Tensor) -> Tensor:
    return net(images)


def _points(
    run: StudiedRun, checkpoint: Kept, wanted: Sequence[Filter], scores: dict[str, Scores], images: int
) -> list[SpectrumPoint]:
    return [
        SpectrumPoint(run.name, checkpoint.step, checkpoint.compute, name, how.kind, how.radius, value, images)
        for how in wanted
        for name, value in scores[key(how)].items()
    ]


def _draw(studied: Sequence[StudiedRun], points: Sequence[SpectrumPoint], target: Path, on: str) -> str:
    """Pictures of accuracy; returns what was measured, in words."""
    kind = {"test": "test", "val": "held-out"}[on]
    note = f"Accuracy on {points[0].images:,} filtered {kind} images"
    if any(isinstance(run.config, PretrainConfig) for run in studied):
        note += "; the classifiers of frozen features learned from unfiltered training images"
    spectrum_picture(last_points(points), target / "spectrum.png", note)
    for run in studied:
        own = [point for point in points if point.run == run.name]
        if len({point.step for point in own}) > 1:
            spectrum_by_compute_picture(own, target / f"spectrum-by-compute-{file_name(run)}.png", note)
    return note


def last_points(points: Sequence[SpectrumPoint]) -> list[SpectrumPoint]:
    """Those of each run's last checkpoint."""
    last = {run: max(point.step for point in points if point.run == run) for run in {point.run for point in points}}
    return [point for point in points if point.step == last[point.run]]


def _draw_filters(network: Network, source: Source, crop_fraction: float, radii: Sequence[float], path: Path) -> None:
    """Two images under every filter."""
    transform, mean = EvalTransform(network.size, crop_fraction), network.model.mean.cpu()
    rows: list[tuple[str, list[np.ndarray]]] = []
    for index in subset_indices(len(source), 2):
        image = transform(source.image(index))[None]
        for kind in ("low", "high"):
            shown = [Filter("none", None), *(how for how in filters(radii) if how.kind == kind)]
            views = [_as_picture(filtered(image, how, mean)) for how in shown]
            rows.append((f"{kind}-pass", views))
    filter_picture(rows, ["unfiltered", *(f"{radius:g}" for radius in radii)], path)


def _as_picture(images: Tensor) -> np.ndarray:
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images
    return pixels[0].permute(1, 2, 0).numpy()
