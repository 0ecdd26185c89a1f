"""The page of a report: sections of text, pictures, tables and cards, in one file that needs nothing else."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

SMALL, TINY = 128, 64
"""Pictures of at most so many pixels a side are shown enlarged, and keep every one of them."""


@dataclass(frozen=True)
class Picture:
    """A picture in the page.

    Args:
        data: the file, as an address that holds it.
        caption: what it shows, in a word or two.
        small: whether it has so few pixels that it is shown enlarged.
    """

    data: str
    caption: str = ""
    small: bool = False


@dataclass(frozen=True)
class Card:
    """Pictures of one image, and what there is to say.

    Args:
        pictures: side by side.
        lines: of text.
        good: whether the model is right; None where that is not the question.
        title: where the image comes from, which is shown where the mouse rests.
    """

    pictures: Sequence[Picture]
    lines: Sequence[str] = ()
    good: bool | None = None
    title: str = ""


@dataclass(frozen=True)
class Table:
    """A table that can be sorted by its columns.

    Args:
        heads: of the columns.
        rows: texts and numbers; None where there is nothing to count.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading.

    Args:
        title: the heading.
        text: what is to be seen.
        pictures: below that.
        tables: below those.
        cards: below those, by the heading of each row of them; "" for none.
        folded: a long text, which is shown once it is asked for.
    """

    title: str
    text: str = ""
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    cards: dict[str, Sequence[Card]] = field(default_factory=dict)
    folded: str = ""


def render(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """The page.

    Args:
        title: of the page.
        facts: names and values that it begins with.
        sections: what it consists of.
    """
    from jinja2 import Environment  # torch needs it too

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.render(title=title, facts=facts, sections=sections, cell=_cell, is_number=_is_number)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def drawn(figure: Figure, caption: str = "") -> Picture:
    """A figure of lines, which is sharp at every size."""
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "visionattn"}):  # the same names of parts, so that the same run has the same page
        figure.savefig(file, format="svg", metadata={"Date": None})
    return Picture(_address("svg+xml", file.getvalue()), caption)


def shown(image: Image.Image, caption: str = "", side: int = 320) -> Picture:
    """An image in the page.

    Args:
        image: the image, of any size.
        caption: what it shows.
        side: most pixels of its longer side.
    """
    image = image.copy()
    image.thumbnail((side, side))
    most, file = max(image.size), io.BytesIO()
    kind, options = ("png", {}) if most <= TINY else ("jpeg", {"quality": 90})
    image.convert("RGB").save(file, kind, **options)
    return Picture(_address(kind, file.getvalue()), caption, most <= SMALL)


def _address(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def overlay(image: Image.Image, heat: Tensor) -> Image.Image:
    """The image in grey, under the colours of what counts in it.

    Args:
        image: the image.
        heat: (h, w) of it, from 0 to 1.
    """
    heat = F.interpolate(heat[None, None].float(), (image.height, image.width), mode="bilinear")[0, 0].clamp(0, 1)
    bright = 0.1 + 0.8 * heat.cpu().numpy()  # the ends of the colours are dark
    colour = Image.fromarray((colormaps["turbo"](bright)[..., :3] * 255).astype("uint8"))
    return Image.blend(image.convert("L").convert("RGB"), colour, 0.5)
