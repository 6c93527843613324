"""The end of a run on labels: one look at the test images, written down."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from mae_et.curriculum.plan import Plan
from mae_et.engine.distributed import Ranks, on_main
from mae_et.engine.meter import axes
from mae_et.engine.run_folder import RunFolder, write_text_atomic
from mae_et.engine.state import TrainState
from mae_et.evaluation.accuracy import Examination, classify
from mae_et.evaluation.classification import ClassificationResult, worst_classes_table, write_per_class_csv
from mae_et.labelled import LabelledImages
from mae_et.tracking.confusion import confusion_picture
from mae_et.tracking.tracker import Tracker

REPORT_FILE = "report.json"


def conclude(
    state: TrainState,
    plan: Plan,
    images: LabelledImages,
    how: Examination,
    ranks: Ranks,
    folder: RunFolder,
    tracker: Tracker,
    say: Callable[[str], None],
    again: bool = False,
) -> None:
    """Examine held-out and test images; write `report.json`, `per_class.csv` and `pictures/confusion.png`.

    The last two are of the test images, or of those held out where there is no test. A run that has its report is left
    as it is, unless `again`.
    """
    report_path = folder.path / REPORT_FILE
    if on_main(ranks, report_path.exists) and not again:
        say(f"examined before: {report_path}")
        return
    parts = {"val": images.val, "test": images.test}
    results = {name: classify(state, part, how, ranks) for name, part in parts.items() if part is not None}
    if not ranks.is_main or not results:
        return
    final = "test" if "test" in results else "val"
    write_per_class_csv(folder.path / "per_class.csv", results[final], images.classes)
    picture = folder.pictures / "confusion.png"
    confusion_picture(picture, results[final].confusion, images.classes)
    report = {"step": state.step, "size": list(how.size), **{name: summary(result) for name, result in results.items()}}
    write_text_atomic(report_path, json.dumps(report, indent=1))
    found = {key: value for name in results for key, value in metrics(name, results[name]).items()}
    tracker.log({**axes(plan, state), **found}, state.step)
    tracker.images({f"{final}/confusion": picture}, state.step)
    for name, result in results.items():
        say(
            f"{name}: top-1 {100 * result.top1:.2f} %, top-5 {100 * result.top5:.2f} %, mean over classes "
            f"{100 * result.mean_class_accuracy:.2f} % ({result.images:,} images)"
        )
    say(worst_classes_table(results[final], images.classes))


def summary(result: ClassificationResult) -> dict[str, Any]:
    """The numbers of a report, accuracies in [0, 1]."""
    return {
        "top1": result.top1,
        "top5": result.top5,
        "mean_class_accuracy": result.mean_class_accuracy,
        "images": result.images,
    }


def metrics(name: str, result: ClassificationResult) -> dict[str, float]:
    """The same for the trackers; during training, too, "val" is logged under these names."""
    return {f"{name}/top1": result.top1, f"{name}/top5": result.top5}
