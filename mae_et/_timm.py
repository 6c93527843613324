"""timm without wandb, which `timm.utils.summary` imports if it can and nothing here needs.

Otherwise every process of every run loads W&B (1 to 2 s), and an installation of W&B that is broken in any way but
being absent ends runs that do not use it. Our own tracker imports it when it is asked for.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder


class WandbHiddenFromTimm(MetaPathFinder):
    """Finds no wandb for `timm.utils.summary`, and has no opinion on other imports."""

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name == "wandb":
            summary = getattr(sys.modules.get("timm.utils.summary"), "__spec__", None)
            if getattr(summary, "_initializing", False):
                raise ModuleNotFoundError("hidden from timm", name=name)


sys.meta_path.insert(0, WandbHiddenFromTimm())
