"""`visionattn plot` and `visionattn report`."""

from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..errors import VisionattnError, optional
from .parser import Command, Parser

SUFFIXES = (".png", ".svg")


def _add_plot(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder of train.py")
    parser.add_argument(
        "--metrics", metavar="NAME,NAME", help="metrics to draw (default: three, the first of each run in turn)"
    )
    parser.add_argument("--output", default="curves.png", help="picture to write, by its suffix a PNG or SVG")
    parser.add_argument("--overwrite", action="store_true", help="write over a picture that is there")


def _plot(args: Any) -> None:
    output, folders = Path(args.output), [Path(run) for run in dict.fromkeys(args.runs)]
    if output.suffix.lower() not in SUFFIXES:
        raise VisionattnError(f"cannot write {output}: expected a name that ends in {' or '.join(SUFFIXES)}")
    if not output.parent.is_dir():
        raise VisionattnError(f"cannot write {output}: there is no folder {output.parent}")
    with optional():
        from ..reports.curves import draw_curves, metrics_of, read_rows
        from ..weights.files import write_file

    names = [folder.resolve().name for folder in folders]
    runs = {
        name if names.count(name) == 1 else str(folder): read_rows(folder)
        for name, folder in zip(names, folders, strict=True)
    }
    own = [metrics_of(rows) for rows in runs.values()]
    known = list(dict.fromkeys(name for names in own for name in names))
    in_turns = dict.fromkeys(name for names in zip_longest(*own) for name in names if name)  # each run has its say
    metrics = list(in_turns)[:3] if args.metrics is None else args.metrics.split(",")
    if unknown := [name for name in metrics if name not in known]:
        raise VisionattnError(f"no run has the metric {unknown[0]}: there are {', '.join(known)}")
    if output.exists() and not args.overwrite:
        raise VisionattnError(f"{output} exists: give another --output, or --overwrite")
    figure = draw_curves(runs, metrics)
    kind = output.suffix[1:].lower()
    write_file(output, lambda file: figure.savefig(file, dpi=120, format=kind), args.overwrite)
    print(output)


def _add_report(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder of train.py")


def _report(args: Any) -> None:
    with optional():
        from ..training.reporting import write_report

    print(write_report(Path(args.run)))


COMMANDS = (
    Command("plot", "draw the curves of one or several runs", _add_plot, _plot),
    Command("report", "write report.html of a run: what it makes of its validation images", _add_report, _report),
)
