"""`visionattn explain`."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import VisionattnError, printable, require, user_input
from ..progress import tell, track
from .parser import Command, Parser

if TYPE_CHECKING:
    from ..explain import Map, Relevance
    from ..explain.pictures import Panel
    from ..training.inputs import Input

METHODS = ("gradcam", "rollout", "attention")


def pair(text: str) -> tuple[int, int]:
    """`ROW,COL`.

    Raises:
        ArgumentTypeError: if it is none.
    """
    try:
        row, col = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ROW,COL in pixels, got {text}") from None
    return row, col


def _add(parser: Parser) -> None:
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="as for predict: file, folder, pattern, http address, or - for stdin"
    )
    parser.add_argument("--model", help="name of a model, or hf-hub:user/repository")
    parser.add_argument("--pretrained", action="store_true", help="load the published weights of --model")
    parser.add_kwargs()
    parser.add_argument("--checkpoint", help="what train.py saved, in place of --model")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="gradcam",
        help="gradcam: evidence for a class; rollout: what all blocks together look at; attention: what a layer weighs "
        "by (attention, gates, kernels, masks)",
    )
    parser.add_argument(
        "--layer",
        help="name of a layer, or shell pattern of several, 'stages.2.*' for one; of gradcam and attention (default: "
        "the last; of gradcam the last whose map has four positions a side)",
    )
    parser.add_argument("--head", type=int, help="of attention, or channel of gates (default: their mean)")
    parser.add_argument(
        "--query",
        type=pair,
        metavar="ROW,COL",
        help="pixel, of the picture that comes out, whose attention is drawn, with the window that it sees",
    )
    parser.add_argument(
        "--class",
        dest="target",
        help="number or name of a class (default: what the model says; in segmentation, what has most pixels besides "
        "the background)",
    )
    parser.add_argument("--output", default="explained", help="folder for the pictures (default: explained)")
    parser.add_argument("--grid", action="store_true", help="also a sheet of all layers")
    parser.add_argument("--gif", action="store_true", help="also an animation over the layers, from first to last")
    parser.add_argument("--overwrite", action="store_true", help="write over pictures that are there")


@dataclass(frozen=True)
class Loaded:
    """A model, and how to use it.

    Args:
        model: the model.
        prepare: an image as the model takes it, (C, H, W).
        shown: the same as a picture.
        mode: of the images.
        classes: names, where they are known.
        first: number of the first class.
    """

    model: nn.Module
    prepare: Callable[[Image.Image], Tensor]
    shown: Callable[[Tensor], Image.Image]
    mode: str
    classes: Sequence[str] | None
    first: int = 0

    def number(self, target: str | None) -> int | None:
        """Of a class, that was given by number or name."""
        if target is None:
            return None
        names = list(self.classes or ())
        if target in names:
            return names.index(target) + self.first
        if len(found := [i for i, name in enumerate(names) if target.lower() in name.lower().split(", ")]) == 1:
            return found[0] + self.first
        if not target.isdecimal():
            known = (
                f"there are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "give its number"
            )
            raise VisionattnError(f"no class {target}: {known}")
        return int(target)

    def name(self, number: int) -> str:
        """Of a class, for people."""
        names, index = list(self.classes or ()), number - self.first
        return f"class {number}" + (f" ({names[index].split(',')[0]})" if 0 <= index < len(names) else "")


def _load(args: Any) -> Loaded:
    from ..create import create_model
    from ..data.drawing import to_image
    from ..data.preprocessing import class_names, create_transform, model_preprocessing
    from ..tasks.task import image_mode

    if (args.model is None) == (args.checkpoint is None):
        raise VisionattnError("give --model or --checkpoint, and one of them alone")
    if args.checkpoint is not None:
        if args.pretrained or args.kwargs:
            option, own = ("--pretrained", "weights") if args.pretrained else ("--kwargs", "arguments")
            raise VisionattnError(f"option {option} is for --model: a checkpoint has its {own}")
        from ..weights.description import read_description

        entries = read_description(args.checkpoint)
        if entries.get("task", "classification") != "classification":
            return _load_dense(args.checkpoint)
    model = create_model(args.checkpoint or args.model, args.pretrained or None, **dict(args.kwargs)).eval()
    if not model.num_classes and args.method != "attention":
        raise VisionattnError(f"{args.checkpoint or args.model} has no classes: --method attention needs none")
    own, classes = model_preprocessing(model), class_names(model)
    shown = partial(to_image, mean=own["mean"], std=own["std"])
    return Loaded(model, create_transform(model), shown, image_mode(model), classes)


def _load_dense(checkpoint: str) -> Loaded:
    from ..create import create_model
    from ..data.drawing import to_image
    from ..tasks import TASKS, make_task
    from ..tasks.task import image_mode
    from ..training.config import options_of, parse_validate
    from ..weights.description import read_description

    config = parse_validate(["--checkpoint", checkpoint], options_of)
    task, model = make_task(replace(config, checkpoint="")), create_model(checkpoint).eval()
    data = task.resolve(model).data
    objects = TASKS[config.task].sample == "objects"
    return Loaded(
        model,
        task.transform(False).image,
        partial(to_image, mean=data.mean, std=data.std),
        image_mode(model),
        read_description(checkpoint).get("classes"),
        int(objects),
    )


def _check(args: Any) -> None:
    of = {
        "--layer": (args.layer, ("gradcam", "attention")),
        "--head": (args.head, ("attention",)),
        "--query": (args.query, ("attention",)),
        "--class": (args.target, ("gradcam", "rollout")),
    }
    for name, (value, methods) in of.items():
        if value is not None and args.method not in methods:
            raise VisionattnError(f"option {name} is of no use to --method {args.method}: leave it out")
    require("matplotlib")


def _files(args: Any, inputs: Sequence["Input"]) -> list[list[Path]]:
    """Of each image: the picture, and the sheet and the animation if they are wanted."""
    from ..training.inputs import refuse_namesakes

    refuse_namesakes(inputs)
    endings = [".png", *(["-grid.png"] if args.grid else []), *([".gif"] if args.gif else [])]
    folder = Path(args.output)
    files = [[folder / f"{each.picture}-{args.method}{end}" for end in endings] for each in inputs]
    there = next((file for each in files for file in each if file.exists()), None)
    if there is not None and not args.overwrite:
        raise VisionattnError(f"{there} exists: give --output another folder, or --overwrite")
    if not next(each for each in (folder, *folder.parents) if each.exists()).is_dir():
        raise VisionattnError(f"expected --output as a folder, got {folder}, which is a file or inside of one")
    return files


def _explain(args: Any) -> int:
    from ..training.inputs import find_inputs
    from ..weights.description import is_place

    _check(args)
    inputs, loaded = find_inputs(args.images), _load(args)
    loaded.number(args.target)  # before anything is written
    failed = 0
    for image, own in track(list(zip(inputs, _files(args, inputs), strict=True)), "explaining"):
        try:
            _explain_one(args, loaded, image, own)
        except VisionattnError as error:
            if len(inputs) == 1:
                raise
            failed += 1
            told = printable(error)
            print(f"error: {told if image.name in told else f'{image.name}: {told}'}", file=sys.stderr, flush=True)
    if not (args.checkpoint or args.pretrained or is_place(args.model)):
        tell(f"{args.model} has random weights: --pretrained has the published ones")
    return 1 if failed else 0


def _explain_one(args: Any, loaded: Loaded, image: "Input", files: list[Path]) -> None:
    from ..explain.pictures import animation, sheet
    from ..weights.files import write_file

    tensor = loaded.prepare(image.read(loaded.mode))
    told, title, chosen, others = _found(args, loaded, tensor)
    pictures = {files[0]: sheet(chosen, title)}
    if args.grid:
        pictures[files[1]] = sheet(list(others()), title)
    with user_input(f"cannot write {files[0]}", OSError):
        files[0].parent.mkdir(parents=True, exist_ok=True)
    for file, picture in pictures.items():
        write_file(file, partial(picture.save, format="png"), args.overwrite)
    if args.gif:
        content = animation([sheet([panel], title) for panel in others()])
        write_file(files[-1], lambda file, content=content: file.write(content), args.overwrite)
    print(printable(f"{image.name}: {told}; see {', '.join(map(str, files))}"), flush=True)


def _found(
    args: Any, loaded: Loaded, tensor: Tensor
) -> tuple[str, str, list["Panel"], Callable[[], Iterator["Panel"]]]:
    """What is said of an image, the title, what is drawn, and what is drawn of all layers."""
    from ..explain import attention_maps, cam_layers, grad_cam, rollout
    from ..explain.pictures import Panel, panel_of

    model, shown, batch = loaded.model, loaded.shown(tensor).convert("RGB"), tensor[None]
    if args.method == "attention":
        query = None
        if args.query is not None:
            if not (0 <= args.query[0] < shown.height and 0 <= args.query[1] < shown.width):
                raise VisionattnError(
                    f"expected a --query in the model's {shown.height} x {shown.width} pixels, got "
                    f"{args.query[0]},{args.query[1]}"
                )
            query = args.query[0] / shown.height, args.query[1] / shown.width
        maps = attention_maps(model, batch, args.layer or "*")
        spatial = [each for each in maps if each.kind == "attention" and "query_channel" not in each.axes] or maps
        last = spatial[-1].layer
        chosen = [each for each in maps if args.layer or each.layer == last]
        draw = partial(panel_of, image=shown, head=args.head, query=query)
        told = ", ".join(dict.fromkeys(each.layer for each in chosen))
        every = attention_maps(model, batch) if args.layer and (args.grid or args.gif) else maps
        return told, "", [draw(each) for each in chosen], lambda: map(draw, _one_each(every, chosen[0]))
    target = loaded.number(args.target)
    if target is None and "background" in (loaded.classes or ()):
        target = _most_but(list(loaded.classes).index("background"), model, batch)
    if args.method == "rollout":
        found = rollout(model, batch, target)
        chosen = found[:1]
    else:
        known = cam_layers(model)
        names = [name for name in known if fnmatchcase(name, args.layer)] if args.layer else []
        if args.layer and not names:
            raise VisionattnError(f"no layer {args.layer} for gradcam: there are {', '.join(known)}")
        chosen = grad_cam(model, batch, target, names)
        found = grad_cam(model, batch, target, known) if args.grid or args.gif else chosen
    told = loaded.name(int(found[0].classes[0]))

    def panel(each: "Relevance") -> Panel:
        return Panel(each.layer + ("" if each.values[0].any() else ", no evidence"), each.values[0], shown)

    return told, f"{args.method}, {told}", [panel(each) for each in chosen], lambda: map(panel, found)


@torch.inference_mode()
def _most_but(background: int, model: nn.Module, batch: Tensor) -> int | None:
    """Of a segmenter, the class with most pixels besides the background; None if there is none."""
    logits = model(batch)
    if not isinstance(logits, Tensor) or logits.ndim != 4:
        return None
    counts = logits.argmax(1).flatten().bincount(minlength=logits.shape[1])
    counts[background] = 0
    return int(counts.argmax()) if counts.any() else None


def _one_each(maps: Sequence["Map"], like: "Map") -> list["Map"]:
    """One map of each layer: of the kind that was chosen where there is one, else what it has first."""
    layers: dict[str, list[Map]] = {}
    for each in maps:
        layers.setdefault(each.layer, []).append(each)
    return [
        next((each for each in found if (each.kind, each.part) == (like.kind, like.part)), found[0])
        for found in layers.values()
    ]


COMMANDS = (Command("explain", "draw what a model looks at in images", _add, _explain),)
