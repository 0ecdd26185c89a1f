"""`visionattn plot` and `visionattn report`: curves, and the page about what a run's weights make of its images."""

import base64
import csv
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visionattn.cli import main as command
from visionattn.reports.maps import error_map
from visionattn.reports.objects import mistakes
from visionattn.training import reporting
from visionattn.training.config import parse_train
from visionattn.training.reporting import write_report
from visionattn.training.run import train

QUICK = ["--trackers", "[]", "--data.num_workers", "0", "--epochs", "2", "--schedule.warmup_epochs", "0"]
DIGITS = [*QUICK, "--data.val_fraction", "0.6", "--data.batch_size", "64", "--data.eval_batch_size", "256"]
SCENES = [*QUICK, "--data.batch_size", "2", "--annotations.scene_count", "12", "--annotations.scene_size", "64"]
HEADS = {
    "detection": ["--head_kwargs.fpn_channels", "64"],
    "segmentation": ["--head_kwargs", '{"pyramid_channels": 32, "segmentation_channels": 32}'],
}


class Page(HTMLParser):
    """The tables by the heading above them, and what the page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.sources: list[str] = []
        self.heading, self.words = "", ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.sources += [found[key] for key in ("src", "href") if found.get(key)]
        if tag not in ("img", "meta"):
            self.open.append(tag)
        if tag in ("h2", "td"):
            self.words = ""
        if tag == "tr":
            self.tables.setdefault(self.heading, []).append([])

    def handle_data(self, data):
        self.words += data

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "h2":
            self.heading = self.words
        if tag == "td":
            self.tables[self.heading][-1].append(self.words.strip())

    def rows(self, heading: str) -> list[list[str]]:
        return [row for row in self.tables[heading] if row]


def read(folder: Path) -> Page:
    page = Page((folder / "report.html").read_text())
    assert not page.open and page.sources
    assert all(re.match(r"data:image/(png|jpeg|svg\+xml);base64,", source) for source in page.sources)
    return page


def metrics(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of the command on the digits: the first with a report."""
    output = tmp_path_factory.mktemp("runs")
    for number, epochs, report in (("0", "2", "true"), ("1", "1", "false")):
        own = ["--name", f"run{number}", "--epochs", epochs, "--report", report]
        assert command(["train", *DIGITS, *own, "--output", str(output)]) == 0
    return output


def test_a_run_ends_with_a_report_of_its_figures(runs: Path):
    folder = runs / "run0"
    page = read(folder)
    rows = page.rows("Classes")
    best = max(float(row["val_top1"]) for row in metrics(folder))
    images = [int(row[1]) for row in rows]
    assert [row[0] for row in rows] == list("0123456789") and sum(images) == 1078
    recalled = sum(n * float(row[2]) for n, row in zip(images, rows, strict=True)) / sum(images)
    assert recalled == pytest.approx(best, abs=0.05)
    assert f"{best:.4f} %" in (folder / "report.html").read_text()
    assert ["data.val_fraction", "0.6"] in page.rows("Options")
    assert not (runs / "run1" / "report.html").exists()


def test_the_page_is_the_same_again(runs: Path, capsys: pytest.CaptureFixture):
    before = (runs / "run0" / "report.html").read_bytes()
    (runs / "run0" / "report.html").unlink()
    assert command(["report", str(runs / "run0")]) == 0
    assert capsys.readouterr().out.strip() == str(runs / "run0" / "report.html")
    assert (runs / "run0" / "report.html").read_bytes() == before


def test_a_report_that_fails_does_not_fail_the_run(tmp_path: Path, capsys, monkeypatch):
    def fail(folder):
        raise RuntimeError("there is\nno ink")

    monkeypatch.setattr(reporting, "write_report", fail)
    reporting.report_after(tmp_path)
    out, err = capsys.readouterr()
    assert not out and err == "no report  there is no ink\n"


@pytest.mark.parametrize("task", HEADS)
def test_reports_of_dense_tasks(tmp_path: Path, task: str):
    folder = train(*parse_train(["--task", task, *HEADS[task], *SCENES, "--output", str(tmp_path)]))
    page = read(write_report(folder).parent)
    rows = page.rows("Classes")
    if task == "detection":
        assert "Precision and recall" in (folder / "report.html").read_text()
        assert sum(int(row[1]) for row in rows) > 0
        return
    best = max(float(row["val_mIoU"]) for row in metrics(folder))
    ious = [float(row[1]) for row in rows if row[1] != "-"]
    assert len(rows) == 11 and np.mean(ious) == pytest.approx(best, abs=0.06)
    assert sum(int(row[2]) for row in rows) == 2 * 64 * 64


def test_what_counts_as_a_mistake():
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2, 1]), "iscrowd": torch.tensor([0, 0, 1])}
    found = {"boxes": boxes[[0, 0, 1, 2]], "labels": torch.tensor([1, 1, 1, 1])}
    assert mistakes(found | {"scores": torch.tensor([0.9, 0.8, 0.7, 0.6])}, target) == (1, 2)
    assert mistakes(found | {"scores": torch.full((4,), 0.4)}, target) == (2, 0)
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "iscrowd": torch.zeros(0)}
    assert mistakes(found | {"scores": torch.full((4,), 0.9)}, none) == (0, 4)


def test_errors_are_where_the_classes_differ():
    found, target = torch.zeros(2, 2, dtype=torch.int64), torch.tensor([[0, 1], [255, 0]])
    pixels = np.asarray(error_map(Image.new("RGB", (2, 2), "black"), found, target))
    assert (pixels[0, 0] == pixels[1, 1]).all() and pixels[0, 1].tolist() != pixels[1, 0].tolist()
    assert len({tuple(pixel) for pixel in pixels.reshape(-1, 3).tolist()}) == 3


def test_curves_of_several_runs_in_one_picture(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    folders, svg = [str(runs / "run0"), str(runs / "run1")], tmp_path / "both.svg"
    assert command(["plot", *folders, "--metrics", "top5", "--output", str(svg)]) == 0
    assert capsys.readouterr().out == f"{svg}\n" and "<svg" in svg.read_text()
    png = tmp_path / "one.png"
    assert command(["plot", folders[0], "--output", str(png)]) == 0
    assert Image.open(png).width > 300
    before = png.read_bytes()
    for argv, message in (
        ([str(tmp_path)], "is not a run folder of train.py (it has no metrics.csv)"),
        ([*folders, "--metrics", "top1,top9"], "no run has the metric top9: there are top1, top5"),
        ([*folders, "--output", "curves.gif"], "expected a name that ends in .png or .svg"),
        ([*folders, "--output", str(png)], "exists: give another --output, or --overwrite"),
        ([*folders, "--output", str(tmp_path / "no" / "c.png")], "there is no folder"),
    ):
        capsys.readouterr()
        assert command(["plot", *([] if "--output" in argv else ["--output", str(tmp_path / "c.png")]), *argv]) == 2
        out, err = capsys.readouterr()
        assert message in err and len(err.splitlines()) == 1 and not out
    assert png.read_bytes() == before and not (tmp_path / "c.png").exists()


def test_what_is_no_run_is_told_in_one_line(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "metrics.csv").write_text("epoch,train_loss\n")
    (tmp_path / "config.yaml").write_text("")
    assert command(["report", str(tmp_path)]) == 2
    assert "has no epoch to draw yet" in capsys.readouterr().err
    (tmp_path / "metrics.csv").write_text("epoch,train_loss\n0,much\n")
    assert command(["report", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "cannot read" in told and len(told.splitlines()) == 1
    (tmp_path / "metrics.csv").write_text("epoch,train_loss,lr\n0,1.5,0.1\n")  # every update was skipped
    assert command(["report", str(tmp_path)]) == 0
    page = read(tmp_path)
    assert "svg" in base64.b64decode(page.sources[0].partition(",")[2]).decode()
    assert list(tmp_path.glob(".*")) == []
