"""What tests of comparisons share."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mae_et.comparison import opening
from mae_et.config import RunConfig
from mae_et.config.kept import kept_config


@pytest.fixture(autouse=True, scope="session")
def _configurations_are_read_once() -> Iterator[None]:
    """Reading one takes longer than all that is done with it, and most differ in folder and seed alone."""
    known: dict[Any, RunConfig] = {}

    def read(path: Path, schema: type[RunConfig]) -> RunConfig:
        text = path.read_text()
        rest = re.sub(r"^(run|seed): .*$", "", text, flags=re.MULTILINE)
        if (schema, rest) not in known:
            known[schema, rest] = kept_config(path, schema)
        seed = re.search(r"^seed: (\d+)$", text, re.MULTILINE)
        assert seed is not None
        return replace(known[schema, rest], seed=int(seed[1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "kept_config", read)
        yield
