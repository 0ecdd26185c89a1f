"""Masks of objects as COCO writes them: polygons, and lengths of runs down the columns."""

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from ..errors import VisionattnError
from .box_formats import LARGEST, is_number
from .paths import shown

CODED = re.compile(r"[0-o]*")
"""COCO's text of run lengths: six bits in each character, from "0" on."""


def check_mask(mask: Any, size: Sequence[int] | None, where: str) -> list | dict[str, Any]:
    """A segmentation that can be drawn in an image, with work in proportion to the image.

    Args:
        mask: as a file has it.
        size: height and width of the image, if they are known.
        where: it is, for errors.

    Raises:
        VisionattnError: it is none.
    """
    if isinstance(mask, dict) and {"size", "counts"} <= mask.keys():
        _check_runs(mask, size, where)
        return mask
    if isinstance(mask, list) and mask and set(map(type, mask)) <= {int, float}:
        mask = [mask]  # a single polygon
    if not isinstance(mask, list) or not all(isinstance(p, list) and len(p) % 2 == 0 for p in mask):
        raise VisionattnError(f"{where} has no segmentation: expected polygons or a run-length code (size and counts)")
    outline = sum(_outline(polygon, where) for polygon in mask)
    most = 1e5 + 100 * sum(size or ()) + 4 * sum(map(len, mask))
    if outline > most:  # each of its pixels takes time and memory
        raise VisionattnError(f"{where} has polygons of {outline:.3g} pixels around: expected at most {most:.3g}")
    return mask


def _outline(polygon: list, where: str) -> float:
    """Pixels along a polygon, about."""
    values = np.zeros(0)
    if set(map(type, polygon)) <= {int, float}:
        with suppress(OverflowError):  # an integer of hundreds of digits
            values = np.array(polygon, np.float64)
    if len(values) < len(polygon) or not (np.abs(values) <= LARGEST).all():
        wrong = next(value for value in polygon if not is_number(value))
        raise VisionattnError(f"{where} has a polygon with {shown(wrong)}: expected finite numbers")
    if len(values) < 6:
        return 0
    points = values.reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, 0)).max(1).sum())


def _check_runs(mask: dict[str, Any], size: Sequence[int] | None, where: str) -> None:
    given = mask["size"]
    sides = isinstance(given, list) and len(given) == 2 and all(type(side) is int and 0 < side < 1e6 for side in given)
    if not sides:
        raise VisionattnError(f"{where} has a mask of the size {shown(given)}: expected [height, width]")
    if size is not None and given != list(size):
        raise VisionattnError(f"{where} has a mask of {given[1]} x {given[0]} for an image of {size[1]} x {size[0]}")
    counts = _counts(mask["counts"], where)
    if len(counts) and (counts.min() < 0 or counts.max() > given[0] * given[1]) or counts.sum() != given[0] * given[1]:
        raise VisionattnError(f"{where} has a mask whose runs do not fill its {given[1]} x {given[0]} pixels")


def _counts(counts: Any, where: str) -> np.ndarray:
    """Lengths of runs of 0 and of 1 in turn."""
    if isinstance(counts, list) and set(map(type, counts)) <= {int} and all(-1e12 < count < 1e12 for count in counts):
        return np.array(counts, np.int64)
    if not isinstance(counts, str) or not CODED.fullmatch(counts) or (counts and ord(counts[-1]) - 48 & 32):
        raise VisionattnError(
            f"{where} has a mask with the counts {shown(counts)}: expected whole numbers or COCO's code"
        )
    bits = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(bits & 32 == 0)  # of each number, the lowest five bits of which come first
    first = np.concatenate([[0], last[:-1] + 1]).astype(np.int64)
    digit = np.arange(len(bits)) - np.repeat(first, last - first + 1)
    if len(digit) and digit.max() > 6:  # more than any picture has
        raise VisionattnError(f"{where} has a mask with a run of more than {2**34} pixels")
    values = np.add.reduceat((bits & 31) << 5 * digit, first) if len(bits) else bits
    values -= np.where(bits[last] & 16, 1 << 5 * (last - first + 1), 0)  # sign
    for start in (1, 2):  # from the fourth on, numbers are differences from the last but one
        values[start::2] = values[start::2].cumsum()
    return values


def decode(mask: list | dict[str, Any], size: tuple[int, int]) -> np.ndarray | int:
    """The pixels (H, W) of a checked segmentation; 0 where there is no polygon of three points."""
    from faster_coco_eval.core import mask as rle

    if isinstance(mask, dict):
        counts = _counts(mask["counts"], "an annotation")
        pixels = np.repeat((np.arange(len(counts)) % 2).astype(np.uint8), counts)
        return pixels.reshape(size[1], size[0]).T
    polygons = [polygon for polygon in mask if len(polygon) >= 6]
    return rle.decode(rle.merge(rle.frPyObjects(polygons, *size))) if polygons else 0


def encode(mask: np.ndarray) -> dict[str, Any]:
    """A mask (H, W) of true and false as COCO's run-length code, which JSON takes."""
    from faster_coco_eval.core import mask as rle

    code = rle.encode(np.asfortranarray(mask, np.uint8))
    counts = code["counts"]
    return {"size": list(mask.shape), "counts": counts.decode() if isinstance(counts, bytes) else counts}
