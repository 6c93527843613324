"""Outlines of objects as COCO's annotations have them, polygons and run lengths, in flat buffers.

Why not in lists: see mae_et/data/files.py.
"""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np

_POLYGONS, _RUNS = 1, 2


def mask_tools() -> Any:
    """Return faster-coco-eval's mask module, which reads and writes COCO's run lengths.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise ValueError(f"masks and AP need optional packages ({error}): pip install 'mae_et[dense]'") from error
    return mask


class OutlineTable:
    """The outlines of many objects.

    Coordinates are float64: rounded to float32, a corner such as 200.7 px falls into another of the fifths of a pixel
    that COCO's rasteriser counts in (cocoapi, common/maskApi.c, rleFrPoly).

    Args:
        kinds: uint8 [K].
        points: float64 [P], x, y, x, y, ... of all rings in px.
        ring_ends: int64 [R + 1], where the rings end in points.
        rings: int64 [K + 1], where the objects' rings end in ring_ends.
        runs: uint8 [B], compressed run lengths, end to end.
        run_ends: int64 [K + 1], where the objects' end in runs.
    """

    def __init__(
        self,
        kinds: np.ndarray,
        points: np.ndarray,
        ring_ends: np.ndarray,
        rings: np.ndarray,
        runs: np.ndarray,
        run_ends: np.ndarray,
    ) -> None:
        self._kinds, self._points, self._ring_ends, self._rings = kinds, points, ring_ends, rings
        self._runs, self._run_ends = runs, run_ends

    def __len__(self) -> int:
        return len(self._kinds)

    def present(self, objects: np.ndarray) -> np.ndarray:
        """Tell which of these objects have an outline, bool [K] of int64 [K]."""
        return self._kinds[objects] != 0

    def mask(self, i: int, height: int, width: int) -> np.ndarray:
        """Rasterise object i as COCO does, uint8 [height, width].

        Raises:
            ValueError: its run lengths are damaged, or faster-coco-eval is not installed.
        """
        tools = mask_tools()
        if self._kinds[i] == _RUNS:
            counts = self._runs[self._run_ends[i] : self._run_ends[i + 1]].tobytes()
            try:
                return tools.decode({"size": [height, width], "counts": counts})
            except RuntimeError as error:  # some damage raises it, some ValueError
                raise ValueError(str(error)) from error
        assert self._kinds[i] == _POLYGONS, f"object {i} has no outline"
        rings = [
            self._points[self._ring_ends[ring] : self._ring_ends[ring + 1]].tolist()
            for ring in range(self._rings[i], self._rings[i + 1])
        ]
        return tools.decode(tools.merge(tools.frPyObjects(rings, height, width)))


class OutlineBuilder:
    """Collects outlines, one object after another."""

    def __init__(self) -> None:
        self._kinds = array("B")
        self._points = array("d")
        self._ring_ends = array("q", [0])
        self._rings = array("q", [0])
        self._runs = bytearray()
        self._run_ends = array("q", [0])

    def add(self, segmentation: Any, height: int, width: int) -> bool:
        """Add the next object's outline; return whether it has one that can be used.

        A polygon of fewer than three corners, of an odd number of values, or with one that is no number or lies further
        out than twice the image's height and width, is left out.

        Args:
            segmentation: a list of polygons [x, y, x, y, ...] in px, or run lengths {"size": [height, width],
                "counts": text or list}; anything else is no outline.
            height, width: of the image.

        Raises:
            ValueError: run lengths that are damaged, or of an image of another size.
        """
        kind = 0
        if isinstance(segmentation, dict):
            self._runs += _compressed(segmentation, height, width)
            kind = _RUNS
        elif isinstance(segmentation, list):
            for ring in segmentation:
                if _is_ring(ring, 2 * (height + width)):
                    self._points.extend(ring)
                    self._ring_ends.append(len(self._points))
                    kind = _POLYGONS
        self._kinds.append(kind)
        self._rings.append(len(self._ring_ends) - 1)
        self._run_ends.append(len(self._runs))
        return kind != 0

    def build(self) -> OutlineTable:
        """Return all outlines that were added."""
        return OutlineTable(
            np.array(self._kinds, np.uint8),
            np.array(self._points, np.float64),
            np.array(self._ring_ends, np.int64),
            np.array(self._rings, np.int64),
            np.frombuffer(bytes(self._runs), np.uint8),
            np.array(self._run_ends, np.int64),
        )


def _is_ring(ring: Any, reach: int) -> bool:
    if not isinstance(ring, list) or len(ring) < 6 or len(ring) % 2:
        return False
    # The rasteriser takes memory by an edge's length.
    return all(type(value) in (int, float) and -reach <= value <= reach for value in ring)


def _compressed(segmentation: dict[Any, Any], height: int, width: int) -> bytes:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [height, width]:
        raise ValueError(f"its mask is of size {size}, its image of [height, width] = {[height, width]}")
    if isinstance(counts, str) and counts.isascii():
        return counts.encode()
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("its mask's counts are neither run lengths nor their text")
    if sum(counts) != height * width:
        raise ValueError(f"its mask's counts add up to {sum(counts)}, not to {height} x {width} px")
    return compress_counts(counts)


def compress_counts(counts: list[int]) -> bytes:
    """Run lengths as COCO's text.

    From the fourth on, each is told by what it differs from the one two before; each number is given in groups of 5
    bits, the lowest first, with a sixth bit that says that more follow, as the character 48 above (cocoapi,
    common/maskApi.c, rleToString).
    """
    text = bytearray()
    for place, count in enumerate(counts):
        rest = count - counts[place - 2] if place > 2 else count
        while True:
            bits = rest & 31
            rest >>= 5
            # The top bit of the last group is the sign.
            done = rest == (-1 if bits & 16 else 0)
            text.append(48 + (bits if done else bits | 32))
            if done:
                break
    return bytes(text)
