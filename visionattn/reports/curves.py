"""Curves of runs: what metrics.csv of one or several run folders holds, as one picture."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ..errors import VisionattnError, shortened, user_input

Rows = Sequence[Mapping[str, str | int]]
"""Lines of metrics.csv, by column."""
LOSSES = {"train_loss": "--", "val_loss": "-"}
"""Columns that share a panel, and how they are drawn where runs have the colours."""


def read_rows(folder: Path) -> Rows:
    """The epochs of a run.

    Args:
        folder: of the run.

    Raises:
        VisionattnError: if it is none, or has no epoch yet.
    """
    file = folder / "metrics.csv"
    if not file.is_file():
        raise VisionattnError(f"{folder} is not a run folder of train.py (it has no metrics.csv)")
    with user_input(f"cannot read {file}", OSError, ValueError, TypeError, KeyError, csv.Error):
        rows = list(csv.DictReader(io.StringIO(file.read_text()), strict=True))
        for row in rows:
            for column, value in row.items():
                float(value or "nan") if column != "epoch" else int(value)
    if not rows:
        raise VisionattnError(f"{folder} has no epoch to draw yet")
    return rows


def metrics_of(rows: Rows) -> list[str]:
    """Names of the metrics, without the loss, in the order of their columns."""
    columns = dict.fromkeys(column for row in rows for column in row)
    return [c.removeprefix("val_") for c in columns if c.startswith("val_") and c != "val_loss"]


def colours(count: int) -> list:
    """Colours of lines, to tell as many apart."""
    for name, most in (("tab10", 10), ("tab20", 20)):
        if count <= most:
            return [matplotlib.colormaps[name](i) for i in range(count)]
    return [matplotlib.colormaps["turbo"](i / count) for i in range(count)]


def draw_curves(runs: Mapping[str, Rows], metrics: Sequence[str], unit: str = "") -> Figure:
    """Losses, metrics and learning rate over the epochs.

    Args:
        runs: by the names in the legend.
        metrics: names of those to draw; of one run they share a panel.
        unit: of the metrics.
    """
    several = len(runs) > 1
    groups = [[f"val_{name}"] for name in metrics] if several else [[f"val_{name}" for name in metrics]]
    panels = [list(LOSSES), *filter(None, groups), ["lr"]]
    width = min(len(panels), 3 if len(panels) != 4 else 2)
    figure = Figure(figsize=(4.5 * width, 3.5 * math.ceil(len(panels) / width) + 0.5 * several), layout="constrained")
    places = figure.subplots(math.ceil(len(panels) / width), width, squeeze=False).flatten()
    for axes, columns in zip(places, panels, strict=False):
        for number, rows in enumerate(runs.values()):
            for column in columns:
                if not any(row.get(column) for row in rows):
                    continue
                style = {"color": colours(len(runs))[number], "linestyle": LOSSES.get(column, "-")} if several else {}
                marker = "." if len(rows) <= 20 else None  # a single epoch would be no line
                epochs = [int(row["epoch"]) + 1 for row in rows]
                axes.plot(
                    epochs, [_finite(row.get(column)) for row in rows], label=_told(column), marker=marker, **style
                )
        axes.set(xlabel="epoch", ylabel=_axis(columns, unit))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.ticklabel_format(axis="y", scilimits=(-2, 5))
        axes.grid(alpha=0.3)
        if len(columns) > 1 and axes.lines:
            _legend(axes, columns, several)
    for axes in places[len(panels) :]:
        axes.axis("off")
    if several:
        lines = [Line2D([], [], color=colour) for colour in colours(len(runs))]
        names = [shortened(name, 40) for name in runs]
        figure.legend(lines, names, loc="outside lower center", ncols=min(len(runs), 2 * width, 4))
    return figure


def _legend(axes: Axes, columns: Sequence[str], several: bool) -> None:
    if not several:
        axes.legend()
        return
    lines = [Line2D([], [], color="black", linestyle=LOSSES[column]) for column in columns]
    axes.legend(lines, [_told(column) for column in columns])


def _axis(columns: Sequence[str], unit: str) -> str:
    if columns[0] in LOSSES:
        return "loss"
    if columns == ["lr"]:
        return "learning rate"
    return unit if len(columns) > 1 else " ".join(filter(None, [_told(columns[0]), unit]))


def _told(column: str) -> str:
    return column.replace("_", " ")


def _finite(value: str | None) -> float:
    number = float(value or "nan")
    return number if math.isfinite(number) else math.nan
