"""What a bench found, as plain values; `Report.to_json` is what `--json` keeps.

All rates are of one process (one GPU), the slowest one's where there are several. FLOPs are counted as in plans: those
of the forward pass times 3, 2 to a multiply-add (`mae_et.curriculum.cost`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Product:
    """One matrix product, [m, k] times [k, n].

    Attributes:
        shape: (m, k, n).
        flops_per_second: median, in the run's number format.
    """

    shape: tuple[int, int, int]
    flops_per_second: float


@dataclass(frozen=True)
class MicroBatch:
    """A step on so many images.

    Attributes:
        images: of the micro-batch, on each process.
        accumulation: micro-batches of a step of the recipe's batch; None where this one is larger than that.
        seconds: of forward, backward and its part of the update, in steps of up to four of them; None where the
            device's memory does not suffice.
        images_per_second: at that rate.
        flops_per_second, of_peak: at that rate, and as a share of the matrix peak.
        memory: peak bytes: of tensors on a GPU; on a CPU of the whole process until then.
    """

    images: int
    accumulation: int | None
    seconds: float | None
    images_per_second: float | None
    flops_per_second: float | None
    of_peak: float | None
    memory: int | None


@dataclass(frozen=True)
class DataPath:
    """What workers deliver at a stage.

    Attributes:
        images_per_second: of one worker process, alone.
        workers, together: how many were tried side by side, and their images a second in all; None where one suffices.
    """

    images_per_second: float
    workers: int | None = None
    together: float | None = None

    def rate(self, workers: int) -> float:
        """Images a second of so many workers; side by side each may be slower than alone."""
        if workers <= 1 or self.workers is None or self.together is None:
            return max(1, workers) * self.images_per_second
        return workers * self.together / self.workers


@dataclass(frozen=True)
class CompileTrial:
    """Compiled blocks beside plain ones, in turns.

    Attributes:
        images: of the micro-batch.
        plain_seconds, compiled_seconds: of a step on it.
        compile_seconds: that the first steps took beyond others, from an empty cache.
    """

    images: int
    plain_seconds: float
    compiled_seconds: float
    compile_seconds: float


@dataclass(frozen=True)
class StageReport:
    """One geometry of the plan.

    Attributes:
        bandwidth: B, (height, width) in px.
        visible: patches that the encoder sees.
        filtered: whether a low-pass filter acts on the images.
        batch: images of a step, on all processes.
        steps: of the plan; None where the plan itself needs measured times.
        share: of the images that the plan trains on.
        flops_per_image: forward and backward.
        image: (channels, height, width) of an image as it reaches the device, a byte each.
        micro_batches: that were tried, smaller ones first.
        chosen: index of the one that other numbers are for: the advised one.
        data: None where no image was read.
        compile: None where it was not measured at this stage.
        threads: images a second by number of threads; None where they were not varied.
    """

    bandwidth: tuple[int, int]
    visible: int
    filtered: bool
    batch: int
    steps: int | None
    share: float
    flops_per_image: float
    image: tuple[int, int, int]
    micro_batches: tuple[MicroBatch, ...]
    chosen: int = 0
    data: DataPath | None = None
    compile: CompileTrial | None = None
    threads: dict[int, float] | None = None

    @property
    def step(self) -> MicroBatch:
        """The chosen micro-batch."""
        return self.micro_batches[self.chosen]

    @property
    def images_per_second(self) -> float:
        """Of the step with the chosen micro-batch, its data there already."""
        return self.step.images_per_second or 0.0

    @property
    def image_bytes(self) -> int:
        """Of an image on its way to the device."""
        channels, height, width = self.image
        return channels * height * width


@dataclass(frozen=True)
class Binding:
    """Which of step and data path decides a stage's rate.

    Attributes:
        what: "step" or "data".
        factor: how many times as fast the other one is.
        device_bytes_per_second: uint8 pixels that go to the device at the step's own rate.
    """

    what: str
    factor: float
    device_bytes_per_second: float


@dataclass(frozen=True)
class Setting:
    """What the recipe says, or came to by itself; and the machine.

    Attributes:
        workers, accumulation, batch, downsample, replay: of the configuration, `batch` over all processes.
        most_replay: that `replay.ratio=auto` may choose.
        compiles: whether blocks are compiled as configured.
        threads: of a process's CPU work.
        cores: that a process may use: its share of those that this job has; the fewest of any rank.
        on_cpu: whether steps run on those cores.
        processes: that share a batch.
        noise: share by which repeats of the same steps differed.
    """

    workers: int
    accumulation: int
    batch: int
    downsample: str
    replay: int
    most_replay: int
    compiles: bool
    threads: int
    cores: int
    on_cpu: bool
    processes: int
    noise: float = 0.0


@dataclass(frozen=True)
class Advice:
    """What to change.

    Attributes:
        overrides: {key: value} that change time alone, not what is learned.
        options: {key: value} that would help and change what is learned, or what is read.
        notes: a sentence for each finding.
    """

    overrides: dict[str, str]
    options: dict[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """All of a bench.

    Attributes:
        title: the network and the images, for people.
        device: its name.
        precision: autocast type.
        torch: its version.
        date: ISO 8601.
        setting: configured, and of the machine.
        products: of the matrix peak, the fastest last.
        copy_bytes_per_second: from pinned memory to the device; None on a CPU.
        stages: by geometry, smaller steps first.
        bindings: one for each stage, with the configured workers; None where no image was read.
        no_data, no_compile: why not, in words; None where it was measured.
        advice: what follows.
        seconds: that the bench took.
    """

    title: str
    device: str
    precision: str
    torch: str
    date: str
    setting: Setting
    products: tuple[Product, ...]
    copy_bytes_per_second: float | None
    stages: tuple[StageReport, ...]
    bindings: tuple[Binding, ...] | None
    no_data: str | None
    no_compile: str | None
    advice: Advice
    seconds: float

    @property
    def peak(self) -> float:
        """FLOP/s of the fastest product."""
        return self.products[-1].flops_per_second

    def to_json(self) -> str:
        """All of it as JSON, keys as the attributes here."""
        return json.dumps({"flops": "3 x forward, 2 to a multiply-add", **asdict(self)}, indent=1)
