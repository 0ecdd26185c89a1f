"""`visionattn check`."""

import json
from collections import Counter
from typing import Any

from ..errors import printable
from ..measure import positive
from ..recipes import TASKS
from .parser import Command, Parser

BOX_FORMATS = tuple(f"{unit}{kind}" for unit in ("", "relative_") for kind in ("xywh", "xyxy", "cxcywh"))


def _add(parser: Parser) -> None:
    parser.add_argument("folder", help="of the data, as --data.root of train.py")
    parser.add_argument("--task", choices=TASKS, help="what they are for (default: as they are laid out)")
    parser.add_argument("--labels", default="", metavar="FILE", help="CSV file of images with several labels")
    parser.add_argument("--classes", default="", metavar="FILE", help="names of the classes, as --annotations.classes")
    parser.add_argument("--box_format", choices=BOX_FORMATS, help="as --annotations.box_format")
    parser.add_argument("--masks", action="store_true", help="check the masks of objects too, for mask_rcnn")
    parser.add_argument("--least", type=positive, default=2, help="images or objects that each class needs in training")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="what is printed")


def _check(args: Any) -> int:
    from ..data.check import check
    from ..data.config import AnnotationConfig

    annotations = AnnotationConfig(classes=args.classes, box_format=args.box_format)
    found = check(args.folder, args.task, args.labels, annotations, args.masks, args.least)
    if args.format == "json":
        faults = [{"kind": fault.kind, "told": fault.told} for fault in found.faults]
        print(json.dumps({"task": found.task, "images": found.images, "faults": faults}, indent=1))
        return bool(faults)
    for fault in found.faults:
        print(printable(f"{fault.kind:11} {fault.told}"))
    images = ", ".join(f"{part} {count}" for part, count in found.images.items())
    kinds = Counter(fault.kind for fault in found.faults)
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "nothing is wrong"
    print(f"{found.task}, {images}: {told}")
    return bool(found.faults)


COMMANDS = (Command("check", "list all that is wrong with a folder of images", _add, _check),)
