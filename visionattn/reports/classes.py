"""Classifiers: confusions, figures of each class, calibration, and images with their answers."""

from collections.abc import Sequence
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from ..data.drawing import to_image
from ..data.images import ImageSet
from ..errors import shortened
from ..tasks.classification import Classification
from .findings import Findings, Look, View, with_evidence
from .page import Card, Picture, Section, Table, drawn, shown

SHOWN = 30
"""Classes that a picture of the confusion matrix has room for."""
PAIRS = 8
"""Confusions of which images are shown."""
EXAMPLES = 6
SIDE = 160


class Answers(Findings):
    """Of images with one class each."""

    def __init__(self, task: Classification, images: ImageSet) -> None:
        super().__init__(task, images)
        self.logits: list[Tensor] = []
        self.targets: list[Tensor] = []

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        self.metrics.update(outputs, targets)
        self.logits.append(outputs.float().cpu())
        self.targets.append(targets.cpu())

    def sections(self, look: Look) -> list[Section]:
        logits, targets, count = torch.cat(self.logits), torch.cat(self.targets), len(self.classes)
        losses, predicted = F.cross_entropy(logits, targets, reduction="none"), logits.argmax(1)
        confusion = (targets * count + predicted).bincount(minlength=count**2).view(count, count)
        sections = [
            self._confusions(confusion, targets, predicted, losses, look),
            Section("Classes", "Sorted by a click on a head.", tables=[class_table(self.classes, confusion)]),
            self._calibration(),
        ]
        told = "The worst are those with the highest loss: wrong, and certain of it. " + HOW
        return [*sections, self.worst_and_random(losses, look, self._card, told)]

    def _confusions(self, confusion: Tensor, targets: Tensor, predicted: Tensor, losses: Tensor, look: Look) -> Section:
        wrong = confusion.clone().fill_diagonal_(0)
        order = wrong.flatten().argsort(descending=True, stable=True)[:PAIRS].tolist()
        cards = {}
        for true, said in (divmod(pair, len(self.classes)) for pair in order if wrong.flatten()[pair]):
            these = ((targets == true) & (predicted == said)).nonzero()[:, 0]
            these = these[losses[these].argsort(descending=True, stable=True)][:EXAMPLES].tolist()
            names, number = (self.classes[true], self.classes[said]), int(wrong[true, said])
            cards[f"{names[0]} taken for {names[1]}: {number} of {int(confusion[true].sum())}"] = [
                self._card(view) for view in look(these)
            ]
        figure, told = draw_confusion(confusion, self.classes)
        text = f"{int(wrong.sum())} of {len(targets)} images are taken for another class. {told}"
        return Section("Confusions", text, [figure], cards=cards)

    def _calibration(self) -> Section:
        images, correct, confidence = self.metrics.by_confidence
        error, bins = self.metrics.calibration_error(), len(images)
        figure = Figure(figsize=(5, 5.3), layout="constrained")
        axes, counts = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
        middles = (torch.arange(bins) + 0.5) / bins
        filled = images > 0
        axes.plot([0, 1], [0, 1], "k--", linewidth=1, label="as often right as it says")
        axes.bar(middles[filled], (correct / images)[filled], 0.9 / bins, label="right answers")
        axes.set(ylabel="share that is right", xlim=(0, 1), ylim=(0, 1), title=f"ECE {error:.2f} %")
        figure.legend(loc="outside upper center", ncols=2)
        counts.bar(middles, images, 0.9 / bins, color="C7")
        counts.set(xlabel="confidence", ylabel="images")
        mean = 100 * confidence.sum().item() / images.sum().item()
        right = 100 * correct.sum().item() / images.sum().item()
        text = (
            f"Of the answers {right:.1f} % are right, their mean confidence is {mean:.1f} %. The expected calibration "
        )
        text += f"error (ECE) is the mean distance of the two over {bins} bins of confidence, weighted by their images."
        return Section("Calibration", text, [drawn(figure)])

    def _card(self, view: View) -> Card:
        probabilities = view.output.float().softmax(0)
        said, label = int(probabilities.argmax()), int(view.target)
        lines = [f"is {self.classes[label]}"]
        lines += [f"says {self.classes[said]}, {100 * probabilities[said]:.1f} %"]
        if said != label:
            lines.append(f"gives {self.classes[label]} {100 * probabilities[label]:.1f} %")
        return Card(_pictures(self, view), lines, said == label, view.place)


HOW = "What counted is Grad-CAM of the answer, red where it speaks for it."


def _pictures(findings: Findings, view: View) -> list[Picture]:
    data = findings.task.config.data
    picture = to_image(view.image, data.mean, data.std)
    return [shown(picture, side=SIDE), *with_evidence(picture, view, SIDE)]


class Labels(Findings):
    """Of images with any number of labels."""

    def __init__(self, task: Classification, images: ImageSet) -> None:
        super().__init__(task, images)
        self.losses: list[Tensor] = []

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        self.metrics.update(outputs, targets)
        loss = F.binary_cross_entropy_with_logits(outputs.float(), targets.float(), reduction="none")
        self.losses.append(loss.mean(1).cpu())

    def sections(self, look: Look) -> list[Section]:
        rows = [
            [name, *figures.values()] for name, figures in zip(self.classes, self.metrics.per_class(), strict=False)
        ]
        table = Table(["class", "images", "average precision %"], rows)
        told = "The worst are those with the highest loss. " + HOW.replace("the answer", "the likeliest label")
        return [
            Section("Classes", "Sorted by a click on a head.", tables=[table]),
            self.worst_and_random(torch.cat(self.losses), look, self._card, told),
        ]

    def _card(self, view: View) -> Card:
        target = view.target.bool()
        labels = ", ".join(name for name, there in zip(self.classes, target.tolist(), strict=True) if there)
        says, found = self.task.summarise(view.output, self.classes, 0.5), view.output[: len(target)] >= 0
        return Card(_pictures(self, view), [f"is {labels or 'nothing'}", f"says {says}"], bool((found == target).all()))


def class_table(classes: Sequence[str], confusion: Tensor, of: str = "images") -> Table:
    """Figures of each class.

    Args:
        classes: their names.
        confusion: counts, by class and prediction.
        of: what is counted.
    """
    hits, there, said = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    wrong = confusion.clone().fill_diagonal_(0)
    rows = []
    for i, name in enumerate(classes):
        n, k, m = int(there[i]), int(hits[i]), int(said[i])
        most = int(wrong[i].argmax())
        mistaken = f"{classes[most]} ({int(wrong[i, most])})" if wrong[i, most] else ""
        rows.append([name, n, _share(k, n), _share(k, m), _share(2 * k, n + m), mistaken])
    return Table(["class", of, "recall %", "precision %", "F1 %", "most often taken for"], rows)


def _share(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None


def draw_confusion(confusion: Tensor, classes: Sequence[str], of: str = "images") -> tuple[Picture, str]:
    """A picture of the confusion matrix, and how to read it.

    Args:
        confusion: counts, by class and prediction.
        classes: their names.
        of: what is counted.
    """
    chosen = torch.arange(len(classes))
    told = f"A row has the {of} of a class, each column those that are taken for one; colours are shares of the row."
    if len(classes) > SHOWN:
        wrong = confusion.clone().fill_diagonal_(0)
        chosen = (wrong.sum(0) + wrong.sum(1)).argsort(descending=True, stable=True)[:SHOWN].sort().values
        told += f" Of the {len(classes)} classes, the {SHOWN} that most confusions are about."
    shares = (confusion / confusion.sum(1, keepdim=True).clamp(min=1))[chosen][:, chosen]
    names, counts = [shortened(classes[i], 24) for i in chosen], confusion[chosen][:, chosen]
    side = 2.5 + 0.38 * len(names)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="prediction", ylabel="class")
    write = partial(axes.text, ha="center", va="center", fontsize=8)
    for row, column in counts.nonzero().tolist():
        text = f"{int(counts[row, column])}" if of == "images" else f"{100 * shares[row, column]:.0f}"
        if text != "0" and len(text) < 5:
            write(column, row, text, color="white" if shares[row, column] > 0.5 else "black")
    return drawn(figure), told
