"""The generated documents are what their generators say."""

import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import visionattn
from visionattn.cli.catalog import models_table

DOCS = Path(__file__).parent.parent / "docs"


def test_the_table_of_models_is_current():
    """Refresh it with `python -m visionattn list --table` below the heading."""
    assert (DOCS / "models.md").read_text().split("\n\n", 2)[2] == models_table() + "\n"


def test_every_family_has_a_page():
    families = {visionattn.model_info(name).family for name in visionattn.list_models()}
    assert {page.stem for page in (DOCS / "families").glob("*.md")} == families


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("test_dinat", ["LayerNorm", "linear", "softmax attention", "linear", "+", "LayerNorm", "linear", "GELU"]),
        ("test_focalnet", ["linear", "depthwise conv 3x3", "product, a gate"]),
        ("test_van", ["BatchNorm2d", "linear", "GELU", "depthwise conv 5x5", "depthwise conv 7x7, dilation 3"]),
    ],
)
def test_a_block_is_drawn_as_it_is_computed(name, labels):
    """Its layers come in their order, and each sum adds what came before its branch."""
    drawing = runpy.run_path(str(DOCS / "site" / "draw_block.py"))
    with torch.device("meta"):
        model = visionattn.create_model(name).eval()
        images = torch.zeros(1, 3, 64, 64)
    steps = drawing["trace"](model.stages[0].blocks[0], lambda: model(images))
    kinds = ["linear" if "linear" in step.label else step.label for step in steps]
    assert kinds[: len(labels)] == labels
    first, second = (i for i, step in enumerate(steps) if step.label == "+")
    assert set(steps[first].sources) == {-1, first - 1} and set(steps[second].sources) == {first, second - 1}
    ElementTree.fromstring(drawing["draw"](steps, f"A block of {name} & <more>"))
