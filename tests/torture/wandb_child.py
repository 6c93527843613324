"""The training process beside a fault of W&B: `python -m tests.torture.wandb_child OPTIONS KEY=VALUE ...`.

Its last line on stdout is a JSON object of the seconds that W&B's tracker took: "start", "log" (the longest call),
"finish".
"""

from __future__ import annotations

import builtins
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mae_et import recording
from mae_et.config import load_config
from mae_et.pretraining import pretrain
from mae_et.tracking import WandbTracker

LIMITS = {"init_timeout": 2.0, "finish_timeout": 3.0}  # seconds; users wait for 20 and 30
FAULT_STEP = 8


def main(options: dict[str, Any], keys: Sequence[str]) -> int:
    """The child: train, and print the seconds that W&B's tracker took.

    Args:
        options: "pause": say "ready" at FAULT_STEP and wait for a line; "flood": rows to mirror after that;
            "raising": W&B's function that raises "error".
        keys: the configuration.
    """
    seconds = {"start": 0.0, "log": 0.0, "finish": 0.0}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        seconds[name] = max(seconds[name], time.perf_counter() - begin)

    class Timed(WandbTracker):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            with timed("start"):
                super().__init__(*arguments, **options, **LIMITS)

        def log(self, metrics: Mapping[str, float | int | str], step: int) -> None:
            if step == FAULT_STEP and options["pause"]:
                print("ready", flush=True)
                sys.stdin.readline()
            for _ in range(options.get("flood", 0) if step == FAULT_STEP else 0):
                with timed("log"):
                    super().log(metrics, step)
            with timed("log"):
                super().log(metrics, step)

        def images(self, pictures: Mapping[str, Path], step: int) -> None:
            with timed("log"):
                super().images(pictures, step)

        def finish(self, exit_code: int) -> None:
            with timed("finish"):
                super().finish(exit_code)

    if "raising" in options:
        break_call(options["raising"], getattr(builtins, options["error"]))
    recording.WandbTracker = Timed
    code = pretrain(load_config(None, list(keys)), say=lambda line: print(line, file=sys.stderr))
    print(json.dumps(seconds), flush=True)
    return code


def break_call(name: str, error: type[BaseException]) -> None:
    """Let a function of W&B raise."""
    import wandb

    def fail(*_arguments: Any, **_options: Any) -> None:
        raise error("broken")

    owner = wandb.Run if name in ("define_metric", "log", "finish") else wandb
    setattr(owner, name, fail)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1]), sys.argv[2:]))
