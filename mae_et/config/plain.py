"""Files of text as plain data, whoever wrote them: nothing in them acts, looks anything up, or grows in memory."""

from __future__ import annotations

import io
import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

import yaml
from omegaconf import OmegaConf

JSON_LIMIT = 1 << 26
"""Bytes of a JSON file that are read at most."""

YAML_LIMIT = 1 << 20
"""Bytes of a YAML file that are read at most."""

_DEPTH = 100  # of nested YAML; configurations have 5


def read_bytes(path: Path, limit: int, follow: bool = True) -> bytes:
    """The bytes of a regular file.

    Args:
        path: of the file.
        limit: bytes above which it is refused.
        follow: whether the file may be a link. Those of a run folder may not: what they hold is passed on to records
            and exports, and a stranger's folder could link to a file that only its reader has.

    Raises:
        ValueError: it is a pipe, a device, a link or too large; the message names the file.
        OSError: it is missing or cannot be read.
    """
    if not follow and path.is_symlink():
        raise ValueError(f"{path} is a link to another file: put the file itself there")
    # A pipe is opened without waiting for its writer.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path} is a pipe or a device, not a file")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} has more than {limit:,} bytes, which no such file has")
    return content


def read_json(path: Path, follow: bool = True) -> Any:
    """The value that a JSON file holds; for `follow` see `read_bytes`.

    Raises:
        ValueError: naming the file, whatever is wrong with its content.
        OSError: it is missing or cannot be read.
    """
    content = read_bytes(path, JSON_LIMIT, follow)
    try:
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path} is truncated or damaged ({error})") from None


def parse_json(content: bytes | str) -> Any:
    """A strict JSON value: no NaN and no infinity, which JSON does not have.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(content, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def read_yaml(path: Path, follow: bool = True) -> dict[Any, Any]:
    """The keys and values of a YAML file; for `follow` see `read_bytes`.

    Aliases are refused, since a few lines of them unfold to more than a memory holds, and so is `${...}`, with which
    OmegaConf would fetch other values, those of the environment among them.

    Raises:
        ValueError: naming the file, whatever is wrong with its content.
        OSError: it is missing or cannot be read.
    """
    try:
        text = read_bytes(path, YAML_LIMIT, follow).decode()
        _check_events(text)
        node = OmegaConf.load(io.StringIO(text))
        values = OmegaConf.to_container(node)
    except OSError as error:
        if error.errno is None:  # OmegaConf's word for a file of a single value
            raise ValueError(f"{path} must hold keys and values at its top level") from None
        raise
    except Exception as error:  # PyYAML and OmegaConf raise many kinds for a file that is not a mapping of keys
        text = " ".join(str(error).split())  # PyYAML speaks in several lines
        raise ValueError(text if str(path) in str(error) else f"{path} cannot be read as YAML: {text}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold keys and values at its top level")
    refuse_interpolation(str(path), values)
    return values


def refuse_interpolation(origin: str, values: Any) -> None:
    """Raise ValueError where a text in nested values holds `${`.

    Args:
        origin: what the message names.
        values: dicts, lists and plain values.
    """
    if isinstance(values, dict):
        values = [*values.keys(), *values.values()]
    if isinstance(values, list):
        for value in values:
            refuse_interpolation(origin, value)
    elif isinstance(values, str) and "${" in values:
        raise ValueError(f"{origin}: {values!r} refers to another value with ${{...}}: write the value itself")


def _check_events(text: str) -> None:
    """Raise ValueError for aliases and for what is nested too deeply, before anything is built."""
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {event.start_mark.line + 1} has an alias (*{event.anchor}): write the value itself")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _DEPTH:
            raise ValueError(f"line {event.start_mark.line + 1} is nested more than {_DEPTH} deep")
