"""`visionattn predict`."""

import csv
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import VisionattnError, printable
from ..measure import positive
from .catalog import print_table
from .parser import Command, Parser

CELLS = {
    "class": ("image", "class", "probability"),
    "objects": ("image", "class", "score", "x", "y", "width", "height"),
    "map": ("image", "class", "share", "x", "y", "width", "height"),
}
"""Heads of the CSV of what is found."""
FORMATS = ("text", "table", "json", "csv")


def _add(parser: Parser) -> None:
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="file, folder (with those in it), pattern ('photos/**/*.jpg'), http address, or - for stdin",
    )
    parser.add_argument("--checkpoint", default="", help="what train.py or convert saved, of any task")
    parser.add_argument("--model", default="", help="classifier by its name, a file, hf-hub:... or local-dir:...")
    parser.add_argument("--pretrained", action="store_true", help="with the published weights of --model")
    parser.add_argument("--top_k", type=positive, help="most classes of an image (default: 5)")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="text",
        help="what is printed; json: a list for classifiers, COCO's for boxes, masks and maps",
    )
    parser.add_argument("--json", metavar="FILE", help="write to this file what --format json prints, too")
    parser.add_argument(
        "--output", help="folder for a PNG of each image, in detection and segmentation (default: predictions)"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        help="least score of objects, and of classes where an image has several (default: 0.5)",
    )
    parser.add_argument("--overwrite", action="store_true", help="write over pictures, and the file of --json")


def _predict(args: Any) -> int:
    file = Path(args.json) if args.json else None
    if file and not file.parent.is_dir():
        raise VisionattnError(f"cannot write {file}: there is no folder {file.parent}")
    if file and not args.overwrite and os.path.exists(file):
        raise VisionattnError(f"{file} exists: give --json another file, or --overwrite")
    from ..training.predict import Predictions
    from ..weights.files import write_file

    options = args.images, args.checkpoint, args.model, args.pretrained, args.output, args.threshold, args.top_k
    found = Predictions(*options, overwrite=args.overwrite)
    if args.overwrite and not (found.draws or file):
        raise VisionattnError("option --overwrite is of no use to classification: leave it out")
    kept = []
    for each in _printed(found, args.format):
        if file or args.format == "json":
            kept.append((each, each.listed()))
    if file or args.format == "json":
        text = json.dumps(_classes(kept) if found.sample == "class" else coco(kept, found), indent=1)
        if file:
            write_file(file, text + "\n", args.overwrite)
        if args.format == "json":
            print(text)
    return 1 if found.failed else 0


def _printed(predictions: Any, form: str) -> Iterable[Any]:
    """The predictions, which are printed as they come; a table once all are there."""
    rows, heads = [], CELLS[predictions.sample]
    writer = csv.DictWriter(sys.stdout, heads, lineterminator="\n")
    if form == "csv":
        writer.writeheader()
    for each in predictions:
        yield each
        if form == "text":
            drawn = f"; see {each.picture}" if each.picture else ""
            print(printable(f"{each.name}: {each.summary}{drawn}"), flush=True)
        elif form in ("table", "csv"):
            rows += [{"image": each.name} | _flat(entry) for entry in each.listed()]
        if form == "csv":
            writer.writerows(rows)
            rows = []
    if form == "table" and rows:
        print_table(heads, [[_rounded(value) for value in row.values()] for row in rows])


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    """What was found as a row of a table: names and shares, and the sides of a box by their names."""
    row = {key: value for key, value in entry.items() if isinstance(value, str | float) and key != "area"}
    sides = zip(("x", "y", "width", "height"), entry.get("bbox", ()), strict=False)
    return row | {side: round(value, 2) for side, value in sides}


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else printable(value)


def _classes(kept: list[tuple[Any, list[dict]]]) -> list[dict[str, Any]]:
    """Images with their classes."""
    return [{"image": each.name, "found": listed} for each, listed in kept]


def coco(kept: list[tuple[Any, list[dict]]], predictions: Any) -> dict[str, Any]:
    """Objects, or the parts of semantic maps, as a document of COCO's.

    Args:
        kept: predictions, and what was found in each.
        predictions: all of them.
    """
    first = int(predictions.sample == "objects")  # classes of maps count from 0, as the values of masks do
    images = [
        {"id": number, "file_name": each.name, "width": each.size[0], "height": each.size[1]}
        for number, (each, _) in enumerate(kept)
    ]
    found = [(image, entry) for image, (_, listed) in enumerate(kept) for entry in listed]
    annotations = [
        {"id": number, "image_id": image} | {key: value for key, value in entry.items() if key != "class"}
        for number, (image, entry) in enumerate(found)
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(predictions.classes, first)]
    return {"images": images, "categories": categories, "annotations": annotations}


COMMANDS = (Command("predict", "tell and draw what a model makes of images", _add, _predict),)
