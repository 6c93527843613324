"""Where a run goes on from, and what it leaves to go on from; the main rank touches the run's folder for all."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from mae_et.config import ConfigError, RunConfig, differences
from mae_et.config.kept import kept_config, read_kept
from mae_et.config.plain import read_yaml
from mae_et.curriculum.plan import Plan
from mae_et.data.replacing import Readable
from mae_et.engine.checkpoint import Checkpoint, CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from mae_et.engine.distributed import Ranks, gather_objects, on_main
from mae_et.engine.parallel import gathered, share_checkpoint
from mae_et.engine.run_folder import RunFolder
from mae_et.engine.state import TrainState
from mae_et.engine.status import StatusFile, saved_before
from mae_et.planning import plan_of
from mae_et.tracking import read_metrics

# What may differ between the starts of one run: where and how it runs, not what it learns.
FREE_KEYS = (
    *("run", "data.root", "data.images", "data.classes", "data.download", "data.workers", "data.max_pixels"),
    *("data.max_bad", "data.timeout_minutes", "optim.accumulation"),
    *("engine.", "saving.", "tracking.", "evaluation.", "calibration."),
)


def find_checkpoint(folder: RunFolder, resume: str, ranks: Ranks) -> Checkpoint | None:
    """The checkpoint to continue from, the same on all ranks; None begins anew.

    Raises:
        ConfigError: the folder already holds a run and `resume` does not continue it.
        CheckpointError: there are checkpoints, and none is whole; or there were some, and all are gone.
        RunFolderError: nobody can tell whether there were some.
    """
    return share_checkpoint(partial(_read_checkpoint, folder, resume), ranks)


def _read_checkpoint(folder: RunFolder, resume: str) -> Checkpoint | None:
    found = latest_checkpoint(folder.checkpoints)
    newest = None if found is None else str(found.path)
    wanted = newest if resume == "auto" else None if resume == "never" else resume
    if newest is not None and (wanted is None or Path(wanted).resolve() != Path(newest).resolve()):
        # To go back within a folder would leave later checkpoints behind, from which a crash would resume.
        raise ConfigError(
            f"{folder.path} already holds a run, up to {newest}; continue that with --resume auto, or choose another "
            "folder with run=..."
        )
    if wanted is None and resume == "auto":
        step = saved_before(folder.status_path)
        if step is not None:
            raise CheckpointError(
                f"{folder.path} holds a run that was saved at step {step:,}, and {folder.checkpoints} holds no "
                "checkpoint: it does not begin anew by itself. Put the checkpoints back, or choose another folder "
                "with run=..."
            )
    if wanted is None:
        _refuse_other_use(folder)
    return None if wanted is None else found or load_checkpoint(Path(wanted))


def _refuse_other_use(folder: RunFolder) -> None:
    """A new run writes its config.yaml; one that is there already must be a run's, and not some other program's."""
    if not folder.config_path.exists():
        return
    try:
        values = read_yaml(folder.config_path, follow=False)
    except (OSError, ValueError):
        values = {}
    if not {"task", "run", "seed"} <= values.keys():
        raise ConfigError(
            f"{folder.config_path} is there already, and no run wrote it: choose another folder with run=..."
        )


def check_same_run(folder: RunFolder, config: RunConfig, plan: Plan, ranks: Ranks) -> None:
    """Refuse to continue a run with another configuration or another plan than it began with.

    Raises:
        ConfigError: naming what differs.
    """
    on_main(ranks, partial(_check_same_run, folder, config, plan))


def _check_same_run(folder: RunFolder, config: RunConfig, plan: Plan) -> None:
    if folder.config_path.exists():
        changed = differences(kept_config(folder.config_path, type(config)), config)
        essential = [change for change in changed if not change.startswith(FREE_KEYS)]
        if essential:
            raise ConfigError(
                f"{folder.path} holds a run of another configuration, by its config.yaml ({'; '.join(essential)}). "
                "Continue it with the values it began with, or choose another folder with run=..."
            )
    if folder.plan_path.exists():
        old = read_kept(folder.plan_path, plan_of)
        if old != plan:
            raise ConfigError(
                f"{folder.plan_path} was made for {old.images} images and {old.total_steps} steps, the plan now is for "
                f"{plan.images} images and {plan.total_steps} steps: the data set has changed; choose run=..."
            )


def restore(state: TrainState, checkpoint: Checkpoint) -> None:
    """Continue from a checkpoint; all ranks call it together.

    Raises:
        CheckpointError: it is of another model.
    """
    try:
        state.restore(checkpoint)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        first = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise CheckpointError(f"{checkpoint.path} does not fit this configuration: {first}") from None


def save_state(state: TrainState, folder: RunFolder, keep: int, ranks: Ranks, status: StatusFile) -> None:
    """Write a checkpoint, on the main rank; all ranks call it together, and all raise what it raises.

    Raises:
        SaveError: the disk has no room, or fails.
        CheckpointError: the weights are not finite.
    """
    if state.selection is not None:
        state.selection.gather()
    if state.bad_images is not None:
        state.bad_images.gather()
    tensors, values = gathered(state.tensors(), ranks), state.values()

    def write() -> None:
        save_checkpoint(folder.checkpoints, state.step, tensors, values, keep)
        status.update(saved_step=state.step)

    on_main(ranks, write)


def check_same_everywhere(source: Readable, plan: Plan) -> None:
    """Refuse to train where ranks see other images or another plan; all ranks call it together.

    Raises:
        ConfigError: naming the rank.
    """
    # Names without folders, which may differ between hosts; a few of them, because nothing reads all of a large set.
    names = [source.describe(i).rpartition("/")[2] for i in {0, len(source) // 2, len(source) - 1}]
    facts = gather_objects((len(source), names, plan.total_steps, [stage.steps for stage in plan.stages]))
    for rank, found in enumerate(facts):
        if found != facts[0]:
            raise ConfigError(
                f"rank {rank} sees other images than rank 0: {found[0]:,} images ({', '.join(found[1])}, ...) and "
                f"{found[2]:,} steps, in place of {facts[0][0]:,} ({', '.join(facts[0][1])}, ...) and {facts[0][2]:,}; "
                "give every host the same images"
            )


def lost_steps(folder: RunFolder) -> str:
    """What an earlier start had done before its first checkpoint, for people; nothing where there was none."""
    try:
        rows = read_metrics(folder.metrics_path) if folder.metrics_path.exists() else []
    except ValueError as error:
        raise ConfigError(str(error)) from None
    done = max((row["step"] for row in rows if isinstance(row.get("step"), int)), default=0)
    return f": an earlier start got to step {done:,}, and ended before its first checkpoint" if done else ""
