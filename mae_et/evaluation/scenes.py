"""A segmenter looked at on annotated images, shared out over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from mae_et.curriculum.plan import Plan
from mae_et.data.loader import batches_of, build_loader
from mae_et.data.requests import SampleRequest
from mae_et.data.segmentation import SegmentationSource
from mae_et.engine.distributed import Ranks, share_statistics
from mae_et.engine.loop import Observation
from mae_et.engine.state import TrainState
from mae_et.evaluation.features import InOrder
from mae_et.evaluation.segmentation import ConfusionTally, SceneExamination, SegmentationResult, predict_scene
from mae_et.models.segmentation import Segmenter
from mae_et.tracking.dense_panels import SceneSample, scene_panel


class Scene(NamedTuple):
    """An image uint8 [C, H, W], its classes uint8 [H, W], and its number."""

    image: Tensor
    mask: Tensor
    number: int


class SceneByScene:
    """Turns a request into an image as it is: images of a set have many sizes, and are shown one at a time."""

    def __init__(self, source: SegmentationSource):
        self.source = source

    def __getitems__(self, requests: Sequence[SampleRequest]) -> Scene:
        (request,) = requests
        return Scene(self.source.image(request.image), self.source.mask(request.image), request.image)


def predicted_scenes(
    state: TrainState, source: SegmentationSource, indices: list[int], how: SceneExamination, workers: int
) -> Iterator[tuple[Scene, Tensor]]:
    """Some scenes, each with its predicted classes, uint8 [H, W] on the device.

    The state's evaluated segmenter is left in evaluation mode.
    """
    model = state.evaluated.eval()
    assert isinstance(model, Segmenter)
    loader = build_loader(SceneByScene(source), InOrder(indices, (1, 1), 1), workers, state.device.type == "cuda")
    with batches_of(loader) as scenes:
        for scene in scenes:
            yield scene, predict_scene(model, scene.image, how, state.device, state.precision)


def examine_segmenter(
    state: TrainState, source: SegmentationSource, how: SceneExamination, ranks: Ranks, workers: int
) -> SegmentationResult:
    """One confusion matrix of all of a source; every rank takes a share of the images and gets the whole.

    Raises:
        ImageError: an image, or its mask, cannot be read.
        ValueError: no pixel has a label.
    """
    share_statistics(state.evaluated, ranks)
    tally = ConfusionTally(len(source.classes), state.device)
    share = list(range(ranks.rank, len(source), ranks.count))
    for scene, predicted in predicted_scenes(state, source, share, how, workers):
        tally.add(predicted, scene.mask.to(state.device, non_blocking=True))
    return tally.reduce().result()


def draw_scenes(
    path: Path, state: TrainState, source: SegmentationSource, how: SceneExamination, count: int, title: str
) -> None:
    """Draw true and predicted classes of images spread over a source."""
    count = min(count, len(source))
    samples = []
    for scene, predicted in predicted_scenes(state, source, [k * len(source) // count for k in range(count)], how, 0):
        image = scene.image.permute(1, 2, 0).numpy()
        name = Path(source.describe(scene.number)).name
        samples.append(SceneSample(image, scene.mask.numpy(), predicted.cpu().numpy(), name))
    scene_panel(path, samples, source.classes, title)


class SegmentationObserver:
    """mIoU on held-out images whenever another `every` of the compute is spent, and a picture of some of them.

    Not at the very end, where the whole examination comes.
    """

    def __init__(
        self,
        state: TrainState,
        source: SegmentationSource,
        how: SceneExamination,
        ranks: Ranks,
        workers: int,
        every: float | None,
        pictures: Path | None,
        drawn: int,
    ):
        self.state, self.source, self.how, self.ranks = state, source, how, ranks
        self.workers, self.every, self.pictures, self.drawn = workers, every, pictures, drawn

    def due(self, plan: Plan, done: int) -> bool:
        """Whether a multiple of `every` lies within the last step."""
        return plan.passes(self.every, done)

    def observe(self, plan: Plan, done: int) -> Observation:
        """Look; the main rank draws."""
        result = examine_segmenter(self.state, self.source, self.how, self.ranks, self.workers)
        pictures: dict[str, Path] = {}
        if self.pictures is not None and self.ranks.is_main:
            pictures["val/scenes"] = self.pictures / f"scenes-{done:08d}.png"
            draw_scenes(pictures["val/scenes"], self.state, self.source, self.how, self.drawn, f"step {done:,}")
        return Observation(metrics=metrics("val", result), pictures=pictures)


def metrics(name: str, result: SegmentationResult) -> dict[str, float]:
    """The numbers for the trackers, by the name of a split."""
    return {
        f"{name}/miou": result.miou,
        f"{name}/mean_accuracy": result.mean_accuracy,
        f"{name}/pixel_accuracy": result.pixel_accuracy,
    }
