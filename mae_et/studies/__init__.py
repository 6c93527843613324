"""Studies of finished runs: `python -m mae_et spectrum | similarity`. This file loads no torch; what it calls does."""

from __future__ import annotations

import argparse
from typing import Any


def add_commands(commands: Any) -> None:
    """Add the sub-commands `spectrum` and `similarity` to argparse's sub-parsers."""
    command = commands.add_parser(
        "spectrum",
        help="accuracy of runs on low-pass and high-pass filtered images",
        description="Scores of runs by the frequencies left in the images: top-1 of runs on labels; kNN and a logistic "
        "probe of pretrained encoders, whose classifiers learn from unfiltered images. Only test images are filtered.",
    )
    command.add_argument("--radii", type=float, nargs="+", metavar="R", help="cycles per image; default: about 8")
    command.add_argument(
        "--checkpoints",
        choices=("last", "all"),
        default="last",
        help="all: every one in the run's folder, by compute (train with saving.steps=... saving.keep=... for many)",
    )
    command.add_argument("--on", choices=("test", "val"), default="test", help="val: held out of the training images")
    command.add_argument("--images", type=int, default=2000, help="filtered and scored; default 2,000")
    command.add_argument("--train-images", type=int, default=10_000, help="of probes; default 10,000")
    command.set_defaults(action=_spectrum)
    _add_common(command)

    command = commands.add_parser(
        "similarity",
        help="linear CKA between the features of runs, by compute",
        description="Linear CKA between the features of two runs for every pair of their checkpoints, on the same "
        "images. One run is compared with itself; of three and more, every two.",
    )
    command.add_argument("--blocks", choices=("last", "all"), default="last", help="all: a map for each block of a ViT")
    command.add_argument("--checkpoints", choices=("last", "all"), default="all")
    command.add_argument("--images", type=int, default=1000, help="default 1,000; take more than twice the width")
    command.set_defaults(action=_similarity)
    _add_common(command)


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    command.add_argument("--folder", help="where tables and pictures go; default: studies/ of the first run")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="key=value",
        dest="overrides",
        help="a change to the runs' configurations, such as data.root=/elsewhere; may be repeated",
    )


def _spectrum(options: argparse.Namespace) -> int:
    from mae_et.studies.spectrum import spectrum

    spectrum(
        options.runs,
        radii=options.radii,
        checkpoints=options.checkpoints,
        on=options.on,
        images=options.images,
        train_images=options.train_images,
        folder=options.folder,
        overrides=options.overrides,
    )
    return 0


def _similarity(options: argparse.Namespace) -> int:
    from mae_et.studies.similarity import similarity

    similarity(
        options.runs,
        blocks=options.blocks,
        checkpoints=options.checkpoints,
        images=options.images,
        folder=options.folder,
        overrides=options.overrides,
    )
    return 0
