"""NaN and infinity in losses, gradients, inputs and weights, on one rank or on all."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_et.engine.checkpoint import load_checkpoint
from mae_et.engine.tasks import Reconstruction
from tests.torture.runs import (
    PLAIN,
    Started,
    chance_of,
    check_loads,
    check_same,
    complete_checkpoints,
    last_step,
    locked,
    shared,
    weights,
    whole_run,
)

EPOCHS = "epochs=1"
STEPS = (1, 4, 9)  # a fault's place in the run; few, so that runs that skip the same step are shared


class BadGradient(torch.autograd.Function):
    """The identity, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, value: float) -> Tensor:
        ctx.value = value
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.value, None


def inject(where: str, value: float, steps: range, rank: int | None) -> None:
    """Put `value` into a loss, its gradient or the images at some steps, on one rank or (None) on all."""
    real_loss, real_prepare = Reconstruction.loss, Reconstruction.prepare

    def mine(now: Any) -> bool:
        return now.step in steps and rank in (None, int(os.environ.get("RANK", "0")))

    def loss(self: Any, network: Any, inputs: Any, now: Any) -> Tensor:
        found = real_loss(self, network, inputs, now)
        if not mine(now):
            return found
        if where == "gradient":
            return BadGradient.apply(found, value)
        # Added, infinity leaves the gradient finite; multiplied, it does not.
        return {"loss": found * value, "loss_alone": found + value}.get(where, found)

    def prepare(self: Any, batch: Any, now: Any, device: Any) -> Any:
        inputs = real_prepare(self, batch, now, device)
        if where == "input" and mine(now):
            images = inputs.images.float() / (255 if inputs.images.dtype == torch.uint8 else 1)
            images[0, :, :2, :2] = value
            inputs = inputs._replace(images=images)
        return inputs

    Reconstruction.loss, Reconstruction.prepare = loss, prepare  # type: ignore[method-assign]


def leave_out(step: int) -> None:
    """Let this process not update its weights at a step, without anything being wrong with it."""
    real, calls = torch.optim.AdamW.step, 0

    def update(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return None if calls == step + 1 else real(self, *args, **kwargs)

    torch.optim.AdamW.step = update  # type: ignore[method-assign]


def start_ranks(folder: Path, run: Path, ranks: int, before: Callable[[], None], *changes: str) -> list[Started]:
    """Start the run as so many ranks, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started.append(PLAIN.start(folder, run, EPOCHS, *changes, before=before, **(place if ranks > 1 else {})))
    return started


def that_skipped(folder: Path, ranks: int, step: int) -> str:
    """Weights of a run that left one step out."""
    room = shared(folder)
    run = room / f"skipped-{ranks}-{step}"
    with locked(room / f"{run.name}.lock"):
        if not run.with_suffix(".done").exists():
            shutil.rmtree(run, ignore_errors=True)
            for one in start_ranks(folder, run, ranks, lambda: leave_out(step)):
                assert one.wait() == 0, one.said()
            run.with_suffix(".done").touch()
    return weights(run)


def one_bad_step(folder: Path, seed: int) -> None:
    """NaN or infinity in the loss, the gradient or the input of a step, on one rank of two, on both, on the only one"""
    chance, run = chance_of("one_bad_step", seed), folder / "run"
    where = ("loss", "loss_alone", "gradient", "input")[seed % 4]
    value = chance.choice((math.nan, math.inf, -math.inf))
    ranks, step = chance.choice((1, 2, 2)), chance.choice(STEPS)
    rank = chance.choice((None, *range(ranks)))
    told = f"{value} in the {where} at step {step} on rank {rank} of {ranks}"
    expected = that_skipped(folder, ranks, step)
    fault = lambda: inject(where, value, range(step, step + 1), rank)  # noqa: E731
    started = start_ranks(folder, run, ranks, fault, "saving.steps=3")
    for one in started:
        assert one.wait() == 0, f"{told}: {one.said()}"
    assert weights(run) == expected, f"{told}: not the weights of a run that left that step out"
    state = load_checkpoint(complete_checkpoints(run)[-1]).state
    assert state["skipped"] == 1, f"{told}: counted {state['skipped']} skipped steps"


def bad_steps_in_a_row(folder: Path, seed: int) -> None:
    """NaN in every step from some step on"""
    chance, run = chance_of("bad_steps_in_a_row", seed), folder / "run"
    where, ranks = chance.choice(("loss", "gradient", "input")), 1 + seed % 2
    first, rank = chance.choice(STEPS), chance.choice((None, 0))
    fault = lambda: inject(where, math.nan, range(first, 10**6), rank)  # noqa: E731
    started = start_ranks(folder, run, ranks, fault, "engine.max_skipped=4", "saving.steps=1")
    for one in started:
        assert one.wait() == 1, f"exit code {one.code}: {one.said()}"
    assert "error: " in started[0].err, started[0].said()
    assert "not finite for 4 steps in a row" in started[0].err, started[0].said()
    assert "Traceback" not in started[0].err, started[0].said()
    rows = [json.loads(line) for line in (run / "nonfinite.jsonl").read_text().splitlines()]
    plan = {row["step"] for row in rows}
    assert plan == set(range(first, first + 4)), f"samples of steps {sorted(plan)}, not of the four from {first} on"
    assert len(rows) == 4 * 8, f"{len(rows)} samples of four batches of 8"
    assert all(Path(row["path"]).name.endswith(".png") for row in rows), rows[0]
    check_all_finite(run)
    again = start_ranks(folder, run, 1, lambda: None, "saving.steps=3")[0]
    assert again.wait() == 0, f"the run does not go on without the fault: {again.said()}"


def check_all_finite(run: Path) -> None:
    for path in complete_checkpoints(run):
        for name, tensor in load_checkpoint(path).tensors["model"].items():
            assert torch.isfinite(tensor).all(), f"{path.name}: {name} was saved with NaN or infinity"


def poison_weights(step: int, value: float) -> None:
    """Put `value` into a weight before a step, behind the engine's back."""
    real = Reconstruction.loss

    def loss(self: Any, network: Any, inputs: Any, now: Any) -> Tensor:
        if now.step == step:
            with torch.no_grad():
                next(parameter for parameter in network.parameters() if parameter.requires_grad).view(-1)[0] = value
        return real(self, network, inputs, now)

    Reconstruction.loss = loss  # type: ignore[method-assign]


def bad_weights(folder: Path, seed: int) -> None:
    """Weights that become NaN or infinite in memory"""
    chance, whole, run = chance_of("bad_weights", seed), whole_run(PLAIN, folder), folder / "run"
    step, value = chance.randrange(3, whole.steps - 1), chance.choice((math.nan, math.inf))
    started = PLAIN.start(folder, run, "saving.steps=2", before=lambda: poison_weights(step, value))
    assert started.wait() == 1, f"exit code {started.code}: {started.said()}"
    assert "error: " in started.err, started.said()
    assert "Traceback" not in started.err, started.said()
    check_all_finite(run)
    kept = check_loads(run, step // 2 * 2)
    assert kept is not None
    assert kept.step <= step < last_step(run) + 1, f"saved step {kept.step} after weights of step {step} were bad"
    again = PLAIN.start(folder, run, "saving.steps=2")
    assert again.wait() == 0, again.said()
    check_same(run, whole)


TRIALS: dict[str, Callable[[Path, int], None]] = {
    "one_bad_step": one_bad_step,
    "bad_steps_in_a_row": bad_steps_in_a_row,
    "bad_weights": bad_weights,
}
