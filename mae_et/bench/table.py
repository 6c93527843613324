"""A bench's report for people."""

from __future__ import annotations

from mae_et.bench.report import MicroBatch, Report, StageReport
from mae_et.curriculum.stage import format_size
from mae_et.curriculum.table import quantity, text_table

LEGEND = """\
micro, x: images at a time on each process, and how often a step takes so many; `-`: more than the recipe's batch
ms: of forward, backward and their part of the update; images/s, FLOP/s: of one process, its data there already
FLOP/s are 3 x forward, 2 to a multiply-add; of peak: share of the matrix peak; memory: {memory}"""

ROUGH = 0.1
"""Share by which repeats differ from which on a word is said."""

DATA_LEGEND = """\
1 worker: images/s of one worker process alone; asks for: workers that keep up with the step; to device: uint8 pixels
binds: the slower one with data.workers={workers}, and how many times as fast the other is"""


def report_text(report: Report) -> str:
    """Peak, table, data path and advice."""
    blocks = [peak_text(report), step_text(report)]
    if report.bindings is not None:
        blocks.append(data_text(report))
    else:
        blocks.append(f"the data path was not measured: {report.no_data}")
    if report.no_compile is not None:
        blocks.append(f"torch.compile was not measured: {report.no_compile}")
    return "\n\n".join(["", *blocks, advice_text(report)])


def peak_text(report: Report) -> str:
    """The matrix peak and the products it is the best of."""
    listed = ", ".join(f"{shape_text(p.shape)}: {quantity(p.flops_per_second)}" for p in reversed(report.products))
    where = f"{report.setting.threads} thread(s)" if report.setting.on_cpu else report.device
    lines = [f"matrix peak: {quantity(report.peak)}FLOP/s in {report.precision} on {where} (products {listed})"]
    if report.copy_bytes_per_second is not None:
        lines.append(f"host to device: {quantity(report.copy_bytes_per_second)}B/s from pinned memory")
    rough = "; the machine is busy with other work, and all below is rough" if report.setting.noise > ROUGH else ""
    differ = f"repeats of the same steps differ by {100 * report.setting.noise:.0f} %{rough}"
    lines.append(differ if report.setting.noise else "no step was timed twice, so that all is rough: raise --seconds")
    return "\n".join(lines)


def shape_text(shape: tuple[int, int, int]) -> str:
    """`m x k x n`."""
    return " x ".join(map(str, shape))


def step_text(report: Report) -> str:
    """Every micro-batch of every stage; the advised one is marked."""
    header = ["B", "visible", "micro", "x", "ms", "images/s", "FLOP/s", "of peak", "memory", ""]
    rows = []
    for stage in report.stages:
        for place, micro in enumerate(stage.micro_batches):
            name = [format_size(stage.bandwidth) + (" low-pass" if stage.filtered else ""), str(stage.visible)]
            rows.append([*(name if place == 0 else ["", ""]), *cells(micro), "<" if place == stage.chosen else ""])
    memory = "of the process until then" if report.setting.on_cpu else "peak of tensors"
    return f"{text_table(header, rows)}\n{LEGEND.format(memory=memory)}; <: what the rest is reckoned with"


def cells(micro: MicroBatch) -> list[str]:
    """Cells of a micro-batch."""
    start = [str(micro.images), "-" if micro.accumulation is None else str(micro.accumulation)]
    if micro.seconds is None or micro.images_per_second is None or micro.of_peak is None:
        return [*start, "out of memory", "", "", "", ""]
    return [
        *start,
        f"{1000 * micro.seconds:.4g}",
        per_second(micro.images_per_second),
        quantity(micro.flops_per_second),
        f"{micro.of_peak:.2f}",
        "-" if micro.memory is None else f"{quantity(micro.memory)}B",
    ]


def data_text(report: Report) -> str:
    """What the workers deliver beside what the steps ask for."""
    assert report.bindings is not None
    header = ["B", "step, images/s", "1 worker", "asks for", "to device", "binds"]
    rows = []
    for stage, binding in zip(report.stages, report.bindings):
        assert stage.data is not None
        rows.append(
            [
                format_size(stage.bandwidth),
                per_second(stage.images_per_second),
                per_second(stage.data.images_per_second),
                f"{stage.images_per_second / stage.data.images_per_second:.2g}",
                f"{quantity(binding.device_bytes_per_second)}B/s",
                f"{binding.what} ({times(binding.factor)})",
            ]
        )
    text = f"{text_table(header, rows)}\n{DATA_LEGEND.format(workers=report.setting.workers)}"
    return text + side_by_side(report.stages[0])


def per_second(rate: float) -> str:
    """`23.4`, `1,488`."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def times(factor: float) -> str:
    """`1.25x`, `43x`."""
    return f"{factor:.2f}x" if factor < 10 else f"{factor:,.0f}x"


def side_by_side(stage: StageReport) -> str:
    """What became of the workers' rate when several ran at once."""
    data = stage.data
    if data is None or data.workers is None or data.together is None:
        return ""
    share = data.together / (data.workers * data.images_per_second)
    return f"\n{data.workers} workers at once deliver {share:.2f} of what so many alone would"


def advice_text(report: Report) -> str:
    """Reasons, and what to paste."""
    lines = [*report.advice.notes, ""]
    for title, changes in (
        ("to paste, changes time alone", report.advice.overrides),
        ("further, changes what is learned", report.advice.options),
    ):
        if changes:
            lines.append(f"{title}: " + " ".join(f"{key}={value}" for key, value in changes.items()))
    if not report.advice.overrides:
        lines.append("nothing to change that changes time alone")
    lines.append(f"({report.seconds:.0f} s, torch {report.torch}, {report.date})")
    return "\n".join(lines)
