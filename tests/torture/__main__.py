"""`python -m tests.torture`: many trials of every fault, side by side; resumable, with a log."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Parse, hold the trials, print what came of them; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", help="comma-separated; all without it. --list names them")
    parser.add_argument("--trials", action="append", default=[], metavar="KIND=N", help="N trials of a kind")
    parser.add_argument("--short", action="store_true", help="a few trials of each kind, as in CI")
    parser.add_argument("--jobs", type=int, default=2, help="trials side by side")
    parser.add_argument("--log", type=Path, default=Path("runs/torture/log.jsonl"), help="what it has is not repeated")
    parser.add_argument("--folder", type=Path, help="for the runs; a temporary one without it")
    parser.add_argument("--list", action="store_true", help="name the kinds and how often each is tried")
    options = parser.parse_args(arguments)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # before numpy and torch are imported: what forks must have no threads
    import torch

    from tests.torture.catalogue import counts, find_trials
    from tests.torture.runner import run_trials, summary

    torch.set_num_threads(1)
    trials = find_trials()
    wanted = options.kinds.split(",") if options.kinds else list(trials)
    number = counts(wanted, short=options.short)
    number |= {kind: int(count) for kind, _, count in (pair.partition("=") for pair in options.trials)}
    unknown = [kind for kind in number if kind not in trials]
    if unknown:
        parser.error(f"no kinds {', '.join(unknown)}; there are {', '.join(trials)}")
    if options.list:
        print("\n".join(f"{kind} {count}" for kind, count in number.items()))
        return 0
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="mae_et-torture-"))).resolve()
    rows = run_trials(trials, number, options.log, folder, options.jobs, lambda line: print(line, flush=True))
    print(summary(rows))
    failed = any(row["outcome"] == "FAILED" for row in rows)
    if options.folder is None and not failed:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
