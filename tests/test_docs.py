"""What the pages for people say can be done: commands parse, configure and plan; keys, options and links exist."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib
import io
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torch.distributed.run import get_args_parser

from mae_et.__main__ import build_parser, main, parse
from mae_et.bench.subject import read_config
from mae_et.config import (
    ConfigError,
    DetectConfig,
    FinetuneConfig,
    PretrainConfig,
    ProbeConfig,
    RunConfig,
    SearchConfig,
    SegmentConfig,
    load_config,
    task_of,
)
from mae_et.detecting import plan_detection
from mae_et.labelled_plan import build_plan as build_labelled_plan
from mae_et.planning import build_plan, needs_calibration
from mae_et.probing import as_finetuning
from mae_et.reproduction.experiments import find, read_experiment
from mae_et.segmenting import plan_segmentation
from mae_et.supervised import settle_start
from tests.pages import (
    PAGES,
    REPOSITORY,
    RUNS_HERE,
    Block,
    Command,
    anchors,
    blocks,
    commands,
    commands_of,
    links,
    spans,
)
from tests.recipe_table import PAGE, with_tables

SCHEMAS = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "probe": ProbeConfig,
    "detect": DetectConfig,
    "segment": SegmentConfig,
    "search": SearchConfig,
}
# What a script calls with the configuration that its arguments come to.
SCRIPTS = {
    "pretrain.py": "mae_et.pretraining.pretrain",
    "finetune.py": "mae_et.finetuning.finetune",
    "linear_probe.py": "mae_et.probing.probe",
}
LAUNCHER = "follow_launcher"  # of each script: it ends a process whose parent dies
TASKS = {"knn": "probe", "detect": "detect", "segment": "segment", "search": "search", "evaluate": "pretrain"}
OUTSIDE = ("pip", "export", "wandb", "python3")  # parsed by others
OTHER_MODULES = ("pytest", "venv", "pip")
NO_KEY = re.compile(r"\.(yaml|json|jsonl|py|md|txt|csv|safetensors)\b|\(")  # files and calls, which look like keys
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


@contextlib.contextmanager
def at(place: object) -> Iterator[None]:
    """Whatever is refused within fails the test, with the place that it was read from."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            yield
    except SystemExit:
        pytest.fail(f"{place}: {complaint.getvalue().strip().splitlines()[-1]}", pytrace=False)
    except (AssertionError, ConfigError, OSError, ValueError) as error:
        pytest.fail(f"{place}: {error}", pytrace=False)


# Commands: each is taken apart as the program that it names would, and what trains is planned.


@every_page
def test_commands_parse_configure_and_plan(page):
    for command in commands(page):
        with at(command.place):
            check(command.words)


@pytest.mark.parametrize(
    "command",
    [
        "python pretrain.py --config configs/pretrain/demo.yaml data.rot=/data/photos",
        "python pretrain.py --config configs/pretrain/demo.yaml optim.batch=63 optim.accumulation=2",
        "python finetune.py --config configs/finetune/folder.yaml --evaluate",
        "python -m mae_et plan --config configs/pretrain/absent.yaml",
        "python -m mae_et detect --config configs/detect/folder.yaml model.head=yolo",
        "python -m mae_et reproduce table_99",
        "python -m mae_et anything",
        "torchrun --nproc-per-nodes 8 pretrain.py --config configs/pretrain/demo.yaml",
        "torchrun --nproc-per-node 3 pretrain.py --config configs/pretrain/demo.yaml",
        "python benchmarks/absent.py",
        "make coffee",
    ],
)
def test_what_cannot_be_done_is_refused(command):
    with pytest.raises(pytest.fail.Exception, match="here:1"), at("here:1"):
        check(command.split())


def test_commands_are_found():
    """Otherwise the test above could pass by finding none."""
    counts = {page.name: len(commands(page)) for page in PAGES}
    assert counts["README.md"] >= 8
    assert sum(counts.values()) > 60


def check(words: list[str]) -> None:
    """Raise for a command that its program would refuse."""
    is_tool = words[:3] == ["python", "-m", "mae_et"]
    if is_tool:
        assert words[3] in tools(), f"python -m mae_et has no {words[3]}"
    if "..." in words or (is_tool and len(words) == 4) or re.search(r"<\w+>", " ".join(words)):
        # Spoken of, or with something left out: of that nothing is known.
        options = {word.partition("=")[0] for word in words if re.match(r"--\w", word)}
        assert options <= known_options(), f"unknown: {', '.join(sorted(options - known_options()))}"
    elif words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets), f"the Makefile has no target of {words[1:]}"
    elif words[0] == "torchrun":
        options = get_args_parser().parse_args(words[1:])
        script = ["-m", options.training_script] if options.module else [options.training_script]
        counts = [str(options.nnodes).rpartition(":")[2], str(options.nproc_per_node)]
        ranks = int(counts[0]) * int(counts[1]) if all(count.isdigit() for count in counts) else 1
        check_python([*script, *options.training_script_args], ranks)
    elif words[0] in ("sbatch", "launch/ssh.sh"):
        script = words[1] if words[0] == "sbatch" else words[0]
        assert (REPOSITORY / script).is_file(), f"there is no {script}"
        check_python(words[words.index("--") + 1 :] if "--" in words else words[2:], 1)
    elif words[0] == "pip":
        extras = (REPOSITORY / "pyproject.toml").read_text()
        for name in re.findall(r"mae_et\[(\w+)\]", " ".join(words)):
            assert f"\n{name} = [" in extras, f"pyproject.toml has no extra {name}"
    elif words[0] not in OUTSIDE:
        check_python(words[1:], 1)


def check_python(words: list[str], ranks: int) -> None:
    """Raise for arguments of Python that a script or module of ours would refuse."""
    if words[0] in SCRIPTS:
        check_plan(configured(words[0], words[1:]), ranks)
    elif words[:2] == ["-m", "mae_et"]:
        check_tool(parse(words[2:]), words[2], ranks)
    elif words[0] == "-m":
        module = REPOSITORY / words[1].replace(".", "/")
        known = words[1] in OTHER_MODULES or module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()
        assert known, f"there is no module {words[1]}"
    else:
        assert (REPOSITORY / words[0]).is_file(), f"there is no {words[0]}"
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        missing = [option for option in options if f'"{option}"' not in (REPOSITORY / words[0]).read_text()]
        assert not missing, f"{words[0]} has no {', '.join(missing)}"


def configured(script: str, words: list[str]) -> RunConfig:
    """The configuration that a script of ours would start with."""
    module = importlib.import_module(script.removesuffix(".py"))
    started: list[RunConfig] = []
    complaint = io.StringIO()

    def note(config: RunConfig, *_: object, **__: object) -> int:
        started.append(config)
        return 0

    refused = contextlib.suppress(SystemExit)
    with refused, contextlib.redirect_stderr(complaint), patch(SCRIPTS[script], note), patch.object(module, LAUNCHER):
        module.main(words)
    assert started, complaint.getvalue().strip()
    return started[0]


def check_tool(options: argparse.Namespace, command: str, ranks: int) -> None:
    """Raise for a sub-command of `python -m mae_et` whose configuration would be refused."""
    path: Any = getattr(options, "config", None)
    if command == "reproduce":
        if options.name is not None:
            scales = read_experiment(find(options.name)).scales
            assert options.scale in scales or "table" in scales, f"{options.name} has no scale {options.scale}"
    elif command == "bench":
        check_plan(read_config(path, options.overrides), ranks)
    elif command in ("plan", "calibrate"):
        check_plan(load_config(path, options.overrides, SCHEMAS[task_of(path)]), ranks)
    elif command == "predict":
        keys = {override.partition("=")[0] for override in options.overrides}
        assert keys <= known_keys("detect") | known_keys("segment"), f"unknown: {keys}"
    elif command in TASKS:
        config = load_config(path, options.overrides, SCHEMAS[TASKS[command]])
        if command in ("detect", "segment"):
            check_plan(config, ranks)
    elif command == "similarity" or command == "spectrum":
        load_config(None, options.overrides)


PLANNED: set[str] = set()


def check_plan(config: RunConfig, ranks: int) -> None:
    """Raise where no plan can be made; numbers stand in for images and a network for a checkpoint that are not here."""
    config = copy.deepcopy(config)
    config.run, config.data.root = "", None  # pyright: ignore[reportAttributeAccessIssue] - a search has no plan
    if isinstance(config, FinetuneConfig | ProbeConfig | DetectConfig | SegmentConfig):
        config.checkpoint, config.data.images, config.data.classes = None, config.data.images or 20_000, 10
        config.model.name = config.model.name or "vit_tiny"
    if f"{ranks} {config}" in PLANNED:
        return
    PLANNED.add(f"{ranks} {config}")
    if isinstance(config, PretrainConfig):
        if not needs_calibration(config):
            build_plan(config, config.data.images or 100_000, ranks)
        return
    if isinstance(config, DetectConfig):
        plan_detection(config)
    elif isinstance(config, SegmentConfig):
        plan_segmentation(config)
    elif isinstance(config, FinetuneConfig) and not needs_calibration(config):
        build_labelled_plan(config, settle_start(config).backbone, config.data.images or 0, 10, ranks)
    elif isinstance(config, ProbeConfig) and config.protocol == "mae":
        tuned = as_finetuning(config)
        build_labelled_plan(tuned, settle_start(tuned).backbone, config.data.images or 0, 10, ranks, frozen=True)


# Keys and options in the text.


@cache
def known_keys(task: str) -> frozenset[str]:
    """Dotted keys of a kind of run, sections included."""
    found = set()

    def walk(section: Any, prefix: str) -> None:
        for item in dataclasses.fields(section):
            found.add(prefix + item.name)
            value = getattr(section, item.name)
            if dataclasses.is_dataclass(value):
                walk(value, f"{prefix}{item.name}.")

    walk(SCHEMAS[task](), "")
    return frozenset(found)


@cache
def tools() -> dict[str, argparse.ArgumentParser]:
    """The parsers of `python -m mae_et`'s sub-commands."""
    (found,) = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found.choices)


@cache
def known_options() -> frozenset[str]:
    """Options of every program that the pages speak of: ours, torchrun's, and those in our scripts."""
    parsers = [*tools().values(), get_args_parser()]
    found = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    files = [REPOSITORY / name for name in SCRIPTS]
    for folder in ("launch", "benchmarks", "tests/torture"):
        files += [path for path in (REPOSITORY / folder).glob("*") if path.is_file()]
    for path in files:
        found |= set(re.findall(r"--[a-z][\w-]+", path.read_text()))
    return frozenset(found)


@every_page
def test_keys_and_options_in_the_text_exist(page):
    keys = frozenset[str]().union(*map(known_keys, SCHEMAS))
    sections = {key.partition(".")[0] for key in keys if "." in key}
    for place, text in spans(page):
        for word in text.split():
            key = re.match(r"([a-z_]+)\.[a-z_.]+", word)
            is_key = (
                key
                and key[1] in sections
                and not re.search(r"\.(yaml|json|jsonl|py|md|txt|csv|safetensors)\b|\(", word)
            )
            if key and is_key:
                assert key[0].rstrip(".") in keys, f"{place}: no kind of run has a key {key[0]}"
            option = re.match(r"--[a-z][\w-]+", word)
            if option:
                assert option[0] in known_options(), f"{place}: no program has an option {option[0]}"


# Links.


@every_page
def test_links_lead_somewhere(page):
    for place, target in links(page):
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{place}: there is no {target}"
        if anchor:
            assert anchor in anchors(linked), f"{place}: {linked.name} has no heading #{anchor}"


def test_pictures_are_small():
    pictures = list((REPOSITORY / "docs" / "pictures").glob("*"))
    assert pictures
    assert all(picture.stat().st_size < 150_000 for picture in pictures)


# Blocks of code.


@every_page
def test_python_compiles_and_yaml_configures(page, tmp_path):
    for block in blocks(page):
        with at(block.place):
            if block.language == "python":
                compile("\n".join(block.lines), str(block.place), "exec")
            elif block.language == "yaml":
                path = tmp_path / "block.yaml"
                path.write_text("\n".join(block.lines))
                load_config(path, [], SCHEMAS[task_of(path)])


HERE = [block for page in PAGES for block in blocks(page) if block.marker == RUNS_HERE]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder like the repository, where commands may leave what they make for later ones."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "docs", "benchmarks", *SCRIPTS):
        (folder / name).symlink_to(REPOSITORY / name)
    return folder


@pytest.mark.parametrize("block", HERE, ids=lambda block: str(block.place))
def test_what_runs_here_runs(block: Block, checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    if block.language == "python":
        exec(compile("\n".join(block.lines), str(block.place), "exec"), {})
        return
    found = commands_of(block)
    assert found
    for command in found:
        capsys.readouterr()
        with at(command.place):
            assert run(command) == 0, capsys.readouterr().err
        printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        for line in command.below:
            assert " ".join(line.split()) in printed, f"{command.place} does not print {line!r}"


def run(command: Command) -> int:
    """The exit code of a command of ours, within this process: a Python of its own takes seconds to start."""
    assert command.words[0] == "python", f"{command.place}: only Python runs here"
    script, *arguments = command.words[1:]
    if command.words[1:3] == ["-m", "mae_et"]:
        return main(command.words[3:])
    module = importlib.import_module(script.removesuffix(".py"))
    program: Callable[[list[str]], int] = module.main
    with patch.object(module, LAUNCHER):
        return program(arguments)


def test_recipe_tables_are_those_of_the_headers():
    text = PAGE.read_text()
    assert with_tables(text) == text, "docs/recipes.md is behind the headers: python -m tests.recipe_table"


def test_some_commands_run_here():
    assert len(HERE) >= 3
