"""What a run's folder keeps beside its configuration, read as text that anybody may have written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from mae_et.config.loading import Config, ConfigError, load_config
from mae_et.config.plain import JSON_LIMIT, parse_json, read_bytes, read_yaml

T = TypeVar("T")


def kept_config(path: Path, schema: type[Config], overrides: Sequence[str] = ()) -> Config:
    """The configuration that a run wrote into its folder.

    Args:
        path: of the file; no link, see `read_bytes`.
        schema: the kind of run.
        overrides: `key=value` changes to it.

    Raises:
        ConfigError: it is missing, damaged or of another kind of run; the message names the file.
    """
    kept_task(path)
    try:
        return load_config(path, overrides, schema)
    except ConfigError as error:
        raise ConfigError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def kept_task(path: Path) -> str:
    """The kind of run whose configuration a folder keeps.

    Raises:
        ConfigError: it is missing or damaged; the message names the file.
    """
    try:
        values = read_yaml(path, follow=False)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error) if str(path) in str(error) else f"{path} cannot be read: {error}") from None
    if not {"run", "seed"} <= values.keys():  # a run writes all its keys
        raise ConfigError(f"{path} is damaged (it names no run and no seed): put back the one that the run wrote")
    task = values.get("task", "pretrain")
    if not isinstance(task, str):
        raise ConfigError(f"{path} is damaged (its task is {task!r}): put back the one that the run wrote")
    return task


def read_kept(path: Path, parse: Callable[[str], T]) -> T:
    """What a file of a run's folder says.

    Args:
        path: of the file; no link, see `read_bytes`.
        parse: its text to what is wanted.

    Raises:
        ConfigError: it is missing or damaged; the message names the file.
    """
    try:
        return parse(read_bytes(path, JSON_LIMIT, follow=False).decode())
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: put back the one that the run wrote") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"{path} is damaged ({reason}): put back the one that the run wrote") from None


def names_of(text: str) -> tuple[str, ...]:
    """A JSON list of names.

    Raises:
        ValueError: it is none.
    """
    names = parse_json(text)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("it is no list of names")
    return tuple(names)


def unique_names(folders: Sequence[Path]) -> list[str]:
    """What tables call runs: the names of their folders, and the whole path where two have the same."""
    names = [folder.resolve().name for folder in folders]
    return [name if names.count(name) == 1 else str(folder) for folder, name in zip(folders, names)]
