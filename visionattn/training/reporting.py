"""report.html of a run: its curves and options, and what its best weights make of the validation images."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from torch import Tensor

from ..data.images import ImageSet
from ..data.loader import choose_workers, eval_loader, read_batches
from ..errors import VisionattnError, all_lines
from ..progress import track
from ..reports.curves import draw_curves, metrics_of, read_rows
from ..reports.findings import Findings, View, evidence
from ..reports.page import Section, Table, drawn, render
from ..tasks.task import autocast, image_mode
from ..weights.files import write_file
from .config import TrainConfig
from .opened import Opened, open_model
from .yaml_text import plain, read_file, resolved

TOGETHER = 8
"""Images of one size that are explained at once."""
MOST = 10_000
"""Validation images that a report is about: those of larger sets are taken at equal distances."""


def write_report(folder: Path) -> Path:
    """Write report.html into a run folder.

    Args:
        folder: of a run that has ended an epoch.

    Returns:
        the file.

    Raises:
        VisionattnError: if it is no such folder, or its weights or data cannot be read.
    """
    rows, text = read_rows(folder), (folder / "config.yaml").read_text()
    options = resolved(read_file(folder / "config.yaml", f"cannot read {folder}"))
    facts = [(name, str(options[name])) for name in ("task", "model", "head") if options.get(name)]
    facts.append(("epochs", str(len(rows))))
    changed = Section("Options", "Those that are not the default ones.", tables=[_changed(options)], folded=text)
    checkpoint = folder / "checkpoints" / "best.safetensors"
    if not checkpoint.is_file():
        figure = drawn(draw_curves({"": rows}, metrics_of(rows)[:3]))
        curves = Section("Curves", "No epoch has left weights to look at.", [figure])
        return _written(folder, facts, [curves, changed])
    opened = open_model(str(checkpoint))
    task = opened.task
    images = task.load_validation(opened.classes)
    if list(images.classes) != list(opened.classes):
        raise VisionattnError(f"cannot report on {folder}: its classes are not those of {images.name}")
    step = -(-len(images) // MOST)
    some = replace(images, indices=images.indices[::step])
    looker = Looker(opened, some)
    findings = make_findings(opened, some)
    for outputs, targets in looker.outputs():
        findings.add(outputs, targets)
    figures = findings.metrics.compute()
    known = [name for name in figures if name != "loss"]
    shown = [name for name in task.shown if name in known] or known  # those of several labels, which are no options
    curves = Section("Curves", pictures=[drawn(draw_curves({"": rows}, shown, task.unit.strip()))])
    sections = findings.sections(looker)
    of = f"{len(some)} of {len(images)}" if step > 1 else str(len(images))
    facts += [
        ("parameters", f"{sum(p.numel() for p in opened.model.parameters()) / 1e6:.3f} M"),
        ("validation images", f"{of} from {images.name}"),
        *((name.replace("_", " "), task.told(figures[name])) for name in shown),
    ]
    return _written(folder, facts, [curves, *sections, changed])


def report_after(folder: Path) -> None:
    """Write the report of a run that has just ended, and tell where it is; a failure is told, and is none of the run.

    Args:
        folder: of the run.
    """
    if not PartialState().is_main_process:
        return
    try:
        print(f"report     {write_report(folder)}", flush=True)
    except Exception as error:  # the run is done: whatever this raises is no reason to end it with an error
        print(f"no report  {all_lines(error)}", file=sys.stderr, flush=True)


def _written(folder: Path, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> Path:
    file = folder / "report.html"
    write_file(file, render(folder.resolve().name, facts, sections))
    return file


def _changed(options: Mapping[str, Any]) -> Table:
    """The options that are not the default ones."""
    defaults = dict(_flat(plain(TrainConfig())))
    rows = [[name, str(value)] for name, value in _flat(options) if name in defaults and defaults[name] != value]
    return Table(["option", "value"], rows)


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, Mapping) and not name.endswith("kwargs"):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def make_findings(opened: Opened, images: ImageSet) -> Findings:
    """What is to be found out about a model.

    Args:
        opened: the model.
        images: to look at.
    """
    from ..reports.classes import Answers, Labels  # here, as tasks need libraries that others lack
    from ..reports.findings import Others
    from ..tasks.classification import Classification

    task = opened.task
    if isinstance(task, Classification):
        return (Labels if images.several else Answers)(task, images)
    if task.config.task == "detection":
        from ..reports.objects import Objects

        return Objects(task, images)
    if task.config.task == "segmentation":
        from ..reports.maps import Maps

        return Maps(task, images)
    return Others(task, images)


class Looker:
    """Shows images to a model: all of them once, and some of them again.

    Args:
        opened: the model.
        images: the images.
    """

    def __init__(self, opened: Opened, images: ImageSet) -> None:
        self.task, self.model, self.images = opened.task, opened.model, images
        self.device, self.precision = PartialState().device, opened.task.config.precision
        data = opened.task.config.data
        share = data.eval_batch_size, image_mode(opened.model), choose_workers(data.num_workers, self.device)
        self.loader = eval_loader(images, opened.task.transform(False), *share, collate=opened.task.collate(False))

    @torch.no_grad()
    def _predict(self, images: Any) -> Any:
        with autocast(self.device, self.precision):
            return self.task.predict(self.model, send_to_device(images, self.device))

    def outputs(self) -> Iterator[tuple[Any, Any]]:
        """What the model makes of each batch, and its targets."""
        for batch in track(read_batches(self.loader), "report", len(self.loader)):
            yield self._predict(batch.images), send_to_device(batch.targets, self.device)

    def __call__(self, indices: Sequence[int]) -> list[View]:
        """Images of these numbers, with what speaks for the answers."""
        views = []
        for sample in self.loader.dataset.__getitems__([(0, index) for index in indices]):
            views.append((sample.image, sample.target, self.images.place(sample.index)))
        same = len({image.shape for image, *_ in views}) == 1 and isinstance(self._collated(views[:1]), Tensor)
        size = TOGETHER if same else 1
        return [view for start in range(0, len(views), size) for view in self._viewed(views[start : start + size])]

    def _viewed(self, samples: list[tuple[Tensor, Any, str]]) -> list[View]:
        outputs = self._predict(self._collated(samples))
        images = torch.stack([image for image, *_ in samples]).to(self.device)
        heats = evidence(self.model, images, outputs, self.images.classes)
        return [
            View(image, target, output, heat, place)
            for (image, target, place), output, heat in zip(samples, outputs, heats, strict=True)
        ]

    def _collated(self, samples: list[tuple[Tensor, Any, str]]) -> Any:
        return self.task.collate(False)([sample[0] for sample in samples], [sample[1] for sample in samples])[0]
