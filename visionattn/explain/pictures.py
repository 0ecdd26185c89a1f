"""Pictures of maps over images: overlays with a scale, windows, sheets of many and animations."""

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from ..errors import VisionattnError, optional
from .map import Map

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = "inferno"
SIDE = 3.6
"""Inches of a panel, of which there are several."""
ALONE = 5.0
"""Inches of one that is alone."""
DPI = 110
MOST = 24
"""Panels of a sheet."""


@dataclass
class Panel:
    """One picture of a sheet.

    Args:
        title: above it.
        heat: (h, w), drawn in colours: over an image if there is one, else by itself.
        image: what it is about.
        keys: (h, w), the places to outline: those that a query sees.
        query: row and column, as parts of the height and width, of the place to mark, and its height and width.
    """

    title: str
    heat: Tensor
    image: Image.Image | None = None
    keys: Tensor | None = None
    query: tuple[float, float, float, float] | None = None


def sheet(panels: Sequence[Panel], title: str = "") -> Image.Image:
    """Panels in rows, each with its scale.

    Args:
        panels: at most 24 of them are drawn, from the first to the last.
        title: above all.
    """
    if len(panels) > MOST:
        panels = [panels[round(i * (len(panels) - 1) / (MOST - 1))] for i in range(MOST)]
    with optional():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    columns = min(len(panels), max(3, math.ceil(math.sqrt(1.4 * len(panels)))))
    rows = math.ceil(len(panels) / columns)
    sizes = [each.image.size if each.image is not None else each.heat.shape[::-1] for each in panels]
    tall = min(1.6, max(0.5, max(height / width for width, height in sizes)))
    side = ALONE if len(panels) == 1 else SIDE
    lines = textwrap.wrap(title, round(9 * side * columns))
    figure = Figure(
        (side * columns, (0.86 * side * tall + 0.5) * rows + 0.25 * len(lines)), layout="constrained", dpi=DPI
    )
    FigureCanvasAgg(figure)
    if lines:
        figure.suptitle("\n".join(lines), fontsize=12)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes:
        ax.set_axis_off()
    for ax, panel in zip(axes, panels, strict=False):
        bar = figure.colorbar(_draw(ax, panel), ax=ax, fraction=0.046, pad=0.02)
        bar.ax.tick_params(labelsize=8)
        bar.ax.locator_params(nbins=5)
        bar.ax.yaxis.get_offset_text().set_fontsize(8)
        bar.formatter.set_powerlimits((-3, 4))
        bar.formatter.set_useOffset(False)
    buffer = io.BytesIO()
    figure.savefig(buffer)
    return Image.open(buffer).convert("RGB")


def _draw(ax: "Axes", panel: Panel) -> object:
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Rectangle

    ax.set_title("\n".join(textwrap.wrap(panel.title, 38)), fontsize=10)
    heat = panel.heat.detach().float().cpu()
    if panel.image is None:
        return ax.imshow(heat.numpy(), cmap=COLOURS, interpolation="nearest", aspect="equal")
    width, height = panel.image.size
    extent = (0, width, height, 0)
    ax.imshow(panel.image.convert("L"), cmap="gray", vmin=0, vmax=255, extent=extent)
    if panel.keys is not None:  # elsewhere there is nothing to be seen
        heat = heat.where(panel.keys.cpu(), math.nan)
    known = heat[~heat.isnan()]
    low, high = known.min().item(), known.max().item()
    strength = (0.35 if panel.keys is None else 0.5) + 0.4 * (heat.nan_to_num(low) - low) / max(high - low, 1e-12)
    drawn = ax.imshow(heat.numpy(), cmap=COLOURS, alpha=strength.numpy(), extent=extent, interpolation="nearest")
    scale = torch.tensor([width / heat.shape[1], height / heat.shape[0]])
    if panel.keys is not None:
        edges = _outline(panel.keys.cpu()) * scale
        for colour, thickness in (("black", 2.0), ("white", 0.8)):
            ax.add_collection(LineCollection(edges.numpy(), colors=colour, linewidths=thickness))
    if panel.query is not None:
        row, col, tall, wide = panel.query
        for colour, thickness in (("black", 3.4), ("cyan", 1.6)):
            box = Rectangle((col * width, row * height), wide * width, tall * height)
            box.set(fill=False, edgecolor=colour, linewidth=thickness, zorder=3)
            ax.add_patch(box)
    return drawn


def _outline(inside: Tensor) -> Tensor:
    """Lines (n, 2, 2), from (x, y) to (x, y), around the places (H, W) that are true."""
    padded = torch.nn.functional.pad(inside.bool(), (1, 1, 1, 1))
    y, x = (padded[1:, 1:-1] != padded[:-1, 1:-1]).nonzero().T
    v, u = (padded[1:-1, 1:] != padded[1:-1, :-1]).nonzero().T
    across = torch.stack([torch.stack([x, y], 1), torch.stack([x + 1, y], 1)], 1)
    down = torch.stack([torch.stack([u, v], 1), torch.stack([u, v + 1], 1)], 1)
    return torch.cat([across, down]).float()


def panel_of(
    found: Map, image: Image.Image, head: int | None = None, query: tuple[float, float] | None = None, sample: int = 0
) -> Panel:
    """The picture of a map.

    Attention is drawn as what a query looks at; without one, as what the class token looks at, or all places on
    average. Of gates the mean size over the channels is drawn. What belongs to no places is drawn as a matrix.

    Args:
        found: the map.
        image: what the model saw.
        head: of attention, or channel of what has channels; None for their mean.
        query: row and column, as parts of the height and width, from 0 to 1.
        sample: which of the batch.

    Raises:
        VisionattnError: if there is no such head or channel, or the query is outside the image.
    """
    title = found.title + (f", head {head}" if head is not None and "head" in found.axes else "")
    values = found.values[sample].float() if found.axes[0] == "batch" else found.values.float()
    count = values.shape[0]
    if head is not None and not 0 <= head < count:
        raise VisionattnError(f"{found.title} has {found.axes[found.axes[0] == 'batch']}s 0 to {count - 1}, got {head}")
    if found.axes == ("head",):
        return Panel(title, values[None])
    if found.axes[-1] in ("key", "key_col"):
        return _of_attention(found, title, image, head, query, sample)
    if found.axes == ("batch", "channel"):
        side = math.ceil(math.sqrt(count))
        square = torch.nn.functional.pad(values, (0, side * side - count), value=math.nan)
        return Panel(title, square.view(side, side))
    if found.axes[-2:] == ("row", "col"):
        kind = found.axes[1]
        chosen = values.abs().mean(0) if head is None else values[head]
        drawn = f"mean size over {count} {kind}s" if count > 1 else ""
        if head is not None:
            drawn = "" if kind == "head" else f"{kind} {head}"
        return Panel(", ".join(filter(None, [title, drawn])), chosen, image)
    return Panel(f"{title}, {' x '.join(found.axes[-2:])}", values.mean(0) if head is None else values[head])


def _of_attention(
    found: Map, title: str, image: Image.Image, head: int | None, query: tuple[float, float] | None, sample: int
) -> Panel:
    H, W = found.queries
    batch = len(found.values)
    r, token, keys, box = torch.zeros(batch, H, W, device=found.values.device), None, None, None
    if query is not None:
        if not all(0 <= part < 1 for part in query):
            raise VisionattnError("the query is outside the image")
        row, col = int(query[0] * H), int(query[1] * W)
        title += f", query {row},{col} of {H} x {W}"
        r[:, row, col], box = 1, (row / H, col / W, 1 / H, 1 / W)
        if found.keys is not None:
            places = found.keys[row, col]
            inside = ((places >= 0) & (places < torch.tensor(found.key_size, device=places.device))).all(-1)
            keys = torch.zeros(found.key_size, dtype=torch.bool, device=places.device)
            keys[places[inside, 0], places[inside, 1]] = True
    elif found.class_token is not None:
        token = torch.ones(batch, device=r.device)
        title += ", class token"
    else:
        r += 1 / (H * W)
    spread = Map(**vars(found) | {"values": found.values.float()}).spread(r, token)[0][sample]
    return Panel(title, spread.mean(0) if head is None else spread[head], image, keys, box)


def animation(frames: Sequence[Image.Image], seconds: float = 0.7) -> bytes:
    """An animated GIF of frames of one size, that repeats for ever and stays longer at the last."""
    buffer = io.BytesIO()
    lengths = [round(1000 * seconds)] * (len(frames) - 1) + [round(2500 * seconds)]
    # A palette that covers all colours, as the frame of a query is of a rare one.
    frames = [frame.quantize(256, Image.Quantize.MAXCOVERAGE) for frame in frames]
    frames[0].save(buffer, "gif", save_all=True, append_images=frames[1:], duration=lengths, loop=0)
    return buffer.getvalue()
