"""The `visionattn` command."""

import argparse
import json
import sys
from typing import Any, NoReturn

from .errors import VisionattnError, run
from .registry import list_models, model_info


def _list(args: argparse.Namespace) -> None:
    choice = args.filter, args.pretrained
    print(models_table(*choice) if args.table else "\n".join(list_models(*choice)))


def models_table(filter: str = "", pretrained: bool = False) -> str:
    """Markdown table of the models, one row for each set of published weights.

    Args:
        filter: shell pattern of names; all models if empty.
        pretrained: leave out models without published weights.
    """
    lines = [
        "| model | weights | params M | GMACs | input | top-1 % | source | paper |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in list_models(filter):
        info = model_info(name)
        papers = ", ".join(f"[{arxiv}](https://arxiv.org/abs/{arxiv})" for _, arxiv in info.papers)
        for tag, weights in info.weights.items() or ([] if pretrained else [("", None)]):
            row = [f"`{name}`", tag, f"{info.params / 1e6:.3f}", f"{info.gmacs:g}", info.input_size[-1], "", "", papers]
            if weights is not None:
                places = [*weights.urls, weights.page]
                links = [f"[file]({place})" for place in places if place]
                if weights.hf_hub_id:
                    links.append(f"[hub](https://huggingface.co/{weights.hf_hub_id})")
                row[3:7] = weights.gmacs or info.gmacs, weights.img_size, weights.top1 or "", ", ".join(links)
                row[6] = row[6] or weights.note
            lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def _info(args: argparse.Namespace) -> None:
    info = model_info(args.name)
    rows = [
        ("family", info.family),
        ("parameters", f"{info.params / 1e6:.3f} M"),
        ("multiply-adds", f"{info.gmacs:g} G" if info.gmacs is not None else "not stated"),
        ("input", " x ".join(map(str, info.input_size))),
        ("top-1", f"{info.top1} %" if info.top1 is not None else "none published"),
        ("recipe", ", ".join(f"{k} {v}" for k, v in info.recipe.items()) or "none"),
        ("code", info.origin),
        ("licence", info.license),
    ]
    rows += [("paper", f"{title}, arXiv {arxiv}") for title, arxiv in info.papers]
    for tag, weights in info.weights.items():
        places = [*weights.urls, *([f"hf-hub:{weights.hf_hub_id}"] if weights.hf_hub_id else []), weights.page]
        facts = [
            f"top-1 {weights.top1} %" if weights.top1 else "",
            f"{weights.img_size} x {weights.img_size}",
            weights.note,
        ]
        rows += [(f"weights {tag}", "; ".join(filter(None, facts)))]
        rows += [("", place) for place in filter(None, places)]
    width = max(len(label) for label, _ in rows)
    print(info.name)
    print("\n".join(f"  {label:{width}}  {value}" for label, value in rows))


def _convert(args: argparse.Namespace) -> None:
    from .publish import convert_file

    made = convert_file(
        args.file, args.out, args.model, dict(args.kwargs), args.source, args.replace, args.checkpoint_prefix
    )
    facts = f"{made['num_classes']} classes, from {made['source']}, licence {made['license']}"
    print(f"{args.out}: {made['model']}, {facts}")
    for what, keys in made["adapted"].items():
        print(f"{what}: {', '.join(keys)}")


def _push(args: argparse.Namespace) -> None:
    from .publish import push

    if args.place.startswith("local-dir:") and (args.private or args.message is not None):
        option = "--private" if args.private else "--message"
        raise VisionattnError(f"option {option} is of no use to a folder: leave it out")
    print(f"visionattn.create_model({push(args.checkpoint, args.place, args.private, args.message or 'Add model')!r})")


def _predict(args: argparse.Namespace) -> None:
    from .training.predict import predict

    predict(args.checkpoint, args.images, args.output, args.threshold, args.overwrite)


class _Parser(argparse.ArgumentParser):
    """A parser that tells what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise VisionattnError(f"{message} (see {self.prog} --help)")


def _key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text}")
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):
        return key, value


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for a request that cannot be met."""
    parser = _Parser("visionattn", description="Vision backbones built on attention.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("list", help="print the names of the models")
    command.add_argument("filter", nargs="?", default="", help="shell pattern, 'dinat_*'")
    command.add_argument("--pretrained", action="store_true", help="only those with published weights, with their tags")
    command.add_argument("--table", action="store_true", help="print a Markdown table of what is known of them")
    command.set_defaults(run=_list)
    command = commands.add_parser("info", help="print what is known of a model")
    command.add_argument("name", help="name of the model, with or without the tag of its weights")
    command.set_defaults(run=_info)
    command = commands.add_parser("convert", help="turn a published file into a safetensors file that names its model")
    command.add_argument("file", help="file in any published layout of the model's family")
    command.add_argument("out", help="safetensors file to write")
    command.add_argument("--model", required=True, help="name of the model, with the tag of the weights if need be")
    command.add_argument("--kwargs", nargs="+", type=_key_value, default=[], metavar="KEY=VALUE", help="its arguments")
    command.add_argument("--source", default="", help="where the file is from, for the header")
    command.add_argument("--replace", action="store_true", help="write over a file that is there")
    command.add_argument("--checkpoint_prefix", default="", help="where in the file the weights are, student for one")
    command.set_defaults(run=_convert)
    command = commands.add_parser("push", help="share a checkpoint of train.py or convert, to be created by its place")
    command.add_argument("checkpoint", help="safetensors file")
    command.add_argument("place", help="user/repository on the Hugging Face hub, or local-dir:FOLDER")
    command.add_argument("--private", action="store_true", help="keep a new repository private")
    command.add_argument("--message", help="message of the commit (default: Add model)")
    command.set_defaults(run=_push)
    command = commands.add_parser("predict", help="draw what a checkpoint of train.py makes of images")
    command.add_argument("images", nargs="+", metavar="IMAGE", help="image file")
    command.add_argument("--checkpoint", required=True, help="what train.py saved, of any task")
    command.add_argument(
        "--output", help="folder for a PNG of each image, in detection and segmentation (default: predictions)"
    )
    command.add_argument(
        "--threshold",
        type=float,
        help="least score of objects, and of classes where an image has several (default: 0.5)",
    )
    command.add_argument("--overwrite", action="store_true", help="write over pictures that are there")
    command.set_defaults(run=_predict)

    def call(arguments: list[str]) -> None:
        args = parser.parse_args(arguments if argv is None else argv)
        args.run(args)

    return run(call)


if __name__ == "__main__":
    sys.exit(main())
