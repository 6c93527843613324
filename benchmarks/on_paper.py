"""What a plan asks of GPUs, on paper: `python benchmarks/on_paper.py --gpus 1 8 64`. Nothing is run on a GPU.

For each stage: seconds of arithmetic at an assumed share of the peak, and beside them what else a step needs, each
alone: copies to the device, decoding, the all-reduce of fp32 gradients, and launching kernels one by one.
"""

from __future__ import annotations

import argparse

from mae_et.config import load_config
from mae_et.curriculum.cost import CrossDecoderShape
from mae_et.curriculum.plan import PlannedStage
from mae_et.planning import build_plan, model_cost


def parameters(config) -> int:
    """Weights of encoder and decoder blocks and their projections, biases left out."""
    cost = model_cost(config)
    encoder, decoder = cost.encoder, cost.decoder
    crosses = isinstance(decoder, CrossDecoderShape)  # keys and values come from the encoder's width
    source, embedding = (encoder.width, 0) if crosses else (decoder.width, encoder.width * decoder.width)
    blocks = encoder.depth * encoder.width**2 * (4 + 2 * encoder.mlp_ratio)
    blocks += decoder.depth * decoder.width * (decoder.width * (2 + 2 * decoder.mlp_ratio) + 2 * source)
    ends = cost.patch_values * encoder.width + embedding + decoder.width * cost.target_values
    return int(blocks + ends)


def needs(stage: PlannedStage, gpus: int, weights: int, options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of each part of one step on one GPU, and cores that decode for it."""
    images = stage.batch / gpus
    compute = images * (stage.flops_per_image or 0) / (options.peak * options.share)
    height, width = stage.bandwidth
    # A ring sends each gradient twice, but for one share of it. Between nodes there is a ring for each network card.
    rate = options.nvlink if gpus <= options.per_node else min(options.nvlink, options.per_node * options.network)
    reduce = 2 * (gpus - 1) / gpus * 4 * weights / rate
    return {
        "images": images,
        "compute": 1e3 * compute,
        "copy": 1e3 * images * 3 * height * width / options.copy,
        "all-reduce": 1e3 * reduce,
        "launch": 1e3 * options.launches * options.launch,
        "cores": images / compute / options.decode,
    }


def main() -> None:
    """Print a table for each number of GPUs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/pretrain/vit_base_et400_hog.yaml")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--per-node", type=int, default=8)
    parser.add_argument("--peak", type=float, default=989e12, help="FLOP/s, dense bf16 (H100 SXM by its data sheet)")
    parser.add_argument("--share", type=float, default=0.35, help="of the peak that the step reaches (assumed)")
    parser.add_argument("--copy", type=float, default=50e9, help="bytes/s to the device (PCIe 5 x16, less overhead)")
    parser.add_argument("--nvlink", type=float, default=360e9, help="bytes/s of a ring within a node (of 450 a way)")
    parser.add_argument("--network", type=float, default=40e9, help="bytes/s of each GPU's network card (of 50)")
    parser.add_argument("--launches", type=float, default=1500, help="kernels of an eager step (counted, ViT-B)")
    parser.add_argument("--launch", type=float, default=5e-6, help="seconds to launch one (assumed)")
    parser.add_argument("--decode", type=float, default=850, help="images/s of a core: benchmarks/data_path.py")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    plan, weights = build_plan(config, images=1_281_167), parameters(config)
    print(f"{weights / 1e6:.0f} M weights, {100 * options.share:.0f} % of {options.peak / 1e12:.0f} TFLOP/s\n")
    print("| GPUs | B | images a GPU | compute, ms | copies | all-reduce | launches | most | cores a GPU |")
    print("|---|---|---|---|---|---|---|---|---|")
    for gpus in options.gpus:
        for stage in plan.stages:
            found = needs(stage, gpus, weights, options)
            times = {part: found[part] for part in ("compute", "copy", "all-reduce", "launch")}
            cells = [f"{value:.1f}" for value in times.values()]
            most = max(times, key=lambda part: times[part])
            start = f"| {gpus} | {stage.bandwidth[0]} | {found['images']:,.0f} | "
            print(start + " | ".join(cells) + f" | {most} | {found['cores']:.0f} |")


if __name__ == "__main__":
    main()
