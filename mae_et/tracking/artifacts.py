"""A checkpoint as a W&B artifact: where it lies, with what tells it from others."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The last whole checkpoint of a run's folder of them; its hashes are not checked again."""
    whole = [path for path in checkpoints.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return max(whole, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def checkpoint_artifact(wandb: ModuleType, checkpoint: Path, run_id: str, config: Mapping[str, Any]) -> Any:
    """An artifact of type "model", named by its run.

    Args:
        wandb: the library.
        checkpoint: its folder.
        run_id: of the run.
        config: of the W&B run, whose lineage is repeated in the metadata.
    """
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    metadata = {
        "step": int(checkpoint.name.removeprefix("step-")),
        "run_id": run_id,
        "sha256": {name: facts["sha256"] for name, facts in files.items()},
        **{key: config[key] for key in ("task", "parent_run_id", "parent_checkpoint_sha256") if key in config},
    }
    artifact = wandb.Artifact(_name(run_id), type="model", metadata=metadata)
    for path in sorted(checkpoint.iterdir()):
        # W&B takes it from where it lies, with a copy neither on its way (immutable) nor kept (skip_cache).
        artifact.add_file(str(path), name=path.name, policy="immutable", skip_cache=True)
    return artifact


def put_command(checkpoint: Path, run_id: str, entity: str | None, project: str) -> str:
    """What sends a checkpoint later. `wandb sync` does not: wandb 0.31 has no artifacts in the log of an online run."""
    name = "/".join(filter(None, (entity, project, _name(run_id))))
    return f"wandb artifact put --type model --name {shlex.quote(name)} {shlex.quote(str(checkpoint.absolute()))}"


def _name(run_id: str) -> str:
    # One for all checkpoints of a run: later ones are later versions of it.
    return f"checkpoint-{run_id}"
