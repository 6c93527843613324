"""From YAML and `a.b=c` overrides to checked dataclasses, and back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mae_et.config.plain import read_yaml, refuse_interpolation
from mae_et.config.pretrain import PretrainConfig
from mae_et.config.sections import Choices, Ranges, RunConfig

Config = TypeVar("Config", bound=RunConfig)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and says what to do."""


def load_config(
    path: Path | str | None,
    overrides: Sequence[str] = (),
    schema: type[Config] = PretrainConfig,  # pyright: ignore[reportArgumentType] - the commonest
) -> Config:
    """Defaults, then the YAML file, then `a.b=c` overrides.

    Args:
        path: of the YAML file; None takes the defaults.
        overrides: later ones win.
        schema: the kind of run.

    Raises:
        ConfigError: missing or malformed file, a file for another kind of run, unknown key (with the nearest known
            one), wrong type, value out of range or not among the choices.
    """
    config = OmegaConf.structured(schema)
    known = set(_keys(OmegaConf.to_container(config)))
    free_form = tuple(_free_form(schema()))
    layers: list[tuple[str, dict[Any, Any]]] = [] if path is None else [(str(path), _read(Path(path)))]
    if layers:
        _refuse_other_task(str(path), layers[0][1], schema)
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} is not of the form key=value, e.g. optim.batch=256")
        layers.append((override, _read_override(override)))
    for origin, values in layers:
        _expand(values, schema())
        _refuse_unknown(origin, values, known, free_form)
        _refuse_flat(origin, values, schema())
        try:
            config.merge_with(values)  # in place: `OmegaConf.merge` would copy everything once an override
        except (OmegaConfBaseException, OverflowError) as error:  # the latter of integers beyond all floats
            key = getattr(error, "full_key", None) or "?"
            raise ConfigError(f"{origin}: {key}: {str(error).splitlines()[0]}") from None
    if not config.run:
        config.run = f"runs/{Path(path).stem if path else config.task}"
    result = OmegaConf.to_object(config)
    assert isinstance(result, schema)
    validate(result)
    return result


def task_of(path: Path | str) -> str:
    """The kind of run that a YAML file configures: its `task`, "pretrain" where it names none.

    Raises:
        ConfigError: missing or malformed file.
    """
    return str(_read(Path(path)).get("task") or "pretrain")


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def as_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as nested plain values."""
    values = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Keys whose values differ, as `key: old -> new`."""
    before, after = (OmegaConf.structured(config) for config in (old, new))
    keys = dict.fromkeys(key for node in (before, after) for key in _keys(OmegaConf.to_container(node)))
    pairs = ((key, OmegaConf.select(before, key), OmegaConf.select(after, key)) for key in keys)
    return [f"{key}: {a} -> {b}" for key, a, b in pairs if a != b]


def validate(config: RunConfig) -> None:
    """Check choices and ranges.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    for prefix, section in _sections(config):
        for name, choices in getattr(section, "CHOICES", Choices()).items():
            _check_choice(prefix + name, getattr(section, name), choices)
        for name, bounds in getattr(section, "RANGES", Ranges()).items():
            _check_range(prefix + name, getattr(section, name), bounds)
        for name in getattr(section, "PAIRS", ()):
            value = getattr(section, name)
            if len(value) != 2 or not all(math.isfinite(v) and v > 0 for v in value):
                raise ConfigError(f"{prefix}{name}={list(value)} must be two positive numbers")


def checked_keys(schema: type[RunConfig]) -> dict[str, list[str]]:
    """Dotted keys that have choices, ranges, or must be pairs, by kind of check."""
    found: dict[str, list[str]] = {"CHOICES": [], "RANGES": [], "PAIRS": []}
    for prefix, section in _sections(schema()):
        for kind, keys in found.items():
            keys += [prefix + name for name in getattr(section, kind, ())]
    return found


def _sections(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The configuration and its sections, with the dotted prefix of their keys."""
    yield prefix, config
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from _sections(value, f"{prefix}{item.name}.")


def _free_form(config: Any) -> Iterator[str]:
    """Prefixes of keys below which anything may be written."""
    for prefix, section in _sections(config):
        yield from (f"{prefix}{name}." for name in getattr(section, "FREE_FORM", ()))


def _check_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{key}={value!r} is not one of {', '.join(choices)}{hint}")


def _check_range(key: str, value: float | None, bounds: tuple[float, float, bool]) -> None:
    low, high, closed = bounds
    if value is None or (math.isfinite(value) and (value >= low if closed else value > low) and value <= high):
        return
    bound = f"{'at least' if closed else 'above'} {low:g}"
    bound += f" and at most {high:g}" if high < math.inf else ""
    raise ConfigError(f"{key}={value} is out of range: it must be {bound}")


def _expand(values: dict[Any, Any], config: Any) -> None:
    """Spell out what may be said in one word.

    `model=timm/resnet50` is `model.name`, `curriculum=efficienttrain_pp` is `curriculum.preset`, `calibration=FILE` is
    `calibration.file`, `selection=infobatch` is `selection.method`, `data=cifar100` is `data.source`, and
    `data=/photos` is the folder (or list file) at /photos, or the root of a source that is known already.
    `curriculum=my.yaml` takes the stages of a file, such as `python -m mae_et search` writes.
    """
    if str(values.get("curriculum")).endswith((".yaml", ".yml")):
        values["curriculum"] = _curriculum_of(Path(values["curriculum"]))
    for section, key in (("model", "name"), ("curriculum", "preset"), ("calibration", "file"), ("selection", "method")):
        if isinstance(values.get(section), str):
            values[section] = {key: values[section]}
    if isinstance(values.get("curriculum"), dict):
        _only_schedule(values["curriculum"])
    short = values.get("data")
    if not isinstance(short, str) or not hasattr(config, "data"):
        return
    sources = config.data.CHOICES["source"]
    if short in sources:
        values["data"] = {"source": short}
    elif "/" in short or Path(short).exists():
        kind = "list" if Path(short).suffix == ".txt" else "folder"
        values["data"] = {"source": kind, "root": short} if kind in sources else {"root": short}
    else:
        _check_choice("data", short, sources)


def _only_schedule(curriculum: dict[Any, Any]) -> None:
    """What names a schedule last is the one that counts: clear what an earlier layer may have named another way."""
    growth = curriculum.get("growth")
    growth = growth if isinstance(growth, dict) else {}
    if curriculum.get("stages") is not None:
        curriculum.setdefault("growth", {"first": None})
    elif growth.get("first") is not None:
        curriculum.setdefault("stages", None)
    elif curriculum.get("preset") is not None:
        curriculum.setdefault("stages", None)
        curriculum.setdefault("growth", {"first": None})


def _curriculum_of(path: Path) -> dict[Any, Any]:
    """Stages, their axis and the final size that they were found for, from a YAML file.

    Raises:
        ConfigError: there is no such file, or it is not one of a curriculum.
    """
    if not path.exists():
        raise ConfigError(f"there is no curriculum file {path}; one that was found is in configs/search/found/")
    values = _read(path)
    if values.keys() == {"curriculum"} and isinstance(values["curriculum"], dict):
        values = values["curriculum"]
    if "stages" not in values or not values.keys() <= {"stages", "axis", "size"}:
        raise ConfigError(
            f"curriculum={path}: the file of a curriculum has stages, and may have axis and size; this one has "
            f"{', '.join(map(str, values)) or 'nothing'}"
        )
    return values


def _read(path: Path) -> dict[Any, Any]:
    """What the YAML file holds, as plain data."""
    try:
        return read_yaml(path)
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}; the recipes are in configs/") from None
    except (ValueError, OSError) as error:
        raise ConfigError(str(error) if str(path) in str(error) else f"{path} cannot be read: {error}") from None


def _read_override(override: str) -> dict[Any, Any]:
    try:
        values = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        refuse_interpolation(f"override {override!r}", values)
    except Exception as error:  # as many kinds as a YAML file's
        raise ConfigError(str(error) if override in str(error) else f"override {override!r}: {error}") from None
    assert isinstance(values, dict)
    return values


def _refuse_other_task(origin: str, layer: dict[Any, Any], schema: type[RunConfig]) -> None:
    task, wanted = str(layer.get("task") or "pretrain"), schema().task
    if task != wanted:
        raise ConfigError(f"{origin} configures a {task} run, and this is for {wanted} runs: see the command in it")


def _keys(values: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of the leaves of nested mappings; an empty mapping is a leaf."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _keys(value, f"{name}.")
        else:
            yield name


def _refuse_flat(origin: str, values: Any, config: Any) -> None:
    """Raise ConfigError where a section of settings is given a value of its own."""
    for prefix, section in _sections(config):
        found = values
        for name in prefix.split(".")[:-1]:
            found = found.get(name) if isinstance(found, dict) else None
        if found is not None and not isinstance(found, dict):
            example = f"{prefix}{fields(section)[0].name}"
            raise ConfigError(f"{origin}: {prefix[:-1]} holds settings, and is no value itself; set e.g. {example}=...")


def _refuse_unknown(origin: str, values: Any, known: set[str], free_form: tuple[str, ...]) -> None:
    """Raise ConfigError for keys that no dataclass has, with the nearest one that some dataclass has."""
    sections = {key.rpartition(".")[0] for key in known}
    for key in _keys(values):
        if key in known or key in sections or key.startswith(free_form or "\0"):
            continue
        close = get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{origin}: unknown key {key!r}{hint}")
