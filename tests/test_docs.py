"""The generated documents are what their generators say."""

from pathlib import Path

from visionattn.cli.catalog import models_table

MODELS = Path(__file__).parent.parent / "docs" / "models.md"


def test_the_table_of_models_is_current():
    """Refresh it with `python -m visionattn.cli list --table` below the heading."""
    assert MODELS.read_text().split("\n\n", 2)[2] == models_table() + "\n"
