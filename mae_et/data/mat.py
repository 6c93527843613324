"""MATLAB files from anywhere, checked before scipy reads them: cells in cells in cells would end its stack."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_LIMIT = 1 << 27  # bytes of all values, unpacked; the lists of Stanford Dogs have a few millions
_CELLS = 10_000_000
_DEPTH = 8  # of cells in cells
_MATRIX, _PACKED, _DIMENSIONS = 14, 15, 5  # types of elements


def read_mat(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Variables of a .mat file (version 5, the one that published lists come in); nothing in it is executed.

    Source: "MAT-File Format" (MathWorks), level 5: elements of a type, a number of bytes and data, padded to 8 bytes.

    Args:
        path: of the file.
        names: of the variables.

    Returns:
        name -> array, as `scipy.io.loadmat` gives it. One of numbers for numbers, of objects for cells.

    Raises:
        ValueError: it is missing or damaged, of another version, lacks a variable, or unfolds to too much.
    """
    from scipy.io import loadmat  # comes with scikit-learn; 0.2 s to import

    try:
        content = path.read_bytes() if path.is_file() and path.stat().st_size <= _LIMIT else b""
        if content[124:128] not in (b"\x00\x01IM", b"\x01\x00MI"):
            raise ValueError("it is no MAT file of version 5")
        order = "<" if content[126:128] == b"IM" else ">"
        left = _LIMIT
        for kind, data in _elements(content[128:], order):
            if kind == _PACKED:
                unpacking = zlib.decompressobj()
                data = unpacking.decompress(data, left + 1)
                left -= len(data)
                if left < 0:
                    raise ValueError("it unfolds to more than such a list has")
                for inner, matrix in _elements(data, order):
                    _check_matrix(inner, matrix, order, 0)
            else:
                _check_matrix(kind, data, order, 0)
        found = loadmat(path, variable_names=list(names))
        return {name: found[name] for name in names}
    # scipy raises what its parts raise, by the byte that is wrong.
    except Exception as error:
        raise ValueError(f"{path} is missing or damaged ({error})") from error


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """(type, data) of the elements in a row."""
    start = 0
    while start + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, start)
        if kind >> 16:  # a small one: its size in the upper half, and at most 4 bytes beside the tag
            yield kind & 0xFFFF, data[start + 4 : start + 4 + (kind >> 16)]
            start += 8
            continue
        if start + 8 + size > len(data):
            raise ValueError("it is truncated")
        yield kind, data[start + 8 : start + 8 + size]
        start += 8 + size + (0 if kind == _PACKED else -size % 8)


def _check_matrix(kind: int, data: bytes, order: str, depth: int) -> None:
    """Raise ValueError where an array is nested too deeply, or claims more cells than a list has."""
    if kind != _MATRIX:
        return
    if depth > _DEPTH:
        raise ValueError(f"its cells are nested more than {_DEPTH} deep")
    for place, (inner, part) in enumerate(_elements(data, order)):
        if place == 1 and inner == _DIMENSIONS:
            sides = struct.unpack(f"{order}{len(part) // 4}i", part[: len(part) // 4 * 4])
            if min(sides, default=0) < 0 or math.prod(sides) > _CELLS:
                raise ValueError(f"an array of {' x '.join(map(str, sides))} is in it")
        _check_matrix(inner, part, order, depth + 1)
