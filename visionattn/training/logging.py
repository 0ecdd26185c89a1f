"""What a run tells while it goes and leaves behind: progress, metrics.csv, curves.png, pictures, traces, trackers."""

import csv
import io
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ..data.drawing import grid
from ..errors import VisionattnError, require, user_input
from ..progress import is_quiet
from ..reports.curves import draw_curves
from ..tasks.task import Task
from ..weights.files import write_file
from .config import TrainConfig
from .yaml_text import plain, read_file, resolved


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that accelerate would leave out, since they are not installed."""
    require(*{"tensorboard"}.intersection(names))
    lacking = {kind.value for kind in LoggerType} - {kind.value for kind in get_available_trackers()} - {"all"}
    for name in lacking.intersection(names):
        raise VisionattnError(f"tracker {name} is not installed: python -m pip install {name}")


class RunLog:
    """Log of one run, kept by the main process; the others' calls do nothing.

    Args:
        folder: run folder.
        accelerator: the run's accelerator, which owns the trackers.
        config: options of the run.
        task: which says what metrics to show.
        updates: updates of an epoch.
        start: epoch to go on from; rows of metrics.csv from there on are dropped, since they come again.
    """

    def __init__(
        self, folder: Path, accelerator: Accelerator, config: TrainConfig, task: Task, updates: int, start: int
    ) -> None:
        self.accelerator, self.main = accelerator, accelerator.is_main_process
        self.epochs, self.updates, self.shown, self.metric = config.epochs, updates, task.shown, task.metric
        self.unit = task.unit.strip()
        self.csv, self.png, self.pictures = folder / "metrics.csv", folder / "curves.png", folder / "predictions"
        self.rows: list[dict[str, Any]] = []
        self.watched: dict[str, float] = {}
        self.bar: Progress | None = None
        accelerator.project_configuration.logging_dir = str(folder)
        accelerator.init_trackers("visionattn", init_kwargs={"tensorboard": {"purge_step": start * updates}})
        if not self.main:
            return
        if self.csv.exists():
            with user_input(f"cannot go on with {self.csv}", OSError, ValueError, KeyError, TypeError, csv.Error):
                rows = csv.DictReader(io.StringIO(self.csv.read_text()))
                self.rows = [row for row in rows if None not in row.values() and int(row["epoch"]) < start]
            self._write_rows()
        for tracker in accelerator.trackers:
            if tracker.name != "tensorboard":  # which would put the options into a folder of their own
                tracker.store_init_configuration(plain(config))

    def start_epoch(self, epoch: int, update: int) -> None:
        """Begin an epoch at an update."""
        self.epoch, self.first, self.update, self.images, self.speed = epoch, update, update, 0, 0.0
        self.watched = {}
        self.rows = [row for row in self.rows if int(row["epoch"]) < epoch]  # where a run was rolled back
        self.began = self.told = time.time()
        if self.main and sys.stdout.isatty() and not is_quiet():
            head = TextColumn(f"epoch {epoch + 1}/{self.epochs}")
            self.bar = Progress(
                head, BarColumn(24), MofNCompleteColumn(), TextColumn("{task.description}"), transient=True
            )
            self.task = self.bar.add_task("", total=self.updates, completed=update)
            self.bar.start()

    def step(self, images: int) -> None:
        """Count an update of so many images."""
        self.update += 1
        self.images += images
        if self.bar:
            self.bar.update(self.task, advance=1)

    def report(self, loss: float, lr: float) -> None:
        """Show loss and learning rate of the last update."""
        if not self.main:
            return
        seconds = time.time() - self.began
        left = self.updates * (self.epochs - self.epoch) - self.update
        self.speed, eta = self.images / seconds, duration(seconds / (self.update - self.first) * left)
        line = f"loss {loss:.4f}  lr {lr:.2e}  {self.speed:.0f} images/s  ETA {eta}"
        if self.bar:
            self.bar.update(self.task, description=line)
        elif time.time() - self.told > 10 and not is_quiet():  # a line now and then
            self.told = time.time()
            print(f"epoch {self.epoch + 1}/{self.epochs}  update {self.update}/{self.updates}  {line}", flush=True)
        self.accelerator.log({"train/batch_loss": loss, "train/lr": lr}, step=self._step())

    def watch(self, figures: dict[str, float]) -> None:
        """Give the trackers what the monitor found in the last update; metrics.csv has the last ones of an epoch."""
        self.watched = figures
        if self.main:
            self.accelerator.log(figures, step=self._step())

    def _step(self) -> int:
        return self.epoch * self.updates + self.update

    def show(self, epoch: int, picture: Image.Image) -> None:
        """Keep a picture of what the model makes of some images after an epoch, and give it to the trackers."""
        if not self.main:
            return
        with user_input(f"cannot write to {self.pictures}", OSError):
            self.pictures.mkdir(exist_ok=True)
            write_file(self.pictures / f"epoch-{epoch + 1:03}.png", lambda file: picture.save(file, "png"))
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"predictions": np.asarray(picture)[None]}, (epoch + 1) * self.updates, **layout)

    def end_epoch(self, train_loss: float, lr: float, metrics: dict[str, float], best: float) -> None:
        """Record an epoch: a row, a line, the trackers and the curves."""
        if not self.main:
            return
        self._stop_bar()
        seconds = time.time() - self.began
        row = {"epoch": self.epoch, "train_loss": f"{train_loss:.6f}"}
        row |= {f"val_{name}": f"{value:.6f}" if name == "loss" else f"{value:.4f}" for name, value in metrics.items()}
        row |= {"lr": f"{lr:.6e}", "seconds": f"{seconds:.2f}"}
        row |= {name: f"{value:.6g}" for name, value in self.watched.items()}
        self.rows.append(row)
        self._write_rows()
        self.accelerator.log(
            {"train/loss": train_loss, **{f"val/{name}": value for name, value in metrics.items()}},
            step=(self.epoch + 1) * self.updates,
        )
        self._draw()
        eta = duration(seconds * (self.epochs - self.epoch - 1))
        values = "  ".join(f"val {name} {row[f'val_{name}']}" for name in self.shown)
        Console(soft_wrap=True, highlight=False).print(
            f"epoch {self.epoch + 1}/{self.epochs}  loss {train_loss:.4f}  {values}  best {self.metric} {best:.4f}"
            f"  lr {lr:.2e}  {self.speed:.0f} images/s  ETA {eta}"
        )

    def stop(self) -> None:
        """Close the progress bar and the trackers."""
        self._stop_bar()
        self.accelerator.end_training()

    def _stop_bar(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None

    def _write_rows(self) -> None:
        text = io.StringIO()
        columns = dict.fromkeys(key for row in self.rows for key in row)  # a resumed run may have others than before
        writer = csv.DictWriter(text, list(columns) or ["epoch"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_file(self.csv, text.getvalue())

    def _draw(self) -> None:
        metrics = [name for name in self.shown if name != "loss"]
        figure = draw_curves({"": self.rows}, metrics, self.unit)
        write_file(self.png, lambda file: figure.savefig(file, dpi=100))


def duration(seconds: float) -> str:
    """Seconds as minutes:seconds or hours:minutes:seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Gallery:
    """The first images of a validation: beside each target, what the model makes of the image.

    Args:
        task: which draws.
        classes: names of the classes.
    """

    count = 8
    side = 320
    """Most pixels of a picture's longer side."""

    def __init__(self, task: Task, classes: list[str]) -> None:
        self.task, self.classes = task, classes
        self.pictures: list[Image.Image] = []

    def add(self, images: Any, targets: Any, outputs: Any) -> None:
        """Draw those of a batch that there is room for."""
        for sample in islice(zip(images, targets, outputs, strict=True), self.count - len(self.pictures)):
            if drawn := self.task.draw(*sample, self.classes):
                for picture in drawn:
                    picture.thumbnail((self.side, self.side))
                self.pictures.append(grid(drawn))

    def picture(self) -> Image.Image | None:
        """All of them; None if there are none."""
        return grid(self.pictures) if self.pictures else None


def check_window(window: str, last: int, resumed_at: int, folder: Path | None) -> None:
    """Refuse a window of `Profiler` of which the run sees nothing.

    Args:
        window: first update and the one after the last.
        last: updates of the whole run.
        resumed_at: update at which it goes on.
        folder: of a run that is resumed; the window that it began with may be over.

    Raises:
        VisionattnError: if it lies after the run's end, or before where it goes on.
    """
    first, end = map(int, window.split("-"))
    if first >= last:
        raise VisionattnError(f"option profile is of no use: {window} is past the end, the run has {last} updates")
    if folder is None or end > resumed_at:
        return
    began_with = read_file(folder / "config.yaml", f"cannot resume {folder}").get("profile")
    if resolved(began_with) != window:
        raise VisionattnError(f"option profile is of no use: {window} is over, the run goes on at update {resumed_at}")


class Profiler:
    """torch.profiler over a window of updates.

    Args:
        window: first update and the one after the last, "10-20", counted from the start of the run; empty for none.
        folder: where the trace goes, for chrome://tracing or https://ui.perfetto.dev.
    """

    def __init__(self, window: str, folder: Path) -> None:
        self.first, self.end = map(int, window.split("-")) if window else (-1, -1)
        self.file = folder / f"trace-{window}.json"
        self.profile: torch.profiler.profile | None = None

    def step(self, update: int) -> None:
        """Begin or end the window before an update."""
        if self.profile is None and self.first <= update < self.end:  # a resumed run may begin within
            self.profile = torch.profiler.profile(record_shapes=True)
            self.profile.start()
        elif self.profile and update >= self.end:
            self.stop()

    def stop(self) -> None:
        """End the window, if it is open, and write what was seen."""
        if self.profile:
            self.profile.stop()
            self.profile.export_chrome_trace(str(self.file))
            self.profile = None
