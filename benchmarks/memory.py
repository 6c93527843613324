"""Resident memory of a run, stage by stage: `python benchmarks/memory.py --run runs/memory [key=value]`.

Starts pretraining as users do and looks at the memory of its processes twice a second: pages of their own, those that
they share in part, and none of files, which other programs may have open as well. Prints the medians of each stage's
second and last tenth, and the most that was seen from the second on: while a checkpoint is saved, for one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median


def tree(pid: int) -> list[int]:
    """A process and those that it has started."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += tree(int(child))
    return found


def proportional(pid: int) -> int:
    """Bytes of a process that no file holds, pages that others share in part."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def watch(process: subprocess.Popen[bytes], metrics: Path) -> list[tuple[int, int]]:
    """(step, bytes of all processes) until the run ends."""
    seen: list[tuple[int, int]] = []
    while process.poll() is None:
        time.sleep(0.5)
        try:
            total = sum(proportional(pid) for pid in tree(process.pid))
            rows = [json.loads(line) for line in metrics.read_text().splitlines()[-3:]]
        except (OSError, ValueError):  # a process ends just now, or there is no row yet
            continue
        steps = [row["step"] for row in rows if "step" in row]
        seen += [(max(steps), total)] if steps else []
    return seen


def main() -> None:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/pretrain/demo.yaml")
    parser.add_argument("--run", required=True, help="a new folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    command = [sys.executable, "pretrain.py", "--config", options.config, f"run={options.run}", "tracking.every=10"]
    process = subprocess.Popen([*command, *options.overrides])
    seen = watch(process, Path(options.run, "metrics.jsonl"))
    if process.returncode:
        sys.exit(process.returncode)
    print("| B | steps | second tenth | last tenth | grown by | most |\n|---|---|---|---|---|---|")
    first = 0
    for stage in json.loads(Path(options.run, "plan.json").read_text())["stages"]:
        begin, first = first, first + stage["steps"]
        tenths: list[list[int]] = [[] for _ in range(10)]
        for step, size in seen:
            if begin < step <= first:
                tenths[min(9, 10 * (step - begin) // stage["steps"])].append(size)
        start, end, most = median(tenths[1]), median(tenths[9]), max(max(sizes) for sizes in tenths[1:])
        cells = f"{stage['bandwidth'][0]} | {stage['steps']:,} | {start / 1e6:,.0f} MB | {end / 1e6:,.0f} MB"
        print(f"| {cells} | {100 * (end / start - 1):+.2f} % | {most / 1e6:,.0f} MB |")


if __name__ == "__main__":
    main()
