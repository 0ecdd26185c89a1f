"""The pictures of the comparison."""

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, quantiles
from typing import TYPE_CHECKING

from .training import DISTANCES

if TYPE_CHECKING:
    from .report import Found

THICK = {"softmax": ("black", "-"), "dw7": ("0.55", "-"), "none": ("black", ":"), "activator": ("0.55", "--")}
"""Controls, their colours and how their lines are drawn."""


def _figure(panels: int):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8 * panels, 9), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _least(values: Iterable[float]) -> float:
    """Where an axis of values ends that is not to be as long as the few that lie far below the others want it."""
    values = sorted(values)
    first, _, third = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return max(values[0], first - 2 * (third - first))


def draw_time(found: "Found", path: Path) -> bool:
    """Accuracy over the time of an image forward and backward, for each scaffold; whether anything is known of it."""
    tiers = [name for name, (tier, _) in found.tiers.items() if tier in ("0", "1a")]
    tiers = [name for name in tiers if any(found.accuracies(row, name)[1] for row in found.rows)]
    if not tiers:
        return False
    tier, points = tiers[-1], {}
    for row in found.rows:
        time, (_, values) = found.milliseconds(row), found.accuracies(row, tier)
        if time is not None and values:
            points.setdefault(row.scaffold, []).append((time, fmean(values), row))
    if not points:
        return False
    figure, panels = _figure(len(points))
    for axes, (scaffold, known) in zip(panels, points.items(), strict=True):
        known.sort(key=lambda each: -each[1])  # as they are numbered
        low = _least(accuracy for _, accuracy, _ in known)
        for number, (time, accuracy, row) in enumerate(known, 1):
            color, inside = "black" if row.mixer in THICK else "tab:blue", accuracy >= low
            axes.plot(time, max(accuracy, low), "o" if inside else "v", color=color, markersize=4)
            style = {"fontsize": 8, "color": color, "xytext": (3, 2), "textcoords": "offset points"}
            axes.annotate(str(number), (time, max(accuracy, low)), **style)
            axes.plot([], [], " ", label=f"{number}  {row.name}: {accuracy:.1f} %, {time:.2f} ms")
        axes.set(
            xscale="log", title=f"{scaffold}, tier {tier}, equal parameters", ylabel="accuracy, %",
            xlabel="ms an image, forward and backward (triangles: less accurate than the axis tells)",
        )  # fmt: skip
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12), handlelength=0)
    figure.savefig(path, dpi=110)
    return True


def draw_distance(found: "Found", path: Path) -> bool:
    """Accuracy over the distance of the two items, for each scaffold; whether anything is known of it."""
    tiers = [name for name, (tier, _) in found.tiers.items() if tier == "1b"]
    if not tiers:
        return False
    lines: dict[str, list] = {}
    for row in found.rows:
        runs = [x for same in found.of(row, tiers[-1]).values() for x in same if "by_distance" in x]
        if runs:
            means = [100 * fmean(values) for values in zip(*(x["by_distance"] for x in runs), strict=True)]
            accuracy = 100 * fmean(x["accuracy"] for x in runs)
            lines.setdefault(row.scaffold, []).append((row, accuracy, means))
    if not lines:
        return False
    from matplotlib import colormaps

    figure, panels = _figure(len(lines))
    middles = [(low + high) / 2 for low, high in zip(DISTANCES, DISTANCES[1:], strict=False)]
    for axes, (scaffold, known) in zip(panels, lines.items(), strict=True):
        known.sort(key=lambda each: -each[1])  # as they lie in the picture
        for i, (row, accuracy, means) in enumerate(known):
            thick = not row.variant and row.mixer in THICK
            color, line = (
                THICK[row.mixer] if thick else (colormaps["tab10"](i % 10), ("-", "--", ":", "-.")[i // 10 % 4])
            )
            style = {"color": color, "linestyle": line, "linewidth": 2.5 if thick else 1}
            axes.plot(middles, means, marker="o", markersize=3, label=f"{row.name} {accuracy:.1f}", **style)
        axes.axhline(50, color="0.6", linewidth=0.8)
        axes.set(
            title=f"{scaffold}, same or different, tier {tiers[-1]}",
            xlabel="pixels between the middles of the items",
            ylabel="accuracy, %",
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.savefig(path, dpi=110)
    return True
