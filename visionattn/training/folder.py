"""The run folder: where it is, and which checkpoints are in it."""

import errno
import itertools
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from ..errors import user_input
from ..weights.description import plain_name
from .checkpoint import link, write_file
from .config import TrainConfig, to_yaml


def make_folder(config: TrainConfig, fill: Callable[[Path], None]) -> Path:
    """Make a run folder, which has options and whatever `fill` puts into it from the moment that it is there."""
    images = config.data.root if config.data.name == "folder" else config.data.name
    parts = [plain_name(config.model), config.head, Path(images).resolve().name]
    wanted = Path(config.output, config.name or "-".join(filter(None, parts)))
    hidden = wanted.with_name(f".{wanted.name}.{secrets.token_hex(4)}")  # until it is complete
    with user_input(f"cannot write to {config.output}", OSError):
        try:
            (hidden / "checkpoints").mkdir(parents=True)
            write_file(hidden / "config.yaml", to_yaml(config))
            fill(hidden)
            numbered = (wanted.with_name(f"{wanted.name}-{number}") for number in itertools.count(2))
            return next(filter(None, (_renamed(hidden, path) for path in itertools.chain([wanted], numbered))))
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise


def _renamed(folder: Path, path: Path) -> Path | None:
    """The folder by its new name, unless there is something of this name, which another run may just have made."""
    try:
        return None if path.exists() else folder.rename(path)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            return None
        raise


def remove_temporaries(folder: Path) -> None:
    """Remove what a run left that was killed as it wrote a file; safetensors has names of its own for that."""
    for place in (folder, folder / "checkpoints", folder / "predictions"):
        for stale in (*place.glob(".*.tmp"), *place.glob(".tmp??????")):
            if not stale.is_dir():
                stale.unlink()


def remove_unused(folder: Path) -> None:
    """Remove the folder of a run that has come to nothing, if it holds no more than runs begin with."""
    begun = re.compile(r"config\.yaml|metrics\.csv|checkpoints/last\.safetensors|(.*/)?events\.out\.tfevents\.[^/]*")
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
    if all(map(begun.fullmatch, files)):
        shutil.rmtree(folder)


def keep_best(folder: Path, epochs: list[int], several: bool) -> None:
    """Keep the checkpoints of these epochs and of no others.

    Args:
        folder: Run folder.
        epochs: The best ones, in order; the first is kept as best too.
        several: Whether they have files of their own; else there is best alone, which is left as it is.
    """
    checkpoints = folder / "checkpoints"
    best = checkpoints / "best.safetensors"
    kept = [checkpoints / f"epoch-{epoch}.safetensors" for epoch in epochs] if several else []
    for path in kept:
        if not path.exists():  # it was best alone, when one was kept
            link(best, path)
    if kept:
        link(kept[0], best)
    for path in set(checkpoints.glob("epoch-*.safetensors")) - set(kept):
        if re.fullmatch(r"epoch-\d+", path.stem):
            path.unlink()
