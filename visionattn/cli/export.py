"""`visionattn export`."""

from pathlib import Path
from typing import Any

from ..errors import VisionattnError
from ..measure import positive
from ..progress import tell
from ..registry import model_info
from .catalog import print_table
from .parser import Command, Parser

FORMATS = {"onnx": ".onnx", "torch": ".pt2", "aoti": ".pt2", "openvino": ".xml"}


def _add(parser: Parser) -> None:
    parser.add_argument("model", help="registered name, or checkpoint of train.py or convert, of any task")
    parser.add_argument("out", help="file to write: *.onnx, *.pt2 (torch, aoti) or *.xml (openvino)")
    parser.add_argument("--format", choices=tuple(FORMATS), default="onnx", help="what the file is for")
    parser.add_argument(
        "--size", type=positive, nargs="+", help="fixed height and width, or one number for both; open if not given"
    )
    parser.add_argument("--int8", choices=("weights", "static"), help="round weights, or all values (needs --data)")
    parser.add_argument("--data", help="folder of images, to measure on what it costs, and to find ranges for int8")
    parser.add_argument("--pretrained", action="store_true", help="the published weights of a registered name")
    parser.add_argument("--num_classes", type=positive, help="classes of a registered name")
    parser.add_kwargs()
    parser.add_argument("--features", action="store_true", help="export the maps of all stages, not the classifier")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def _export(args: Any) -> None:
    from ..create import create_model
    from ..export.about import task_of
    from ..export.files import check_place, export
    from ..export.measured import calibration, compare, open_folder
    from ..export.running import load
    from ..weights.description import is_place

    if args.size and len(args.size) > 2:
        raise VisionattnError(f"expected --size as one number or height and width, got {len(args.size)} numbers")
    if args.int8 == "static" and not args.data:
        raise VisionattnError("--int8 static finds the ranges of values with images: give a folder of some with --data")
    place = is_place(args.model)
    for option in ("pretrained", "num_classes", "kwargs"):
        if place and getattr(args, option):
            raise VisionattnError(f"option --{option} is for registered names: {args.model} says itself what it holds")
    check_place(Path(args.out), FORMATS[args.format], args.overwrite)
    kwargs = dict(args.kwargs) | ({"num_classes": args.num_classes} if args.num_classes else {})
    if args.features:
        kwargs["features_only"] = True
    if not place:
        model_info(args.model)  # refuses what there is not before anything is told
        kwargs["pretrained"] = args.pretrained
        if not args.pretrained:
            tell(f"{args.model} has random weights: --pretrained has the published ones")
    size = (args.size[0], args.size[-1]) if args.size else None
    model = create_model(args.model, **kwargs).eval()
    if task_of(model) == "detection" and not size:
        raise VisionattnError("a detector's file has one size: give --size, the height and width of your images")
    tell(f"writing {args.format}, and comparing it with PyTorch: this may take minutes")
    folder = open_folder(args.data, model) if args.data else None
    images = calibration(folder, model, size) if folder and args.int8 == "static" else ()
    made = export(model, args.out, args.format, size, args.int8, images, overwrite=args.overwrite)
    shown = size or (made.shapes[0][2:] if task_of(model) == "detection" else ("height", "width"))
    sides = " x ".join(map(str, shown))
    version = f" opset {made.about['opset']}" if "opset" in made.about else ""
    batch = "one image" if task_of(model) == "detection" else "any batch"
    megabytes = made.path.stat().st_size / 2**20
    print(f"{args.out}: {made.about['model']}, {args.format}{version}, {batch} of {sides}, {megabytes:.1f} MiB")
    sizes, batches = len({shape[2:] for shape in made.shapes}), len({shape[0] for shape in made.shapes})
    print(f"differs from PyTorch by {made.disagreement:.1e} at most, at {sizes} sizes and {batches} batch sizes")
    if made.usual:
        told = "by {:.1e} on most images, float32 from float64 by {:.1e} at most: ranks of values turn on last digits"
        print(told.format(*made.usual))
    if folder:
        rows = compare(load(made.path)[0], model, folder, size or made.shapes[0][2:])
        heads = [head for head in ("top1", "agree", "ms") if head in rows[0]]
        table = [
            [name, *(round(row[head], 2) for head in heads)]
            for name, row in zip(("PyTorch", args.out), rows, strict=True)
        ]
        print_table(["", *heads], table)


COMMANDS = (Command("export", "write ONNX, torch.export, AOTInductor or OpenVINO files of a model", _add, _export),)
