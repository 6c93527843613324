"""Our training step beside transformers' ViTMAE and a plain MAE: `python benchmarks/step_peers.py --sizes 96 160 224`.

Each rival has a process of its own, set up as its users would, and all take blocks of steps in turn: same model, batch,
number format and threads, AdamW, images that are there already. FLOPs are those that the method needs (visible tokens
in the encoder, masked ones in the head), whatever a rival computes. The matrix peak is that of the best of three
products, measured in the same rounds. Peak memory is that of a process that has seen one size alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from mae_et.config import load_config
from mae_et.planning import build_plan, encoder_size

PRODUCTS = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 1024))

Step = Callable[[], object]


def our_step(config: Any, size: int, count: int) -> Step:
    """A step of mae_et through its own engine, on uint8 images."""
    from mae_et.data.loader import Batch
    from mae_et.engine.distributed import Ranks, choose_device
    from mae_et.engine.step import train_step
    from mae_et.engine.tasks import Reconstruction
    from mae_et.pretraining import build_state
    from mae_et.running import downsample_on_device, prepare_device

    prepare_device(config)
    state = build_state(config, Ranks(0, 1, choose_device(config.engine.device, 0)))
    state.network.train()
    plan, task = build_plan(config, images=1_000_000), Reconstruction(downsample_on_device(config.data.downsample))
    first = next(at for stage, at in zip(plan.stages, plan.boundaries) if stage.bandwidth == (size, size))
    images = torch.randint(0, 256, (count, config.data.channels, size, size), dtype=torch.uint8)
    batch = Batch(images, torch.zeros(count), torch.arange(count), torch.arange(count))
    return lambda: train_step(state, iter([batch]), plan.at(first), task, 1, config.optim.clip)


def plain_step(config: Any, size: int, count: int) -> Step:
    """A step of the plain MAE."""
    from plain_mae import PlainMAE

    model, shape = config.model, encoder_size(config)
    network = PlainMAE(
        size, model.patch_size, config.data.channels, *shape, model.decoder_width, model.decoder_depth,
        model.decoder_heads, visible_patches(config, size),
    )  # fmt: skip
    return step_of(network, network, config, size, count)


def transformers_step(config: Any, size: int, count: int) -> Step:
    """A step of transformers' ViTMAEForPreTraining."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    model, shape = config.model, encoder_size(config)
    patches = (size // model.patch_size) ** 2
    settings = ViTMAEConfig(
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        intermediate_size=int(shape.width * model.mlp_ratio),
        image_size=size,
        patch_size=model.patch_size,
        num_channels=config.data.channels,
        decoder_hidden_size=model.decoder_width,
        decoder_num_hidden_layers=model.decoder_depth,
        decoder_num_attention_heads=model.decoder_heads,
        decoder_intermediate_size=int(model.decoder_width * model.mlp_ratio),
        mask_ratio=1 - visible_patches(config, size) / patches,
        norm_pix_loss=True,
    )
    network = ViTMAEForPreTraining(settings)
    return step_of(network, lambda images: network(images).loss, config, size, count)


def step_of(network: torch.nn.Module, loss_of: Callable[..., Any], config: Any, size: int, count: int) -> Step:
    """The step as everybody writes it."""
    images = torch.randn(count, config.data.channels, size, size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    network.train()
    bf16 = config.engine.precision != "fp32"

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


RIVALS = {"mae_et": our_step, "plain": plain_step, "transformers": transformers_step}


def visible_patches(config: Any, size: int) -> int:
    """Patches that the stage of this size shows."""
    plan = build_plan(config, images=1_000_000)
    return next(stage.visible for stage in plan.stages if stage.bandwidth == (size, size))


def serve(pipe: Connection, rival: str, arguments: list[Any], size: int, count: int) -> None:
    """A rival's process: seconds a step of each block that is asked for; 0 steps ask for its peak memory in bytes."""
    config = load_config(*arguments)
    torch.set_num_threads(config.engine.threads)
    step = RIVALS[rival](config, size, count)
    while (steps := pipe.recv()) is not None:
        if steps == 0:
            pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            continue
        started = time.perf_counter()
        for _ in range(steps):
            step()
        pipe.send((time.perf_counter() - started) / steps)


def matrix_peak(dtype: torch.dtype) -> float:
    """FLOP/s of the best of the products, each at its fastest of five."""
    best = 0.0
    for m, k, n in PRODUCTS:
        a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        for _ in range(5):
            started = time.perf_counter()
            a @ b
            best = max(best, 2 * m * k * n / (time.perf_counter() - started))
    return best


def compare(options: argparse.Namespace, size: int) -> dict[str, Any]:
    """Median seconds a step of every rival at one size, and what follows."""
    target = [] if options.hog else ["target.kind=norm_pixel"]
    overrides = [*target, f"engine.threads={options.threads}", "engine.device=cpu", *options.overrides]
    arguments = [options.config, overrides]
    config, context = load_config(*arguments), get_context("spawn")
    pipes, processes = {}, []
    for rival in options.rivals:
        pipes[rival], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, rival, arguments, size, options.batch)))
        processes[-1].start()
    dtype = torch.float32 if config.engine.precision == "fp32" else torch.bfloat16
    seconds: dict[str, list[float]] = {rival: [] for rival in options.rivals}
    peaks = []

    def block(rival: str, steps: int) -> Any:
        pipes[rival].send(steps)
        return pipes[rival].recv()

    steps = {rival: max(1, round(options.seconds / min(block(rival, 1), block(rival, 2)))) for rival in options.rivals}
    for turn in range(options.rounds):
        peaks.append(matrix_peak(dtype))
        for rival in options.rivals if turn % 2 == 0 else options.rivals[::-1]:
            seconds[rival].append(block(rival, steps[rival]))
    memory = {rival: block(rival, 0) for rival in options.rivals}
    for rival, process in zip(options.rivals, processes):
        pipes[rival].send(None)
        process.join()
    flops = next(s for s in build_plan(config, images=1_000_000).stages if s.bandwidth == (size, size)).flops_per_image
    assert flops is not None
    peak, middle = statistics.median(peaks), {rival: statistics.median(values) for rival, values in seconds.items()}
    return {
        "size": size,
        "peak_gflops": peak / 1e9,
        "gflops_per_image": flops / 1e9,
        "rivals": {
            rival: {
                "seconds_per_step": middle[rival],
                "images_per_second": options.batch / middle[rival],
                "fraction_of_peak": flops * options.batch / middle[rival] / peak,
                "peak_memory_mb": memory[rival] / 1e6,
                # The median of the rounds' own ratios: a round's moods hit all rivals.
                "speed_of_ours": statistics.median(b / a for a, b in zip(seconds[options.rivals[0]], seconds[rival])),
            }
            for rival in options.rivals
        },
    }


def main() -> None:
    """Compare at every size and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/pretrain/vit_base_et400_hog.yaml")
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 160, 224])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a block of steps")
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS), choices=RIVALS, help="the first is the unit")
    parser.add_argument("--hog", action="store_true", help="ours with the recipe's target, the others with pixels")
    parser.add_argument("--json", help="a file for everything that was measured")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(options.threads)
    rows = []
    print(
        "| B | rival | images/s | of the peak | ours is as fast | peak memory |\n|---|---|---|---|---|---|", flush=True
    )
    for size in options.sizes:
        rows.append(compare(options, size))
        for rival, found in rows[-1]["rivals"].items():
            print(
                f"| {size} | {rival} | {found['images_per_second']:.1f} | {found['fraction_of_peak']:.2f} "
                f"| {found['speed_of_ours']:.2f}x | {found['peak_memory_mb']:,.0f} MB |",
                flush=True,
            )
    print("\nmatrix peak: " + ", ".join(f"{row['peak_gflops']:.0f} GFLOP/s" for row in rows))
    whole = max(rows, key=lambda row: row["size"])
    for row in rows:
        for rival in options.rivals:
            seconds = whole["rivals"][rival]["images_per_second"] / row["rivals"][rival]["images_per_second"]
            flops = row["gflops_per_image"] / whole["gflops_per_image"]
            print(f"{rival}, {row['size']} of {whole['size']} px: {seconds:.3f} of the time, {flops:.3f} of the FLOPs")
    if options.json:
        with open(options.json, "w") as file:  # noqa: PTH123
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
