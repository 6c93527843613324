"""What a run's folder keeps beside its configuration, read as text that anybody may have written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mae_et.config.loading import ConfigError
from mae_et.config.plain import JSON_LIMIT, parse_json, read_bytes

T = TypeVar("T")


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
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
