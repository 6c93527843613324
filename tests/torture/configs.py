"""Bad configurations, through the real command line: a line that names what is wrong, and nothing written."""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mae_et.config import ConfigError, FinetuneConfig, PretrainConfig, load_config
from mae_et.config.loading import checked_keys
from tests.torture.runs import PLAIN, Kind, chance_of, shared, start

SECONDS = 5.0


@dataclass(frozen=True)
class Case:
    """One bad configuration.

    Attributes:
        names: what the message must have.
        changes: overrides on the command line.
        yaml: the file, "{}" for an empty one; None for one that is not there.
        code: exit code.
        labelled: a fine-tuning run.
    """

    names: str
    changes: tuple[str, ...] = ()
    yaml: str | None = "{}"
    code: int = 2
    labelled: bool = False


CASES = [
    # typing errors
    Case("optim.batch", ("optim.bacth=8",)),
    Case("data.workers", ("data.worker=2",)),
    Case("epochs", ("epoch=3",)),
    Case("optim.base_lr", yaml="optim: {bse_lr: 0.1}"),
    Case("vit_tiny", ("model.name=vit_tny",)),
    Case("hog", ("target.kind=hogg",)),
    Case("not of the form key=value", ("epochs",)),
    Case("not of the form key=value", ("=3",)),
    # wrong types
    Case("optim.batch", ("optim.batch=many",)),
    Case("epochs", ("epochs=[1, 2]",)),
    Case("data.flip", ("data.flip=perhaps",)),
    Case("optim.batch", yaml="optim: {batch: 8.5}"),
    Case("optim", yaml="optim: 8"),
    Case("data.scale", ("data.scale=0.5",)),
    Case("seed", ("seed=null",)),
    Case("tracking.tags", ("tracking.tags=3",)),
    # out of range
    Case("optim.batch", ("optim.batch=0",)),
    Case("optim.batch", ("optim.batch=-8",)),
    Case("epochs", ("epochs=-5",)),
    Case("epochs", ("epochs=0",)),
    Case("optim.base_lr", ("optim.base_lr=inf",)),
    Case("optim.base_lr", ("optim.base_lr=nan",)),
    Case("epochs", ("epochs=inf",)),
    Case("mask_ratio", ("mask_ratio=1",)),
    Case("mask_ratio", ("mask_ratio=-0.1",)),
    Case("optim.warmup", ("optim.warmup=1.5",)),
    Case("saving.keep", ("saving.keep=0",)),
    Case("saving.steps", ("saving.steps=-1",)),
    Case("data.scale", ("data.scale=[0, 1]",)),
    Case("data.scale", ("data.scale=[0.2]",)),
    Case("data.max_bad", ("data.max_bad=1.5",)),
    Case("data.timeout_minutes", ("data.timeout_minutes=0",)),
    Case("engine.parallel", ("engine.parallel=horovod",)),
    Case("seed", ("seed=-1",)),
    Case("optim.betas", ("optim.betas=[0.9, nan]",)),
    # what does not go together
    Case("patch", ("model.patch_size=5",)),
    Case("heads", ("model.heads=3",)),
    Case("batch of 1000", ("optim.batch=1000",)),
    Case("accumulation", ("optim.accumulation=3",)),
    Case("replay", ("selection.method=infobatch", "replay.ratio=1")),
    Case("budget", ("budget=4 fortnights",)),
    Case("efficienttrain_pp,", ("curriculum.preset=efficienttrain_ppp",)),
    Case("curriculum", ("curriculum=/no/such/curriculum.yaml",)),
    # files
    Case("no config file", yaml=None),
    Case("bad.yaml", yaml="optim: [batch: 8"),
    Case("bad.yaml", yaml="- a\n- b\n"),
    Case("bad.yaml", yaml="a: &x [*x"),
    Case("bad.yaml", yaml="\x00\x01\x02"),
    Case("bad.yaml", yaml="!!python/object/apply:os.system ['touch sentinel']"),
    Case("finetune", yaml="task: finetune"),
    Case("pretrain", yaml="task: dance"),
    Case("data", ("data.root=/no/such/folder",)),
    Case("data", ("data.root={empty}",)),
    Case("data", ("data.source=list", "data.root=/no/such/list.txt")),
    Case("data", ("data.source=imagenet2k",)),
    Case("data", ("data=/no/such/folder",), labelled=True),
    Case("/no/such/run", ("checkpoint=/no/such/run",), code=1, labelled=True),
    Case("augment", ("augment.mixup=-1",), labelled=True),
    Case("data.holdout", ("data.holdout=1.5",), labelled=True),
    Case("optim.layer_decay", ("optim.layer_decay=nan",), labelled=True),
    Case("model", ("model.name=timm/no_such_network",), labelled=True),
]


def bad_config(folder: Path, seed: int) -> None:
    """A configuration with a typing error, a wrong type or value, keys at odds, a bad or missing file"""
    case = CASES[seed % len(CASES)]
    config, empty, run = folder / "bad.yaml", folder / "empty", folder / "run"
    empty.mkdir()
    shared(folder)
    if case.yaml is not None:
        config.write_text(case.yaml if not case.labelled or "task" in case.yaml else f"task: finetune\n{case.yaml[2:]}")
    kind = Kind("labelled", labelled=True) if case.labelled else PLAIN
    lines = kind.lines(folder, run, *(change.format(empty=empty) for change in case.changes))
    lines[1] = str(config)
    started = start(lambda: kind.main(lines), folder / "logs")
    code = started.wait(60)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = used.ru_utime + used.ru_stime  # of computing: what else the machine does is no fault of ours
    told = f"{case.changes or case.yaml!r}: exit code {code}: {started.said()}"
    assert code == case.code, told
    lines_of_error = [line for line in started.err.splitlines() if line.startswith("error: ")]
    assert len(lines_of_error) == 1, told
    assert "Traceback" not in started.err, told
    assert case.names in started.err, f"does not name {case.names!r}: {told}"
    assert seconds < SECONDS, f"took {seconds:.1f} s: {told}"
    written = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock"] if run.exists() else []
    assert not written, f"written: {written}"
    assert not list(folder.rglob("sentinel")), "the configuration was executed"
    assert not Path("sentinel").exists(), "the configuration was executed"


VALUES = (
    *("nan", "inf", "-inf", "-1", "0", "1e308", "99999999999999999999", "null", "''", "[]", "{}", "[1, a]", "true"),
    *(
        "a b",
        "${x}",
        "${oc.env:HOME}",
        "???",
        "\\",
        "'",
        '"',
        ":",
        "- a",
        "é",
        "\x7f",
        "1_000",
        "0x10",
        "1e-400",
        "!!int a",
    ),
)


def fuzzed_config(folder: Path, seed: int) -> None:
    """Odd values for any key: a configuration or a ConfigError, and nothing else"""
    chance = chance_of("fuzzed_config", seed)
    for _ in range(20):
        schema = chance.choice((PretrainConfig, FinetuneConfig))
        keys = [key for kind in checked_keys(schema).values() for key in kind]
        key = chance.choice([*keys, key_of(chance.choice(keys)), "data", "optim", "curriculum", "curriculum.stages"])
        override = f"{key}={chance.choice(VALUES)}"
        try:
            load_config(None, [override], schema)
        except ConfigError as error:
            assert str(error).strip(), override
        except Exception as error:
            raise AssertionError(f"{override}: {type(error).__name__}: {error}") from error


def key_of(key: str) -> str:
    """A key with two letters exchanged."""
    return key[:-2] + key[-1] + key[-2]


TRIALS: dict[str, Callable[[Path, int], None]] = {"bad_config": bad_config, "fuzzed_config": fuzzed_config}
