"""A search from its configuration to the curriculum that it finds."""

from __future__ import annotations

import os

from mae_et.config import ConfigError, SearchConfig, differences, dump_config
from mae_et.config.kept import kept_config
from mae_et.curriculum.search import Candidate, Found, candidates_of, greedy, sequential
from mae_et.curriculum.stage import as_size
from mae_et.engine.run_folder import RunFolder, write_text_atomic
from mae_et.planning import needs_calibration
from mae_et.resuming import FREE_KEYS
from mae_et.running import Say, prepare_device
from mae_et.search.evidence import ALGORITHMS, CURRICULUM_FILE, spent_on, spent_text, write_evidence
from mae_et.search.images import open_images_of
from mae_et.search.scoring import SCORES
from mae_et.search.trainings import InterruptionError, Spent, Trainings
from mae_et.training import Trainable, load_any

BESIDES = (*FREE_KEYS, "keep_checkpoints")


def search(config: SearchConfig, say: Say = print, only_plan: bool = False) -> int:
    """Search, or continue a search: what is trained and scored already is not done again.

    Args:
        config: of the search.
        say: where announcements go.
        only_plan: say what it costs, and search nothing.

    Returns:
        0 when the curriculum is found, 128 + signal when a signal ended a training (it is saved then).

    Raises:
        ConfigError: settings that do not go together, or whatever the trainings refuse; nothing is trained then.
    """
    recipe = load_recipe(config)
    trainings = Trainings(config, recipe, open_images_of(config, recipe), axis_of(config), say)
    prepare_device(trainings.recipe)
    candidates = choose_candidates(config, trainings)
    trainings.check(candidates)
    planned = planned_cost(config, trainings, candidates)
    announce(config, trainings, candidates, planned, say)
    if only_plan:
        return 0
    with RunFolder(config.run) as folder:
        check_same_search(folder, config)
        write_text_atomic(folder.config_path, dump_config(config))
        try:
            found = run_algorithm(config, trainings, candidates)
        except InterruptionError as interrupted:
            say("interrupted; the same command continues the search")
            return interrupted.code
        trainings.finish()
        table = write_evidence(folder.path, config, trainings, found, planned)
        spent = spent_on(found, trainings)
        say(f"\nscores of the candidates (*: found):\n\n{table}\n\nspent: {spent_text(spent, trainings)}")
        say(f"found: curriculum={folder.path / CURRICULUM_FILE}; its picture: {folder.pictures / 'search.png'}")
    return 0


def load_recipe(config: SearchConfig) -> Trainable:
    """The recipe, once all that can be refused without images is.

    Raises:
        ConfigError: settings that do not go together.
    """
    if config.recipe is None:
        raise ConfigError("recipe is not set: give the YAML file of a training, e.g. recipe=configs/pretrain/demo.yaml")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a search runs in one process, without torchrun; accumulation makes room for large batches")
    recipe = load_any(config.recipe, config.overrides)
    allowed = SCORES[type(recipe)]
    if config.score not in allowed:
        raise ConfigError(f"score={config.score}: a {recipe.task} recipe is scored by one of {', '.join(allowed)}")
    if (config.score == "loss") != (config.objective == "loss_time"):
        raise ConfigError(
            f"objective={config.objective} with score={config.score}: loss_time takes a loss (score=loss), acc and "
            "error_time take an accuracy"
        )
    if config.algorithm == "sequential" and config.settle > 1 / config.stages:
        raise ConfigError(f"settle={config.settle} is more than a stage: at most {1 / config.stages:g} here")
    if config.algorithm == "greedy" and (len(config.mask_ratios) > 1 or len(config.batch_scales) > 1):
        raise ConfigError("algorithm=greedy goes down in B alone; sequential searches mask ratios and batch scales too")
    if not config.seeds or not config.bandwidths:
        raise ConfigError("seeds and bandwidths need at least one entry")
    if recipe.task == "finetune" and config.mask_ratios:
        raise ConfigError("mask_ratios: training on labels masks nothing")
    if needs_calibration(recipe):
        raise ConfigError(
            "the recipe's plan depends on measured times, which no two trainings share: search with epochs=..., "
            "replay.ratio=0 and curriculum.cost=flops in overrides"
        )
    return recipe


def check_same_search(folder: RunFolder, config: SearchConfig) -> None:
    """Refuse to continue a search with other settings than it began with.

    Raises:
        ConfigError: naming what differs, or that the folder holds something else.
    """
    if not folder.config_path.exists():
        return
    changed = differences(kept_config(folder.config_path, SearchConfig), config)
    essential = [change for change in changed if not change.startswith(BESIDES)]
    if essential:
        raise ConfigError(
            f"{folder.path} holds another search ({'; '.join(essential)}). Continue it with the values it began with, "
            "or choose another folder with run=..."
        )


def axis_of(config: SearchConfig) -> str:
    """What stages have equal shares of."""
    return {"sequential": "compute", "greedy": "epoch"}[config.algorithm] if config.axis == "auto" else config.axis


def choose_candidates(config: SearchConfig, trainings: Trainings) -> tuple[Candidate, ...]:
    """Candidates of a stage, the cheapest first.

    Raises:
        ConfigError: a size that is none, or is above the final one.
    """
    final = trainings.final.bandwidth
    try:
        sizes = [as_size(size) for size in config.bandwidths]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"bandwidths: {error}") from None
    above = [size for size in sizes if size[0] > final[0] or size[1] > final[1]]
    if above:
        raise ConfigError(f"bandwidths: {above[0]} is above the final size {final}")
    return candidates_of(sizes, config.mask_ratios, config.batch_scales)


def planned_cost(config: SearchConfig, trainings: Trainings, candidates: tuple[Candidate, ...]) -> Spent:
    """By the plans: exact for `sequential`, where it does not depend on what is found; the most for `greedy`."""
    seeds = len(config.seeds)
    if config.algorithm == "greedy":
        others = sum(candidate != trainings.final for candidate in candidates)
        return trainings.cost((trainings.final,) * config.stages) * ((config.stages + others) * seeds)
    total = Spent()
    for stage in range(config.stages - 1):
        for candidate in candidates:
            total += trainings.planned(stage, candidate) * seeds
    return total


def announce(
    config: SearchConfig, trainings: Trainings, candidates: tuple[Candidate, ...], planned: Spent, say: Say
) -> None:
    """Say what is searched and what it will cost."""
    names = ", ".join(candidate.name for candidate in candidates)
    say(
        f"{config.run}: {config.algorithm} search ({ALGORITHMS[config.algorithm]}) for {config.recipe}: "
        f"{config.stages} stages of equal shares of the {trainings.axis} axis, candidates {names}"
    )
    say(trainings.images.describe())
    most = "at most " if config.algorithm == "greedy" else ""
    say(f"cost: {most}{spent_text(planned, trainings)} (scores come on top)")
    if trainings.tuning is not None:
        say(f"each score is a fine-tuning of {trainings.tuning.epochs:g} epochs by {config.tuning.recipe}")
    if config.algorithm == "sequential" and trainings.axis == "compute" and config.objective != "acc":
        say("note: on the compute axis T is the same for all candidates but for rounding, and decides nothing")


def run_algorithm(config: SearchConfig, trainings: Trainings, candidates: tuple[Candidate, ...]) -> Found:
    """Search; trainings that were scored before are not made again."""
    if config.algorithm == "sequential":
        return sequential(config.stages, candidates, trainings.final, trainings.utility)
    return greedy(config.stages, candidates, trainings.final, trainings.utility, config.margin)
