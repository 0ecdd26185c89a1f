"""The run folder: where it is, and which checkpoints are in it."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path

from ..create import plain_name
from ..data.config import user_input
from .checkpoint import link, write_file
from .config import TrainConfig, to_yaml


def make_folder(config: TrainConfig, fill: Callable[[Path], None]) -> Path:
    """Make a run folder, which has options and whatever `fill` puts into it from the moment that it is there."""
    images = config.data.root if config.data.name == "folder" else config.data.name
    parts = [plain_name(config.model), config.head, Path(images).resolve().name]
    wanted = Path(config.output, config.name or "-".join(filter(None, parts)))
    with user_input(f"cannot write to {config.output}", OSError):
        hidden = wanted.with_name(f".{wanted.name}.{os.getpid()}")  # until it is complete
        (hidden / "checkpoints").mkdir(parents=True)
        write_file(hidden / "config.yaml", to_yaml(config))
        fill(hidden)
        numbered = (wanted.with_name(f"{wanted.name}-{number}") for number in itertools.count(2))
        return hidden.rename(next(path for path in itertools.chain([wanted], numbered) if not path.exists()))


def remove_temporaries(folder: Path) -> None:
    """Remove what a run left that was killed as it wrote a checkpoint, and safetensors, which has names of its own."""
    for stale in (folder / "checkpoints").glob(".*"):
        stale.unlink()


def keep_best(folder: Path, epochs: list[int]) -> None:
    """Keep the checkpoints of these epochs alone, the first as best."""
    checkpoints = folder / "checkpoints"
    kept = [checkpoints / f"epoch-{epoch}.safetensors" for epoch in epochs]
    link(kept[0], checkpoints / "best.safetensors")
    for path in set(checkpoints.glob("epoch-*.safetensors")) - set(kept):
        path.unlink()
