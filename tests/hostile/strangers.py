"""Real runs in the hands of a stranger: what may have been done to their files, and the commands on them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import finetune
import linear_probe
import pretrain
from mae_et.__main__ import main
from mae_et.config import FinetuneConfig, load_config
from mae_et.finetuning import finetune as finetune_run
from mae_et.pretraining import pretrain as pretrain_run
from tests.end_to_end.labelled import COMMON, TINY_FINETUNE, write_classes
from tests.end_to_end.tiny import TINY

STAGE = "curriculum.stages=[{end: 1, bandwidth: 16}]"


def write_world(folder: Path) -> None:
    """Images, and two runs stopped half-way: `masked`, planned by a calibration, and `tuned`, which began with it."""
    write_classes(folder / "images")
    timing = {
        **{"bandwidth": [16, 16], "visible": 4, "batch": 8, "filtered": False, "seconds": 0.1, "spread": 0.0},
        **{"step_seconds": 0.1, "data_seconds": 0.0, "memory": None, "image": [3, 20, 18]},
        **{"flops_per_image": None, "blocks": 3},
    }
    whole = {"title": "t", "device": "d", "processes": 1, "threads": 1, "workers": 0, "precision": "fp32"}
    (folder / "times.json").write_text(json.dumps({"timings": [timing], **whole, "torch": "2", "date": "today"}))
    for task in ("pretrain", "finetune", "probe"):
        (folder / f"{task}.yaml").write_text(f"task: {task}\n")
    masked = load_config(None, of_masked(folder, folder / "masked"))
    assert pretrain_run(masked, say=lambda _: None, until=0.5) == 0
    tuned = load_config(None, of_tuned(folder, folder / "tuned"), FinetuneConfig)
    assert finetune_run(tuned, say=lambda _: None, until=0.5) == 0


def of_masked(world: Path, run: Path) -> list[str]:
    """The configuration of the run `masked`, in a folder of its own."""
    return [
        *(*TINY, "model.patch_size=4", f"data.root={world / 'images'}", f"run={run}", STAGE, "epochs=2"),
        *("curriculum.cost=measured", f"calibration={world / 'times.json'}", "evaluation.crop_fraction=1"),
        *("evaluation.knn=[3]", "evaluation.train_images=12", "evaluation.test_images=9"),
    ]


def of_tuned(world: Path, run: Path) -> list[str]:
    """The configuration of the run `tuned`, in a folder of its own."""
    return [
        *(*TINY_FINETUNE, f"data={world / 'images'}", f"run={run}", STAGE, "epochs=2"),
        f"checkpoint={world / 'masked'}",
    ]


def _scores(world: Path, run: Path, out: Path) -> list[str]:
    return [*COMMON, f"checkpoint={run}", f"data={world / 'images'}", f"run={out}"]


COMMANDS: dict[str, Callable[[Path, Path, Path], int]] = {
    "pretrain": lambda world, run, _: pretrain.main(["--config", f"{world}/pretrain.yaml", *of_masked(world, run)]),
    "finetune": lambda world, run, _: finetune.main(["--config", f"{world}/finetune.yaml", *of_tuned(world, run)]),
    "finetune from it": lambda world, run, out: finetune.main(
        ["--config", f"{world}/finetune.yaml", *of_tuned(world, out), f"checkpoint={run}", "epochs=1"]
    ),
    "probe": lambda world, run, out: linear_probe.main(
        ["--config", f"{world}/probe.yaml", *_scores(world, run, out), "protocol=logistic"]
    ),
    "knn": lambda world, run, out: main(["knn", *_scores(world, run, out), "neighbours.k=[3]"]),
    "evaluate": lambda _, run, __: main(["evaluate", str(run)]),
    "export": lambda _, run, out: main(["export", str(run), "--to", "timm", "--folder", str(out)]),
    "spectrum": lambda _, run, __: main(
        ["spectrum", str(run), "--radii", "4", "--images", "9", "--train-images", "12"]
    ),
    "similarity": lambda _, run, __: main(["similarity", str(run), "--images", "9"]),
}
"""(world, run, folder for what is not written into the run's) to exit codes."""


def _numbers(spelling: str) -> Callable[[bytes], bytes]:
    """Put another word for every number that stands for a value."""
    return lambda raw: re.sub(rb"(?<=[:,\[\s])-?\d[\d.e+-]*(?=[,\]\s}]|$)", spelling.encode(), raw)


def _values(spelling: str) -> Callable[[bytes], bytes]:
    """Put another word for every value that is no number."""
    return lambda raw: re.sub(rb'(?<=: )("[^"\n]*"|null|true|false|[a-z][\w/]*)(?=,?\s|})', spelling.encode(), raw)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda raw: raw[: len(raw) // 2],
    "bytes": lambda _: b"\x00\xff\xfe\n",
    "null": lambda _: b"null\n",
    "list": lambda _: b"[1]\n",
    "nothing": lambda _: b"{}\n",
    "deep lists": lambda _: b"[" * 100_000 + b"]" * 100_000 + b"\n",
    "deep": lambda _: b'{"step": ' * 100_000 + b"1" + b"}" * 100_000 + b"\n",
    "texts": _numbers('"x"'),
    "huge": _numbers("1" + 400 * "0"),
    "infinite": _numbers("1e999"),
    "negative": _numbers("-1"),
    "lists": _numbers("[3]"),
    "numbers": _values("7"),
    "mappings": _values('{"a": 1}'),
}
