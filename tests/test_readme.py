"""The README's own example and commands work as they stand."""

from __future__ import annotations

import re
import shlex

import torch

from mae_et.config import load_config


def test_the_library_example_runs(repository):
    (code,) = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    plan = names["plan"]
    assert names["step"] == plan.total_steps - 1  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.isfinite(names["loss"])  # pyright: ignore[reportArgumentType]


def test_commands_name_recipes_and_keys_that_exist(repository):
    lines = [line.strip() for line in (repository / "README.md").read_text().splitlines()]
    commands = [line for line in lines if "--config configs/" in line]
    assert len(commands) >= 3
    for line in commands:
        words = shlex.split(line)
        overrides = [word for word in words if re.fullmatch(r"[a-z_.]+=\S+", word)]
        load_config(repository / words[words.index("--config") + 1], overrides)
