"""How annotations write boxes, and signs that they write them otherwise than they are read."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import VisionattnError
from .paths import shown

LARGEST = 1e9
"""No coordinate of a picture is beyond, and sums of such are exact enough."""
MANY = 0.2
"""Share of the boxes that leave their images if read the wrong way; rightly read ones hardly ever do."""
NEARLY_ALL = 0.95


def is_number(value: Any) -> bool:
    """Whether a value of a file may be a coordinate: finite, of a sensible size, neither text nor true or false."""
    return type(value) in (int, float) and -LARGEST <= value <= LARGEST


def number_of(text: str | None) -> float | None:
    """The number that a text says, if it says one."""
    try:
        return float(text or "")
    except ValueError:
        return None


def is_box(value: Any) -> bool:
    """Whether a value is a list of four coordinates."""
    return isinstance(value, list | tuple) and len(value) == 4 and all(map(is_number, value))


def to_xywh(box: Sequence[float], box_format: str, size: Sequence[int] | None) -> list[float]:
    """Left, top, width and height in pixels.

    Args:
        box: four numbers.
        box_format: one of annotations.box_format.
        size: height and width of the image, which relative boxes need.
    """
    x, y, width, height = box
    if box_format.endswith("xyxy"):
        width, height = width - x, height - y
    elif box_format.endswith("cxcywh"):
        x, y = x - width / 2, y - height / 2
    if box_format.startswith("relative"):
        x, y, width, height = x * size[1], y * size[0], width * size[1], height * size[0]
    return [x, y, width, height]


def check_box(box: Sequence[float], written: Sequence[float], where: str) -> None:
    """Raise an error if a box (x, y, width, height) has a negative side.

    Args:
        box: to check.
        written: as the annotations have it.
        where: they are.
    """
    if box[2] < 0 or box[3] < 0:
        raise VisionattnError(
            f"{where} has the bbox {shown(list(written))}: expected finite numbers, width and height not below 0"
        )


def check_format(
    boxes: Sequence[Sequence[float]],
    sizes: Sequence[Sequence[int] | None],
    box_format: str | None,
    default: str,
    where: object,
) -> str:
    """The format of boxes: the one that is asked for, or the default if nothing speaks against it.

    Args:
        boxes: four numbers each, as they are written.
        sizes: height and width of the image of each, where known.
        box_format: what annotations.box_format says.
        default: what such annotations are.
        where: they are, for errors.

    Raises:
        VisionattnError: many boxes leave their images, or all lie between 0 and 1, and another format fits.
    """
    if box_format is not None or not len(boxes):
        return box_format or default
    given = np.asarray(boxes, np.float64)
    known = np.array([size or (np.inf, np.inf) for size in sizes], np.float64).reshape(-1, 2)
    relative = default.startswith("relative")
    if relative:
        limits, looks_other = np.ones_like(known), (given > 1.5).any(1).mean() >= MANY
    else:
        limits, looks_other = known, ((given >= 0) & (given <= 1)).all(1).mean() >= NEARLY_ALL and known.min() > 2
    kinds = ["xywh", "xyxy", "cxcywh"]
    if looks_other:
        limits, relative = known if relative else np.ones_like(known), not relative
        kinds.sort(key=lambda kind: not default.endswith(kind))
    elif _leaving(given, default.removeprefix("relative_"), limits).mean() < MANY:
        return default
    kinds = [f"{'relative_' * relative}{kind}" for kind in kinds]
    fitting = [kind for kind in kinds if _fits(given, kind.removeprefix("relative_"), limits)]
    fitting = [kind for kind in fitting if kind != default] or (kinds if looks_other else [])
    if not fitting:
        return default
    if looks_other:
        what = "relative, from 0 to 1" if relative else "in pixels, not from 0 to 1"
        others = ", ".join(kind for kind in kinds if kind != fitting[0])
        raise VisionattnError(
            f"{where}: the boxes look {what}: give --annotations.box_format {fitting[0]} ({others} if they are that), "
            f"or {default} if they are right"
        )
    count = int(_leaving(given, default.removeprefix("relative_"), limits).sum())
    raise VisionattnError(
        f"{where}: {count} of {len(given)} boxes leave their images if read as {default}, and fit as {fitting[0]}: "
        f"give --annotations.box_format {fitting[0]}, or {default} if they are right"
    )


def _corners(boxes: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    first, second = boxes[:, :2], boxes[:, 2:]
    if kind == "xyxy":
        return first, second
    return (first, first + second) if kind == "xywh" else (first - second / 2, first + second / 2)


def _leaving(boxes: np.ndarray, kind: str, limits: np.ndarray) -> np.ndarray:
    """Which boxes leave their images by more than a sloppy hand would let them."""
    near, far = _corners(boxes, kind)
    edges = limits[:, ::-1]
    slack = np.where(np.isfinite(edges), 0.02 * edges + (edges > 1), 0)
    return ((far > edges + slack) | (near < -slack)).any(1)


def _fits(boxes: np.ndarray, kind: str, limits: np.ndarray) -> bool:
    near, far = _corners(boxes, kind)
    return (~_leaving(boxes, kind, limits) & (far >= near).all(1)).mean() >= NEARLY_ALL
