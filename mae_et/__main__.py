"""Tools around runs: `python -m mae_et plan | calibrate | evaluate | search | reproduce | ...`."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import TYPE_CHECKING

from mae_et import bench, comparison, packing, reproduction, search, studies
from mae_et.config import (
    ConfigError,
    DetectConfig,
    FinetuneConfig,
    PretrainConfig,
    ProbeConfig,
    SegmentConfig,
    load_config,
    task_of,
)
from mae_et.curriculum import Plan
from mae_et.curriculum.calibration import Calibration
from mae_et.engine.signals import follow_launcher
from mae_et.planning import read_calibration
from mae_et.tracking import workspace

if TYPE_CHECKING:
    from mae_et.rehearsal import Rehearse


def number_of_images(config: PretrainConfig) -> int:
    """`data.images`, or what a listing of the data counts; no image is opened.

    Raises:
        ConfigError: there is neither.
    """
    if config.data.images is not None:
        return config.data.images
    from mae_et.data.sources import count_images

    try:
        return count_images(config.data.source, config.data.root, config.data.split)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{error}\n(a plan needs only the number of images: data.images=...)") from None


def labelled_plan(config: FinetuneConfig, frozen: bool = False, calibration: Calibration | None = None) -> Plan:
    """The plan of a run on labels, from `data.images` and `data.classes` or from the data.

    Args:
        config: of the run.
        frozen: whether the network is not trained, but for its head.
        calibration: of the configuration, and for its number of processes.

    Raises:
        ConfigError: there are neither.
    """
    from mae_et.labelled import open_labelled
    from mae_et.labelled_plan import build_plan
    from mae_et.supervised import settle_start

    backbone = settle_start(config).backbone
    data, ranks = config.data, 1 if calibration is None else calibration.processes
    if data.images is None or data.classes is None:
        try:
            images = open_labelled(data, backbone.channels)
        except ConfigError as error:
            raise ConfigError(f"{error}\n(a plan needs only their numbers: data.images=... data.classes=...)") from None
        return build_plan(config, backbone, len(images.train), len(images.classes), ranks, frozen, calibration)
    return build_plan(config, backbone, data.images, data.classes, ranks, frozen, calibration)


def rehearsal(config: PretrainConfig | FinetuneConfig) -> Rehearse:
    """What a calibration of the configuration measures."""
    from mae_et import finetuning, pretraining

    if isinstance(config, FinetuneConfig):
        return partial(finetuning.rehearse, config, None, None)
    return partial(pretraining.rehearse, config, None)


def chosen_calibration(config: PretrainConfig | FinetuneConfig, options: argparse.Namespace) -> Calibration | None:
    """What `--calibrate` measures, or the file that `--calibration` or the configuration names; None without."""
    if options.calibrate:
        from mae_et.calibration import calibrate_alone

        return calibrate_alone(config, rehearsal(config), print)
    path = options.calibration or config.calibration.file
    return None if path is None else read_calibration(path)


def calibrate(options: argparse.Namespace) -> int:
    """Measure how long the steps of a configuration take here, and keep it in a file."""
    from mae_et.calibration import calibrate_alone

    task = task_of(options.config)
    if task == "probe":
        raise ConfigError("a probe has no budget in time: calibrate recipes of pretraining and fine-tuning")
    schema = FinetuneConfig if task == "finetune" else PretrainConfig
    config = load_config(options.config, options.overrides, schema)
    calibrate_alone(config, rehearsal(config), print, options.out)
    return 0


def plan(options: argparse.Namespace) -> int:
    """Print the plan of a configuration. No image is opened; for pretraining, torch is loaded only to count images."""
    from mae_et.curriculum.table import plan_table

    task = task_of(options.config)
    if task == "finetune":
        config = load_config(options.config, options.overrides, FinetuneConfig)
        calibration = chosen_calibration(config, options)
        show_plan(labelled_plan(config, calibration=calibration), config, calibration, options)
    elif task == "probe":
        from mae_et.probing import as_finetuning

        config = load_config(options.config, options.overrides, ProbeConfig)
        if config.protocol != "mae":
            raise ConfigError(f"protocol={config.protocol} works on features that are computed once: it has no plan")
        print(plan_table(labelled_plan(as_finetuning(config), frozen=True)))
    elif task == "detect":
        from mae_et.detecting import plan_detection

        print(plan_table(plan_detection(load_config(options.config, options.overrides, DetectConfig))))
    elif task == "segment":
        from mae_et.segmenting import plan_segmentation

        print(plan_table(plan_segmentation(load_config(options.config, options.overrides, SegmentConfig))))
    else:
        from mae_et.planning import build_plan

        config = load_config(options.config, options.overrides)
        calibration = chosen_calibration(config, options)
        ranks = 1 if calibration is None else calibration.processes
        planned = build_plan(config, number_of_images(config), ranks, calibration)
        show_plan(planned, config, calibration, options)
    return 0


def show_plan(
    plan: Plan, config: PretrainConfig | FinetuneConfig, calibration: Calibration | None, options: argparse.Namespace
) -> None:
    """Print a plan, what its budget comes to, what ends it early, and by a calibration what it takes."""
    from mae_et.curriculum.table import plan_table
    from mae_et.curriculum.time_table import time_table

    if options.price is not None and calibration is None:
        raise ConfigError("--price needs times: --calibration FILE, or --calibrate to measure here")
    if config.selection.method != "none":
        from mae_et.engine.selection import choose_selection

        repeats = config.data.repeats if isinstance(config, FinetuneConfig) else 1
        choose_selection(config.selection, plan, config.seed, config.curriculum.drop_last, repeats)
    print(plan_table(plan))
    if config.selection.method != "none":
        print(f"selection: {config.selection.method}; the passes above are those of a run that leaves nothing out")
    if config.protocol.wall_hours is not None:
        print(f"protocol: stopped after {config.protocol.wall_hours:g} hours of training, wherever it is")
    if config.budget is not None:
        print(f"budget: {config.budget} comes to epochs={plan.epochs:.9g}")
    if calibration is not None:
        print(f"\n{time_table(plan, calibration, options.price, options.currency)}")


def evaluate(options: argparse.Namespace) -> int:
    """Score a run's encoder beside an untrained one and raw pixels, and draw its curves."""
    from mae_et.report import evaluate_run

    evaluate_run(options.run, options.overrides)
    return 0


def knn(options: argparse.Namespace) -> int:
    """Weighted nearest neighbours of a checkpoint's features."""
    from mae_et.probing import neighbours

    config = load_config(options.config, options.overrides, ProbeConfig)
    if not any(override.startswith("run=") for override in options.overrides) and options.config is None:
        config.run = "runs/knn"
    return neighbours(config)


def detect(options: argparse.Namespace) -> int:
    """Train a detector on a checkpoint's network, or examine one."""
    follow_launcher()  # before imports that take seconds
    from mae_et.detecting import detect as train

    config = load_config(options.config, options.overrides, DetectConfig)
    return train(config, options.resume, only_evaluate=options.eval)


def segment(options: argparse.Namespace) -> int:
    """Train a segmenter on a checkpoint's network, or examine one."""
    follow_launcher()
    from mae_et.segmenting import segment as train

    config = load_config(options.config, options.overrides, SegmentConfig)
    return train(config, options.resume, only_evaluate=options.eval)


def predict(options: argparse.Namespace) -> int:
    """Find objects, or give pixels their classes, on photos without annotations."""
    from mae_et.predicting import predict as look

    return look(options.run, options.photos, options.out, options.score, options.pictures, options.overrides)


def export(options: argparse.Namespace) -> int:
    """Write a checkpoint for others to open: timm, transformers, ONNX."""
    from mae_et.exporting import export_checkpoint

    export_checkpoint(options.checkpoint, options.to, options.folder, options.pooling, options.heads)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Every command with its options; `action` of what it parses is the function that does it."""
    parser = argparse.ArgumentParser(prog="python -m mae_et", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("plan", help="what a run will see and spend, before anything is spent")
    command.add_argument("--config", required=True)
    times = command.add_mutually_exclusive_group()
    times.add_argument("--calibration", metavar="FILE", help="times of steps, as `calibrate` keeps them")
    times.add_argument("--calibrate", action="store_true", help="measure the times of steps here, first")
    command.add_argument("--price", type=float, help="of an hour of one process, in --currency")
    command.add_argument("--currency", default="EUR")
    command.set_defaults(action=plan)

    command = commands.add_parser("calibrate", help="measure how long steps take here, for budgets in time")
    command.add_argument("--config", required=True)
    command.add_argument("--out", default="calibration.json", metavar="FILE")
    command.set_defaults(action=calibrate)

    command = commands.add_parser("evaluate", help="probe and kNN of a run's encoder, and its curves")
    command.add_argument("run", help="a run's folder")
    command.set_defaults(action=evaluate)

    command = commands.add_parser("knn", help="weighted nearest neighbours: checkpoint=runs/x data=cifar100")
    command.add_argument("--config", help="a recipe of configs/probe/, or a file of your own")
    command.set_defaults(action=knn)

    for name, action, what in (
        ("detect", detect, "boxes and instance masks: train a detector on a checkpoint's network"),
        ("segment", segment, "a class for every pixel: train a segmenter on a checkpoint's network"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("--config", required=True, help=f"a recipe of configs/{name}/, or a file of your own")
        command.add_argument(
            "--resume", default="auto", help="as of finetune.py: auto (default), never, or a checkpoint"
        )
        command.add_argument("--eval", action="store_true", help="examine the run's last checkpoint, and train nothing")
        command.set_defaults(action=action)

    command = commands.add_parser("predict", help="boxes, masks or classes of pixels of photos without annotations")
    command.add_argument("run", metavar="RUN", help="the folder of a run of detect or segment")
    command.add_argument("photos", metavar="PHOTOS", help="a folder, an image, or a list of images (.txt)")
    command.add_argument("--out", metavar="FOLDER", help="where to; default: predictions/ in the run's folder")
    command.add_argument("--score", type=float, help="least score of a detection; default: evaluation.shown, 0.5")
    command.add_argument("--no-pictures", action="store_false", dest="pictures", help="draw nothing")
    command.set_defaults(action=predict)
    for command in commands.choices.values():
        command.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configuration")

    command = commands.add_parser("export", help="a checkpoint for timm, transformers or ONNX, compared after")
    command.add_argument("checkpoint", help="a run's folder, one of its checkpoints, or whatever checkpoint= takes")
    command.add_argument("--to", required=True, choices=("timm", "hf", "onnx"))
    command.add_argument("--folder", help="where to; default: exports/<name of the run>-<form>")
    command.add_argument("--pooling", choices=("mean", "cls"), help="of an encoder's features; default: cls, else mean")
    command.add_argument("--heads", type=int, help="attention heads, where a file does not tell them")
    command.set_defaults(action=export)

    bench.add_command(commands)
    comparison.add_command(commands)
    packing.add_command(commands)
    reproduction.add_command(commands)
    search.add_command(commands)
    studies.add_commands(commands)
    workspace.add_command(commands)
    return parser


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """What the arguments ask for; argparse's exit with a message where they make no sense."""
    parser = build_parser()
    options, late = parser.parse_known_args(arguments)
    if any(text.startswith("-") or "=" not in text for text in late) or not (hasattr(options, "overrides") or not late):
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    if late:  # argparse takes no changes that follow an option which follows other arguments
        options.overrides = [*options.overrides, *late]
    return options


def main(arguments: list[str] | None = None) -> int:
    """Parse and dispatch; returns the exit code."""
    options = parse(arguments)
    try:
        return options.action(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
