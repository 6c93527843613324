"""What a run has come to: scores beside an untrained encoder and raw pixels, curves, and the honesty of its costs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mae_et.config import ConfigError, PretrainConfig
from mae_et.config.kept import kept_config, read_kept
from mae_et.curriculum.plan import Plan
from mae_et.curriculum.stage import format_size
from mae_et.curriculum.table import text_table
from mae_et.engine.checkpoint import latest_checkpoint
from mae_et.engine.distributed import choose_device
from mae_et.engine.precision import Precision, choose_attention
from mae_et.engine.run_folder import RunFolder, write_text_atomic
from mae_et.evaluation.scores import Embed, embed_pixels, embed_with, score
from mae_et.planning import final_size, plan_of
from mae_et.pretraining import build_labelled_sets, build_model
from mae_et.running import prepare_device
from mae_et.tracking import read_metrics
from mae_et.tracking.curves import curve_picture


def evaluate_run(run: str, overrides: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """Print and keep the report of a run.

    Writes `evaluation.json` and `pictures/curves.png` into the run's folder.

    Args:
        run: the run's folder.
        overrides: changes to its configuration, e.g. `evaluation.train_images=null`.

    Returns:
        {"pretrained" | "untrained" | "pixels": {score: value in [0, 1]}}.

    Raises:
        ConfigError: the folder holds no run with a checkpoint.
    """
    path = Path(run)
    if not (path / "config.yaml").exists():
        raise ConfigError(f"{run} holds no run: there is no {path / 'config.yaml'}")
    folder = RunFolder(path)
    config = kept_config(folder.config_path, PretrainConfig, overrides)
    plan = read_kept(folder.plan_path, plan_of)
    rows = read_metrics(folder.metrics_path)

    step, scores = run_scores(config, folder)
    print(score_table(scores, "test" if config.evaluation.holdout is None else "held-out"))
    try:
        costs = stage_costs(plan, rows)
        curve_picture(rows, folder.pictures / "curves.png")
        report = {"scores": scores, "stage_costs": costs, "checkpoint_step": step}
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder.metrics_path} cannot be drawn ({type(error).__name__}: {error})") from None
    print(f"\nCost of an image, measured in this run against the plan:\n\n{cost_table(costs)}")
    write_text_atomic(folder.path / "evaluation.json", json.dumps(report, indent=1))
    print(f"\npictures: {folder.pictures}/  (curves.png, and what each stage sees and predicts)")
    return scores


def run_scores(config: PretrainConfig, folder: RunFolder) -> tuple[int, dict[str, dict[str, float]]]:
    """The step of the run's last checkpoint; its scores, those of its first weights and of raw pixels, on the same
    images."""
    checkpoint = latest_checkpoint(folder.checkpoints)
    if checkpoint is None:
        raise ConfigError(f"{folder.path} holds no checkpoint yet")
    prepare_device(config)
    device = choose_device(config.engine.device, 0)
    precision = Precision.choose(config.engine.precision, device)
    sets = build_labelled_sets(config)
    untrained, pretrained = (build_model(config).to(device).eval() for _ in range(2))
    pretrained.load_state_dict(checkpoint.tensors["model"])
    for model in (untrained, pretrained):
        choose_attention(model, precision)
    embeddings: dict[str, Embed] = {
        "pretrained": partial(embed_with, pretrained, precision, config.evaluation.pooling),
        "untrained": partial(embed_with, untrained, precision, config.evaluation.pooling),
        "pixels": embed_pixels,
    }
    size, workers = final_size(config), config.data.workers or 0
    scores = {name: score(embed, sets, config.evaluation, size, workers) for name, embed in embeddings.items()}
    return checkpoint.step, scores


def score_table(scores: dict[str, dict[str, float]], images: str = "test") -> str:
    """Scores in per cent, one row an embedding."""
    names = {"pretrained": "pretrained encoder", "untrained": "same encoder, untrained", "pixels": "raw pixels"}
    columns = list(next(iter(scores.values())))
    rows = [[names[kind], *(f"{100 * values[c]:.1f} %" for c in columns)] for kind, values in scores.items()]
    return text_table([f"{images} accuracy", *columns], rows)


def stage_costs(plan: Plan, rows: Sequence[dict[str, Any]]) -> list[dict[str, float | str]]:
    """Per stage: measured seconds per image without waiting for data, and both costs relative to the last stage.

    Medians over the stage's rows of metrics, so that a busy moment of the machine does not count.
    """
    seconds: list[float | None] = []
    for stage in plan.stages:
        of_stage = [row for row in rows if row.get("stage/index") == stage.index and "train/loss" in row]
        per_image = [(1 - r["throughput/data_wait"]) / r["throughput/images_per_second"] for r in of_stage]
        seconds.append(statistics.median(per_image) if per_image else None)
    last, reference = plan.stages[-1], seconds[-1]
    costs: list[dict[str, float | str]] = []
    for stage, measured in zip(plan.stages, seconds):
        if measured is not None and reference is not None:
            costs.append(
                {
                    "bandwidth": format_size(stage.bandwidth),
                    "milliseconds": 1000 * measured,
                    "measured": measured / reference,
                    "planned": stage.cost_per_image / last.cost_per_image,
                }
            )
    return costs


def cost_table(costs: list[dict[str, float | str]]) -> str:
    """`stage_costs` for people."""
    rows = [
        [
            str(cost["bandwidth"]),
            f"{cost['milliseconds']:.3f}",
            f"{cost['measured']:.3f}",
            f"{cost['planned']:.3f}",
        ]
        for cost in costs
    ]
    return text_table(["B", "ms per image", "relative, measured", "relative, planned"], rows)
