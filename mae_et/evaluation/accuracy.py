"""Accuracy of a classifier on labelled images, shared out over ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mae_et.curriculum.plan import Plan
from mae_et.data.loader import RequestDataset, batches_of, build_loader
from mae_et.data.sources import Source
from mae_et.data.transforms import EvalTransform
from mae_et.engine.distributed import Ranks, share_statistics
from mae_et.engine.loop import Observation
from mae_et.engine.state import TrainState
from mae_et.evaluation.classification import ClassificationResult, Tally
from mae_et.evaluation.features import InOrder


@dataclass(frozen=True)
class Examination:
    """How images are shown.

    Attributes:
        size: (height, width) in px.
        crop_fraction: share of the resized image that the centre crop keeps.
        batch: images at a time on each rank.
        workers: of the loader.
        follow_stage: during training, show images at the stage's B in place of `size`.
    """

    size: tuple[int, int]
    crop_fraction: float = 0.875
    batch: int = 256
    workers: int = 0
    follow_stage: bool = False


def classify(state: TrainState, source: Source, how: Examination, ranks: Ranks) -> ClassificationResult:
    """Results of the state's evaluated network on all of a source; every rank takes a share and gets the whole.

    The network is left in evaluation mode.
    """
    model = state.evaluated.eval()
    share_statistics(model, ranks)
    share = list(range(ranks.rank, len(source), ranks.count))
    dataset = RequestDataset(source, EvalTransform(how.size, how.crop_fraction))
    loader = build_loader(
        dataset, InOrder(share, how.size, how.batch), how.workers, pin_memory=state.device.type == "cuda"
    )
    tally = Tally(len(source.classes), state.device)
    with torch.no_grad(), batches_of(loader) as batches:
        for batch in batches:
            there = batch.to(state.device)
            with state.precision.autocast():
                logits = model(there.images)
            tally.add(logits.float(), there.labels)
    return tally.reduce().result()


class AccuracyObserver:
    """Accuracy on held-out images whenever another `every` of the compute is spent.

    Not at the very end, where the whole examination comes (`mae_et.examination`).
    """

    def __init__(self, state: TrainState, source: Source, how: Examination, ranks: Ranks, every: float | None):
        self.state, self.source, self.how, self.ranks, self.every = state, source, how, ranks, every

    def due(self, plan: Plan, done: int) -> bool:
        """Whether a multiple of `every` lies within the last step."""
        return plan.passes(self.every, done)

    def observe(self, plan: Plan, done: int) -> Observation:
        """Look, at the final size or at that of the stage just seen."""
        how = replace(self.how, size=plan.at(done - 1).bandwidth) if self.how.follow_stage else self.how
        result = classify(self.state, self.source, how, self.ranks)
        return Observation(metrics={"val/top1": result.top1, "val/top5": result.top5})
