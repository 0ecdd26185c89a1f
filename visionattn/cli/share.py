"""`visionattn convert` and `visionattn push`."""

from typing import Any

from ..errors import VisionattnError
from .parser import Command, Parser


def _add_convert(parser: Parser) -> None:
    parser.add_argument("file", help="file in any published layout of the model's family, or with --to one of ours")
    parser.add_argument("out", help="safetensors file to write; with --to .pth too, or for hf a folder")
    parser.add_argument(
        "--model", default="", help="name of the model, with the tag of the weights if need be, where the file has none"
    )
    parser.add_argument(
        "--to", choices=("timm", "official", "hf"), help="write what timm, the paper's code or transformers loads"
    )
    parser.add_kwargs()
    parser.add_argument("--source", default="", help="where the file is from, for the header")
    parser.add_argument("--replace", action="store_true", help="write over a file that is there")
    parser.add_argument("--checkpoint_prefix", default="", help="where in the file the weights are, student for one")


def _convert(args: Any) -> None:
    if args.to:
        from ..outward import write_layout

        if args.checkpoint_prefix:
            args.kwargs.append(("checkpoint_prefix", args.checkpoint_prefix))
        if args.kwargs and not args.model or args.source:
            raise VisionattnError(
                "with --to, options --kwargs and --checkpoint_prefix go with --model, --source with none"
            )
        print("\n".join(write_layout(args.file, args.out, args.to, args.model, args.replace, **dict(args.kwargs))))
        return
    from ..publish import convert_file

    made = convert_file(
        args.file, args.out, args.model, dict(args.kwargs), args.source, args.replace, args.checkpoint_prefix
    )
    facts = f"{made['num_classes']} classes, from {made['source']}, licence {made['license']}"
    print(f"{args.out}: {made['model']}, {facts}")
    for what, keys in made["adapted"].items():
        print(f"{what}: {', '.join(keys)}")


def _add_push(parser: Parser) -> None:
    parser.add_argument("checkpoint", help="safetensors file")
    parser.add_argument("place", help="user/repository on the Hugging Face hub, or local-dir:FOLDER")
    parser.add_argument("--private", action="store_true", help="keep a new repository private")
    parser.add_argument("--message", help="message of the commit (default: Add model)")


def _push(args: Any) -> None:
    from ..publish import push

    if args.place.startswith("local-dir:") and (args.private or args.message is not None):
        option = "--private" if args.private else "--message"
        raise VisionattnError(f"option {option} is of no use to a folder: leave it out")
    print(f"visionattn.create_model({push(args.checkpoint, args.place, args.private, args.message or 'Add model')!r})")


COMMANDS = (
    Command("convert", "turn a published file into a safetensors file that names its model", _add_convert, _convert),
    Command("push", "share a checkpoint of train.py or convert, to be created by its place", _add_push, _push),
)
