"""`visionattn predict`."""

from typing import Any

from .parser import Command, Parser


def _add(parser: Parser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image file")
    parser.add_argument("--checkpoint", required=True, help="what train.py saved, of any task")
    parser.add_argument(
        "--output", help="folder for a PNG of each image, in detection and segmentation (default: predictions)"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        help="least score of objects, and of classes where an image has several (default: 0.5)",
    )
    parser.add_argument("--overwrite", action="store_true", help="write over pictures that are there")


def _predict(args: Any) -> None:
    from ..training.predict import predict

    predict(args.checkpoint, args.images, args.output, args.threshold, args.overwrite)


COMMANDS = (Command("predict", "draw what a checkpoint of train.py makes of images", _add, _predict),)
