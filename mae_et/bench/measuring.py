"""A bench from a configuration to its report; all ranks together, and the slowest counts."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch

from mae_et.bench.advice import HEADROOM, advise, best_accumulation, bind, fitting, workers_needed
from mae_et.bench.compiling import compare_compiled
from mae_et.bench.feeding import delivered, measure_workers
from mae_et.bench.matrix import copy_rate, measure_products, products, ranking
from mae_et.bench.report import Report, Setting, StageReport
from mae_et.bench.steps import Candidate, Geometry, measure_steps, micro_batch, noise, vary_threads
from mae_et.bench.subject import Subject, open_subject
from mae_et.bench.table import report_text
from mae_et.config import ConfigError, FinetuneConfig, PretrainConfig
from mae_et.curriculum.calibration import stage_key
from mae_et.curriculum.plan import Plan
from mae_et.curriculum.stage import format_size
from mae_et.engine.cores import process_cores
from mae_et.engine.distributed import Ranks, join_ranks, largest, leave_ranks, on_main
from mae_et.engine.run_folder import write_text_atomic
from mae_et.rehearsal import Rehearsal, device_name
from mae_et.running import Say, choose_workers, prepare_device

SHARES = {"peak": 0.12, "steps": 0.43, "data": 0.2, "threads": 0.1, "compile": 0.15}
"""Of the seconds, by what is measured."""


def bench(
    config: PretrainConfig | FinetuneConfig,
    seconds: float = 45.0,
    compiles: bool = True,
    out: str | None = None,
    say: Say = print,
) -> Report:
    """Measure, print, and keep; for a process, or the processes of torchrun, that do nothing else.

    Args:
        config: of the run.
        seconds: of measurements; what is long by itself (a step of a large model) takes longer.
        compiles: whether to compile blocks as well.
        out: a file for the report as JSON.
        say: where it is printed.
    """
    if not 0 < seconds < math.inf:
        raise ConfigError(f"--seconds {seconds:g}: needs a number of seconds above 0")
    prepare_device(config)
    ranks = join_ranks(config.engine.device)
    quiet = say if ranks.is_main else lambda _line: None
    try:
        report = measure(open_subject(config, ranks), ranks, seconds, compiles, quiet)
        quiet(report_text(report))  # first: the file may be refused
        if out is not None and ranks.is_main:
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(Path(out), report.to_json())
        return report
    finally:
        leave_ranks()


def measure(subject: Subject, ranks: Ranks, seconds: float, compiles: bool, say: Say) -> Report:
    """All measurements and what follows from them.

    Args:
        subject, ranks: of the run.
        seconds: of measurements.
        compiles: whether to compile blocks as well.
        say: where progress goes.
    """
    started, config = time.perf_counter(), subject.config
    times = {name: share * seconds for name, share in SHARES.items()}
    assembly = subject.rehearse(ranks, config.engine.compile)
    rehearsal = Rehearsal(assembly, ranks, config.seed, patience=seconds / 10)
    geometries = [Geometry(rehearsal, *pair) for pair in rehearsal.geometries()]
    setting = settings(subject, rehearsal, ranks)
    precision = assembly.state.precision.name
    say(f"{assembly.title}: {precision} on {ranks.count} x {device_name(ranks.device)}")
    say(f"bench: about {seconds:.0f} s" + (", and what compiling takes" if compiles or setting.compiles else ""))

    shapes = products(ranks.device)
    turns = [measure_products(shapes, precision, ranks.device, times["peak"] / 2)]
    candidates = measure_steps(geometries, setting.accumulation, times["steps"])
    setting = replace(setting, noise=noise([size for sizes in candidates for size in sizes]))
    turns.append(measure_products(list(turns[0]), precision, ranks.device, times["peak"] / 2))
    peak = ranking(turns)
    best = peak[-1].flops_per_second
    # Not a loop: its variable would keep the first state alive beside those that compiling makes.
    stages = [stage_report(geometry, sizes, subject.plan, best) for geometry, sizes in zip(geometries, candidates)]
    stages = choose(stages, setting)
    if subject.no_data is None:
        stages = add_data(stages, geometries, setting, times["data"])
    images = [stage.step.images for stage in stages]
    if setting.on_cpu and setting.cores > 1:
        varied = vary_threads(geometries, images, setting.cores, times["threads"])
        stages = [replace(stage, threads=found) for stage, found in zip(stages, varied)]
    title, copies = assembly.title, copy_rate(ranks.device, 1.0)
    del assembly, rehearsal, geometries  # compiling makes two states of its own
    no_compile = None if compiles else "--no-compile"
    if compiles:
        places = sorted({0, len(stages) - 1})
        sizes = [images[place] for place in places]
        trials, no_compile = compare_compiled(subject, ranks, places, sizes, times["compile"])
        stages = [replace(stage, compile=trials.get(place)) for place, stage in enumerate(stages)]
    return Report(
        title=title,
        device=device_name(ranks.device),
        precision=precision,
        torch=str(torch.__version__),
        date=on_main(ranks, lambda: datetime.now().astimezone().isoformat(timespec="seconds")),
        setting=setting,
        products=peak,
        copy_bytes_per_second=copies,
        stages=tuple(stages),
        bindings=None if subject.no_data else tuple(bind(stage, setting) for stage in stages),
        no_data=subject.no_data,
        no_compile=no_compile,
        advice=advise(stages, setting),
        seconds=time.perf_counter() - started,
    )


def settings(subject: Subject, rehearsal: Rehearsal, ranks: Ranks) -> Setting:
    """What the configuration says or comes to, and the machine."""
    config, on_cpu = subject.config, ranks.device.type == "cpu"
    ratio, wanted = config.replay.ratio, config.engine.compile
    return Setting(
        workers=choose_workers(config, ranks),
        accumulation=rehearsal.accumulation,
        batch=config.optim.batch,
        downsample=config.data.downsample,
        replay=ratio if isinstance(ratio, int) else 0,
        most_replay=config.replay.most,
        compiles=wanted == "always" or (wanted == "auto" and ranks.device.type == "cuda"),
        threads=torch.get_num_threads(),
        cores=-largest([-process_cores()])[0],  # the fewest of any rank, as all measure the same
        on_cpu=on_cpu,
        processes=ranks.count,
    )


def stage_report(geometry: Geometry, sizes: Sequence[Candidate], plan: Plan | None, peak: float) -> StageReport:
    """A geometry with its part in the plan; in the endless one's proportions where the run's own is not known."""
    stage, key = geometry.stage, stage_key(geometry.stage)
    whole, flops = plan or geometry.rehearsal.plan, stage.flops_per_image
    assert flops is not None
    same = [planned for planned in whole.stages if stage_key(planned) == key]
    return StageReport(
        bandwidth=stage.bandwidth,
        visible=stage.visible,
        filtered=stage.low_pass is not None,
        batch=stage.batch,
        steps=None if plan is None else sum(planned.steps for planned in same),
        share=sum(planned.images for planned in same) / whole.total_images,
        flops_per_image=flops,
        image=geometry.image,
        micro_batches=tuple(micro_batch(size, flops, peak) for size in sizes),
    )


def choose(stages: Sequence[StageReport], setting: Setting) -> list[StageReport]:
    """The stages with the micro-batch that is best for all; where none fits all, each with its largest within a step.

    Raises:
        ConfigError: not even the smallest micro-batch fits into memory.
    """
    count, found = best_accumulation(stages, setting), []
    for stage in stages:
        sizes = fitting(stage)
        if not sizes:
            raise ConfigError(
                f"B={format_size(stage.bandwidth)}: not even {stage.micro_batches[0].images} images fit into memory: "
                "take a smaller model, engine.parallel=fsdp on several GPUs, or another GPU"
            )
        micro = sizes[min(sizes) if count is None else count]
        found.append(replace(stage, chosen=stage.micro_batches.index(micro)))
    return found


def add_data(
    stages: Sequence[StageReport], geometries: list[Geometry], setting: Setting, seconds: float
) -> list[StageReport]:
    """The stages with the rate of one worker; where several are needed, with that of several side by side."""
    rates = measure_workers(geometries, 0.7 * seconds)
    found = [replace(stage, data=data) for stage, data in zip(stages, rates)]
    needed, hardest = max((workers_needed(stage, setting), place) for place, stage in enumerate(found))
    workers = min(int(HEADROOM * needed) + 1, setting.cores)
    if needed <= 1 or workers == 1:
        return found
    together = delivered(geometries[hardest], workers, 0.3 * seconds, turn=3)
    scale = together / rates[hardest].images_per_second
    return [
        replace(stage, data=replace(data, workers=workers, together=scale * data.images_per_second))
        for stage, data in zip(found, rates)
    ]
