"""`visionattn demo`."""

from typing import Any

from ..errors import VisionattnError, optional, require
from .parser import Command, Parser


def _add(parser: Parser) -> None:
    parser.add_argument("checkpoint", nargs="?", default="", help="what train.py or convert saved, of any task")
    parser.add_argument("--model", default="", help="classifier by its name, a file, hf-hub:... or local-dir:...")
    parser.add_argument("--pretrained", action="store_true", help="with the published weights of --model")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; 0.0.0.0 for all of the network")
    parser.add_argument(
        "--port", type=int, default=7860, help="number to listen at; 0 for the first free one from 7860"
    )
    parser.add_argument("--share", action="store_true", help="a public address, through gradio's servers")


def _demo(args: Any) -> None:
    if not 0 <= args.port < 65536:
        raise VisionattnError(f"option port: expected a number from 0 to 65535, got {args.port}")
    require("gradio", "accelerate", "matplotlib")
    with optional():
        from ..demo import make_page, run_demo
        from ..training.opened import open_model

    opened = open_model(args.checkpoint, args.model, args.pretrained)
    page = make_page(opened, f"{opened.task.made[0]}, {opened.task.config.task}")
    run_demo(page, args.host, args.port, args.share)


COMMANDS = (Command("demo", "a page for the browser: drop an image, see what a model makes of it", _add, _demo),)
