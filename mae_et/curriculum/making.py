"""From stages to a plan: how many steps each gets, and what each step may ask for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from mae_et.curriculum.cost import TRAINING_FLOPS_PER_MULTIPLY_ADD, AreaCost, CostModel, Geometry
from mae_et.curriculum.plan import Plan, PlannedStage, stage_name
from mae_et.curriculum.schedule import LearningRate
from mae_et.curriculum.stage import Stage, format_size, patch_grid, visible_tokens

AXES = ("compute", "epoch", "step")


@dataclass(frozen=True)
class Replay:
    """Steps on images that were decoded before (EfficientTrain++ section 5.3).

    Attributes:
        ratio: replayed steps after each step on fresh images; 0 replays nothing.
        bytes: that the buffer may take, over all ranks.
        channels: of the images.
        stored_size: (height, width) in px of the images that workers hand over; None is the stage's B.
    """

    ratio: int = 0
    bytes: float = 4e9
    channels: int = 3
    stored_size: tuple[int, int] | None = None

    def batches(self, bandwidth: tuple[int, int], batch: int) -> int:
        """Batches of uint8 images that fit into the buffer."""
        height, width = self.stored_size or bandwidth
        return int(self.bytes // (batch * self.channels * height * width))


def auto_replay(data_seconds: float, step_seconds: float, most: int) -> int:
    """Replayed steps after each step on fresh images: the fewest that let the data path keep up with the steps.

    Args:
        data_seconds: in which the data path delivers a batch.
        step_seconds: of a step on a batch that is already there.
        most: the answer where fewer do not suffice.

    Returns:
        The smallest n with data_seconds / (n + 1) <= step_seconds, at most `most`.
    """
    return next((n for n in range(most) if data_seconds <= step_seconds * (n + 1)), most)


@dataclass(frozen=True)
class Terms:
    """What a plan is made of besides its stages; `Curriculum.plan` documents them."""

    epochs: float
    images: int
    batch: int
    patch_size: int = 16
    mask_ratio: float = 0.0
    cell: int | None = None
    final_size: tuple[int, int] | None = None
    cost: CostModel = field(default_factory=AreaCost)
    flops: CostModel | None = None
    learning_rate: LearningRate = field(default_factory=LearningRate)
    learning_rate_cap: float | None = None
    more_tokens: bool = False
    replay: Replay = field(default_factory=Replay)
    drop_last: bool = True
    ranks: int = 1
    accumulation: int = 1

    @property
    def epoch_images(self) -> int:
        """Images of a pass; a data set smaller than a batch has no whole one to keep: its passes run together."""
        whole = self.drop_last and self.images >= self.batch
        return self.images // self.batch * self.batch if whole else self.images


def make_plan(stages: Sequence[Stage], name: str, axis: str, magnitude: tuple[float, float], terms: Terms) -> Plan:
    """Turn stages into steps.

    With e(B) the cost of an image relative to the final size and k the stage's batch scale, a stage that holds a share
    f of the compute axis gets f * epochs * steps_per_epoch / (k * e(B)) steps, rounded to the nearest. On the epoch
    axis e(B) is 1, on the step axis k as well.

    Raises:
        ValueError: naming the stage and what to change; see `Curriculum.plan`.
    """
    check_ends(stages)
    if terms.epochs <= 0 or terms.images < 1 or terms.batch < 1:
        raise ValueError(
            f"epochs, images and batch must be positive; got {terms.epochs}, {terms.images}, {terms.batch}"
        )
    geometries = [stage_geometry(stage, index, terms) for index, stage in enumerate(stages)]
    reference = reference_geometry(geometries, terms)
    reference_cost = terms.cost(reference)
    planned, start = [], 0.0
    for index, (stage, geometry) in enumerate(zip(stages, geometries)):
        label, batch = stage_name(index, stage.bandwidth), terms.batch * stage.batch_scale
        check_batch(label, batch, geometry, reference, terms)
        per_image = terms.cost(geometry)
        share = (stage.end - start) * terms.epochs * terms.epoch_images / terms.batch
        steps = round(share / steps_divisor(axis, stage.batch_scale, per_image / reference_cost))
        if steps < 1:
            raise ValueError(
                f"{label} gets no step: {terms.epochs:g} epochs of {terms.epoch_images} images are too few for a batch "
                f"of {batch}; lower optim.batch, raise the budget, or take more images"
            )
        factor = learning_rate_factor(label, stage.batch_scale, terms)
        replay = terms.replay.ratio if stage.replay is None else stage.replay
        buffer = terms.replay.batches(stage.bandwidth, batch) if replay else 0
        if replay and not buffer:
            raise ValueError(
                f"{label}: a replay buffer of {terms.replay.bytes:g} bytes holds no batch of {batch} images: give it "
                "more with replay.gigabytes, or set replay.ratio=0"
            )
        planned.append(
            PlannedStage(
                index=index,
                start=start,
                end=stage.end,
                bandwidth=stage.bandwidth,
                grid=patch_grid(stage.bandwidth, terms.patch_size),
                visible=geometry.visible,
                masked=geometry.masked,
                batch=batch,
                steps=steps,
                passes=steps * batch / terms.epoch_images,
                cost_per_image=per_image,
                flops_per_image=terms.flops(geometry) * TRAINING_FLOPS_PER_MULTIPLY_ADD if terms.flops else None,
                peak_learning_rate=factor * terms.learning_rate.highest(start, stage.end),
                learning_rate_factor=factor,
                magnitude=stage.magnitude,
                low_pass=stage.low_pass,
                replay=replay,
                replay_batches=buffer,
            )
        )
        start = stage.end
    return Plan(
        name=name,
        axis=axis,
        cost_unit=getattr(terms.cost, "unit", "cost"),
        images=terms.images,
        epoch_images=terms.epoch_images,
        stages=tuple(planned),
        learning_rate=terms.learning_rate,
        magnitude=magnitude,
        reference_cost=reference_cost,
        reference_size=reference.bandwidth,
        epochs=terms.epochs,
    )


def check_ends(stages: Sequence[Stage]) -> None:
    """Raise ValueError unless the stages' ends rise strictly from above 0 to 1."""
    if not stages:
        raise ValueError("a curriculum needs at least one stage")
    start = 0.0
    for index, stage in enumerate(stages):
        if not stage.end > start:
            raise ValueError(
                f"{stage_name(index, stage.bandwidth)} ends at {stage.end}, not after {start}: ends must rise"
            )
        start = stage.end
    if start != 1.0:
        raise ValueError(
            f"{stage_name(len(stages) - 1, stages[-1].bandwidth)} ends at {start}: the last one must end at 1"
        )


def stage_geometry(stage: Stage, index: int, terms: Terms) -> Geometry:
    """Patches of a stage, all and visible.

    Raises:
        ValueError: patch or cell do not fit, or no patch stays visible; the message names the stage.
    """
    try:
        rows, columns = patch_grid(stage.bandwidth, terms.patch_size)
        tokens = rows * columns
        if terms.cell is not None and terms.patch_size % terms.cell:
            raise ValueError(f"the HOG cell of {terms.cell} px does not divide the patch of {terms.patch_size} px")
        if stage.visible is not None:
            if not 1 <= stage.visible <= tokens:
                raise ValueError(f"visible={stage.visible} is not among its 1 to {tokens} patches")
            return Geometry(stage.bandwidth, tokens, stage.visible)
        ratio = terms.mask_ratio if stage.mask_ratio is None else stage.mask_ratio
        return Geometry(stage.bandwidth, tokens, visible_tokens(tokens, ratio))
    except ValueError as error:
        raise ValueError(f"{stage_name(index, stage.bandwidth)}: {error}") from None


def reference_geometry(geometries: Sequence[Geometry], terms: Terms) -> Geometry:
    """The image whose cost is the unit: one of the final size at the plan's mask ratio."""
    largest = max(geometries, key=lambda geometry: geometry.tokens).bandwidth
    size = terms.final_size or largest
    rows, columns = patch_grid(size, terms.patch_size)
    return Geometry(size, rows * columns, visible_tokens(rows * columns, terms.mask_ratio))


def steps_divisor(axis: str, scale: int, relative_cost: float) -> float:
    """What a step of a stage takes of its axis, in steps of the plain batch at the final size."""
    return {"compute": scale * relative_cost, "epoch": float(scale), "step": 1.0}[axis]


def check_batch(label: str, batch: int, geometry: Geometry, reference: Geometry, terms: Terms) -> None:
    """Raise ValueError for a batch that ranks do not divide, or of more tokens than the final size's."""
    shares = terms.ranks * terms.accumulation
    if batch % shares:
        per_rank = terms.batch // terms.accumulation if terms.batch % terms.accumulation == 0 else 0
        fitting = [str(ranks) for ranks in range(1, min(per_rank, 2 * terms.ranks) + 1) if per_rank % ranks == 0]
        ranks = f", or start it on {', '.join(fitting)} ranks" if fitting else ""
        raise ValueError(
            f"{label}: a batch of {batch} does not divide into {terms.ranks} ranks x {terms.accumulation} accumulation "
            f"steps; choose a multiple of {shares}{ranks}"
        )
    for kind in ("tokens", "visible"):
        asked, most = batch * getattr(geometry, kind), terms.batch * getattr(reference, kind)
        if batch > terms.batch and asked > most and not terms.more_tokens:
            raise ValueError(
                f"{label}: {batch} images have {asked:,} {kind}{'' if kind == 'tokens' else ' patches'}, more than the "
                f"{most:,} of {terms.batch} images at B={format_size(reference.bandwidth)}: lower batch_scale, or set "
                "curriculum.more_tokens to allow a step that takes more memory"
            )


def learning_rate_factor(label: str, scale: int, terms: Terms) -> float:
    """Of the peak, for a batch `scale` times as large: min(sqrt(scale), cap / peak) (EfficientTrain++ Eq. 2).

    Raises:
        ValueError: no cap for a larger batch, or one below the peak itself.
    """
    if scale == 1:
        return 1.0
    cap, peak = terms.learning_rate_cap, terms.learning_rate.peak
    if cap is None:
        raise ValueError(
            f"{label}: batch_scale={scale} raises the peak learning rate {math.sqrt(scale):.3g}-fold (EfficientTrain++ "
            f"Eq. 2): say with curriculum.lr_cap how far it may go; the peak is {peak:g}"
        )
    if cap < peak:
        raise ValueError(
            f"curriculum.lr_cap={cap:g} is below the peak learning rate {peak:g}: it caps what larger batches add"
        )
    return min(math.sqrt(scale), cap / peak)
