"""What measurements call for: pure functions from a bench's stages to settings, with the reasons in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mae_et.bench.report import Advice, Binding, MicroBatch, Setting, StageReport
from mae_et.curriculum.making import auto_replay
from mae_et.curriculum.stage import format_size

HEADROOM = 1.25
"""Workers over what steps ask for: images differ in size, and a queue that is only just fed runs dry."""

CLOSE = 0.03
"""Differences below this share are taken for the measurement's own, or below the one that repeats showed."""

WORTHWHILE = 1.1
"""Times as fast as which a larger batch is worth a word, since it changes what is learned."""


def bind(stage: StageReport, setting: Setting, workers: int | None = None) -> Binding:
    """Which of step and data path decides the rate, with so many workers or those configured."""
    assert stage.data is not None
    delivered = stage.data.rate(setting.workers if workers is None else workers) * (setting.replay + 1)
    ratio = delivered / stage.images_per_second
    what, factor = ("step", ratio) if ratio >= 1 else ("data", 1 / ratio)
    return Binding(what, factor, stage.images_per_second * stage.image_bytes)


def margin(setting: Setting) -> float:
    """Share by which something must be faster to be advised."""
    return max(CLOSE, setting.noise)


def fitting(stage: StageReport) -> dict[int, MicroBatch]:
    """Micro-batches that were timed, by accumulation."""
    return {
        micro.accumulation: micro
        for micro in stage.micro_batches
        if micro.accumulation is not None and micro.images_per_second
    }


def out_of_memory(stage: StageReport, accumulation: int) -> bool:
    """Whether the stage's step in so many micro-batches does not fit: it failed, or a smaller one did."""
    failed = [micro.accumulation for micro in stage.micro_batches if micro.seconds is None]
    return any(count is not None and count >= accumulation for count in failed)


def best_accumulation(stages: Sequence[StageReport], setting: Setting) -> int | None:
    """The accumulation with which the plan takes least time; the configured one where that is about as good.

    None where no number of micro-batches was timed at all stages.
    """
    common = set.intersection(*(set(fitting(stage)) for stage in stages))
    if not common:
        return None
    seconds = {
        count: sum(stage.share / (fitting(stage)[count].images_per_second or math.inf) for stage in stages)
        for count in common
    }
    best = min(common, key=lambda count: seconds[count])
    own = setting.accumulation
    return own if seconds.get(own, math.inf) <= (1 + margin(setting)) * seconds[best] else best


def merge(parts: Sequence[Advice]) -> Advice:
    """All of several pieces of advice."""
    overrides = {key: value for part in parts for key, value in part.overrides.items()}
    options = {key: value for part in parts for key, value in part.options.items()}
    return Advice(overrides, options, tuple(note for part in parts for note in part.notes))


def advise(stages: Sequence[StageReport], setting: Setting) -> Advice:
    """All that the measurements call for."""
    parts = [advise_accumulation(stages, setting), advise_batch(stages, setting)]
    if all(stage.data is not None for stage in stages):
        parts.append(advise_workers(stages, setting))
    if any(stage.compile is not None for stage in stages):
        parts.append(advise_compile(stages, setting))
    if all(stage.threads for stage in stages):
        parts.append(advise_threads(stages, setting))
    return merge(parts)


def advise_accumulation(stages: Sequence[StageReport], setting: Setting) -> Advice:
    """`optim.accumulation`: it changes time and memory alone."""
    own, best = setting.accumulation, best_accumulation(stages, setting)
    full = [stage for stage in stages if out_of_memory(stage, own)]
    if best is None or best == own:
        note = f"optim.accumulation={own}: nothing else was faster" if best == own else ""
        if full:
            note = f"optim.accumulation={own}: memory does not suffice at {names(full)}; lower optim.batch"
        return Advice({}, {}, (note,) if note else ())
    change = {"optim.accumulation": str(best)}
    if full:
        why = f"the {per_process(setting, own)} images of accumulation={own} do not fit at {names(full)}"
        return Advice(change, {}, (f"optim.accumulation={best}: {why}",))
    if any(own not in fitting(stage) for stage in stages):
        said = f"optim.accumulation={own}: micro-batches of {per_process(setting, own)} images took too long to measure"
        return Advice({}, {}, (f"{said}, or too much memory; rates are those of accumulation={best}",))
    gain = sum(stage.share / stage_rate(stage, own) for stage in stages)
    gain /= sum(stage.share / stage_rate(stage, best) for stage in stages)
    return Advice(change, {}, (f"optim.accumulation={best}: {gain:.2f}x as fast as accumulation={own}",))


def stage_rate(stage: StageReport, accumulation: int) -> float:
    """Images a second of the stage in so many micro-batches, which were timed."""
    rate = fitting(stage)[accumulation].images_per_second
    assert rate is not None
    return rate


def per_process(setting: Setting, accumulation: int) -> int:
    """Images of a micro-batch on each process."""
    return setting.batch // (setting.processes * accumulation)


def names(stages: Sequence[StageReport]) -> str:
    """The stages' B, for a sentence."""
    return ", ".join(f"B={format_size(stage.bandwidth)}" for stage in stages)


def advise_batch(stages: Sequence[StageReport], setting: Setting) -> Advice:
    """A word on larger batches where they are faster; they change what is learned."""
    notes = []
    for stage in stages:
        within = max((micro.images_per_second or 0.0 for micro in fitting(stage).values()), default=0.0)
        larger = [micro for micro in stage.micro_batches if micro.accumulation is None and micro.images_per_second]
        best = max(larger, key=lambda micro: micro.images_per_second or 0.0, default=None)
        if best is not None and within and (best.images_per_second or 0.0) >= (WORTHWHILE + setting.noise) * within:
            gain, batch = (best.images_per_second or 0.0) / within, best.images * setting.processes
            notes.append(f"B={format_size(stage.bandwidth)}: a batch of {batch:,} would be {gain:.2f}x as fast")
    if notes:
        notes[-1] += " (optim.batch, or curriculum.early_large_batch with curriculum.lr_cap; changes what is learned)"
    return Advice({}, {}, tuple(notes))


def advise_workers(stages: Sequence[StageReport], setting: Setting) -> Advice:
    """`data.workers`, and what else there is where cores do not suffice for as many."""
    available = max(1, setting.cores // 2 if setting.on_cpu else setting.cores - 1)
    needed, hardest = max((workers_needed(stage, setting), index) for index, stage in enumerate(stages))
    wanted = max(1, math.ceil(HEADROOM * needed))
    advised = min(wanted, available)
    where = names([stages[hardest]])
    asks = f"at {where} the step asks for {needed:.2g} workers"
    short = [stage for stage in stages if bind(stage, setting, advised).what == "data"]
    overrides = {} if advised <= setting.workers <= available else {"data.workers": str(advised)}
    if not short:
        note = f"data.workers={advised} suffices: {asks}"
        return Advice(overrides, {}, (note,))
    notes = [
        f"data.workers={advised} is what {setting.cores} cores allow, and too few: {asks}; waits at {names(short)}"
    ]
    options = {} if setting.downsample == "resize" else {"data.downsample": "resize"}
    if options:
        notes.append(f"data.downsample=resize takes less of a worker than {setting.downsample}, and is not quite it")
    notes.append("`python -m mae_et pack` makes smaller files of the images, which decode faster (docs/packed.md)")
    notes.append("pretraining from JPEGs, data.decoder=turbojpeg decodes crops alone, to the same pixels")
    replays = [replay_needed(stage, setting, advised) for stage in stages]
    if max(replays) > setting.replay:
        options["replay.ratio"] = str(replays[0]) if len(set(replays)) == 1 else "auto"
        counts = ", ".join(f"{count} at {names([stage])}" for count, stage in zip(replays, stages))
        notes.append(f"replay.ratio: so many steps on images seen before hide the data path: {counts}")
    return Advice(overrides, options, tuple(notes))


def workers_needed(stage: StageReport, setting: Setting) -> float:
    """Workers whose images, each replayed as configured, are as many as the step takes."""
    assert stage.data is not None
    share = stage.data.rate(2) / 2  # side by side, where that was measured
    alone = stage.images_per_second / (stage.data.images_per_second * (setting.replay + 1))
    return alone if alone <= 1 else stage.images_per_second / (share * (setting.replay + 1))


def replay_needed(stage: StageReport, setting: Setting, workers: int) -> int:
    """Replayed steps after each fresh one that hide the data path, at most as many as `auto` may choose."""
    assert stage.data is not None
    return auto_replay(1 / stage.data.rate(workers), 1 / stage.images_per_second, setting.most_replay)


def advise_compile(stages: Sequence[StageReport], setting: Setting) -> Advice:
    """`engine.compile`: what compiled blocks save over the plan, against the seconds that compiling takes."""
    trials = [stage.compile for stage in stages if stage.compile is not None]
    spent = sum(trial.compile_seconds for trial in trials)
    ratios = [trial.compiled_seconds / trial.plain_seconds for trial in trials]
    middle = math.exp(sum(map(math.log, ratios)) / len(ratios))
    saved = saved_steps = 0.0
    for stage in stages:
        ratio = middle if stage.compile is None else stage.compile.compiled_seconds / stage.compile.plain_seconds
        plain = stage.batch / setting.processes / stage.images_per_second / (ratio if setting.compiles else 1)
        steps = stage.steps or stage.share / stage.batch  # in proportion, where the plan has none
        saved, saved_steps = saved + steps * plain * (1 - ratio), saved_steps + steps
    speed = ", ".join(f"{1 / ratio:.2f}x" for ratio in ratios)
    said = f"compiled blocks are {speed} as fast as plain ones (smallest and largest step), compiled in {spent:.0f} s"
    if saved <= 0 or middle > 1 - margin(setting):
        return Advice({"engine.compile": "never"} if setting.compiles else {}, {}, (f"engine.compile=never: {said}",))
    pays_after = math.ceil(spent * saved_steps / saved)
    said += f", which pays after {pays_after:,} steps"
    if any(stage.steps is None for stage in stages):
        return Advice({}, {}, (f"engine.compile: {said}",))
    total = sum(stage.steps or 0 for stage in stages)
    pays = saved > spent
    value = "always" if pays else "never"
    note = f"engine.compile={value}: {said}; the plan has {total:,}"
    return Advice({} if pays == setting.compiles else {"engine.compile": value}, {}, (note,))


def advise_threads(stages: Sequence[StageReport], setting: Setting) -> Advice:
    """`engine.threads`: the fewest that are about as fast as any."""
    counts = sorted(set.intersection(*(set(stage.threads or ()) for stage in stages)))
    seconds = {count: sum(stage.share / (stage.threads or {})[count] for stage in stages) for count in counts}
    fastest = min(seconds.values())
    best = next(count for count in counts if seconds[count] <= (1 + margin(setting)) * fastest)
    speeds = ", ".join(f"{count}: {seconds[counts[0]] / seconds[count]:.2f}x" for count in counts)
    note = f"engine.threads={best}: speed over {counts[0]} thread by threads: {speeds}"
    return Advice({} if best == setting.threads else {"engine.threads": str(best)}, {}, (note,))
