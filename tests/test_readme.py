"""The README's own example and commands work as they stand."""

from __future__ import annotations

import re
import shlex

import torch

from mae_et.config import (
    DetectConfig,
    FinetuneConfig,
    PretrainConfig,
    ProbeConfig,
    SearchConfig,
    SegmentConfig,
    load_config,
    task_of,
)

COMMANDS = {
    "knn": ProbeConfig,
    "plan": PretrainConfig,
    "detect": DetectConfig,
    "segment": SegmentConfig,
    "calibrate": PretrainConfig,
    "evaluate": PretrainConfig,
    "search": SearchConfig,
}
SCHEMAS = {"pretrain.py": PretrainConfig, "finetune.py": FinetuneConfig, "linear_probe.py": ProbeConfig, "mae_et": None}


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
    found = 0
    for page in (repository / "README.md", *(repository / "docs").glob("*.md")):
        lines = page.read_text().replace("\\\n", " ").splitlines()
        for line in (line.strip() for line in lines if re.match(r" {4,}(python|torchrun) ", line)):
            words = shlex.split(line)
            if words[1].startswith("benchmarks/"):
                assert all((repository / word).exists() for word in words[1:3])
                continue
            if words[:2] == ["python", "-m"] and words[2].startswith("tests."):
                assert (repository / words[2].replace(".", "/")).exists() or (
                    repository / f"{words[2].replace('.', '/')}.py"
                ).exists()
                continue
            (schema,) = [kind for program, kind in SCHEMAS.items() if program in words]
            overrides = [word for word in words if re.fullmatch(r"[a-z_.]+=\S+", word)]
            if schema is None:
                command = words[words.index("mae_et") + 1]
                schema = COMMANDS.get(command)
            if schema is not None and "..." not in words:
                config = repository / words[words.index("--config") + 1] if "--config" in words else None
                if schema is PretrainConfig and config is not None:
                    schema = COMMANDS.get(task_of(config), schema)  # `plan` goes by the file
                load_config(config, overrides, schema)
                found += 1
    assert found >= 6


def test_links_within_the_repository_lead_somewhere(repository):
    for page in (repository / "README.md", *(repository / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
