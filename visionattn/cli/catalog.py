"""`visionattn list` and `visionattn info`."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..create import create_model
from ..errors import VisionattnError
from ..macs import count_macs, stages
from ..progress import tell
from ..recipes import TASKS, recipes_of
from ..registry import ModelInfo, list_models, model_info
from .parser import Command, Parser

COLUMNS: dict[str, Callable[[ModelInfo], Any]] = {
    "name": lambda info: info.name,
    "family": lambda info: info.family,
    "params": lambda info: round(info.params / 1e6, 3),
    "gmacs": lambda info: info.gmacs,
    "size": lambda info: info.input_size[-1],
    "top1": lambda info: info.top1,
    "weights": lambda info: ", ".join(tag for tag, each in info.weights.items() if each.urls or each.hf_hub_id),
    "licence": lambda info: info.license,
    "tasks": lambda info: ", ".join(task for task in TASKS if recipes_of(info.name, task)),
    "paper": lambda info: ", ".join(arxiv for _, arxiv in info.papers),
}
"""What can be told of a model in a word: params in millions, multiply-adds in 1e9, top-1 in percent."""
SHOWN = ("name", "family", "params", "gmacs", "size", "top1", "licence")


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


def columns(text: str) -> list[str]:
    """Names of columns, separated by commas.

    Raises:
        ArgumentTypeError: if there is no such column.
    """
    names = text.split(",")
    if unknown := [name for name in names if name not in COLUMNS]:
        raise argparse.ArgumentTypeError(f"there is no column {unknown[0]}; there are {', '.join(COLUMNS)}")
    return names


def _add_list(parser: Parser) -> None:
    parser.add_argument("filter", nargs="?", default="", help="shell pattern, 'dinat_*'")
    parser.add_argument("--pretrained", action="store_true", help="only published weights, one row for each of them")
    parser.add_argument("--family", help="only models of this family, 'dinat' for one")
    parser.add_argument("--licence", help="only models whose licence has this text in it, 'mit' for one")
    parser.add_argument("--task", choices=TASKS, help="only models that recipes for this task are there for")
    for name, what in (("params", "million parameters"), ("gmacs", "1e9 multiply-adds"), ("top1", "percent top-1")):
        parser.add_argument(f"--min_{name}", type=float, help=f"only models of at least so many {what}")
        parser.add_argument(f"--max_{name}", type=float, help=f"only models of at most so many {what}")
    parser.add_argument(
        "--columns", type=columns, default=list(SHOWN), metavar="NAME,NAME", help=f"of {', '.join(COLUMNS)}"
    )
    parser.add_argument("--sort", choices=tuple(COLUMNS), help="column to sort by")
    parser.add_argument("--descending", action="store_true", help="sort the highest first")
    parser.add_argument(
        "--format",
        choices=("names", "table", "json", "markdown"),
        help="(default: table on a terminal, names elsewhere)",
    )
    parser.add_argument("--table", action="store_true", help="print the Markdown table of docs/models.md")


def _list(args: Any) -> None:
    for key in ("params", "gmacs", "top1"):
        low, high = getattr(args, f"min_{key}"), getattr(args, f"max_{key}")
        if low is not None and high is not None and low > high:
            raise VisionattnError(f"--min_{key} {low:g} is above --max_{key} {high:g}: nothing is between them")
    if args.table and args.format:
        raise VisionattnError("--table is a format of its own: leave out --format, or --table")
    if args.table:
        print(models_table(args.filter, args.pretrained))
        return
    families = sorted({model_info(name).family for name in list_models()} - {""})
    if args.family and args.family.lower() not in families:
        raise VisionattnError(f"there is no family {args.family}; there are {', '.join(families)}")
    rows = [(name, model_info(name)) for name in list_models(args.filter, args.pretrained) if _is_wanted(name, args)]
    if args.sort:
        key = COLUMNS[args.sort]
        rows.sort(key=lambda row: (key(row[1]) is not None, key(row[1]) or 0), reverse=args.descending)
    if not rows:
        tell("no model is like that")
    form = args.format or ("table" if sys.stdout.isatty() else "names")
    if form == "names":
        for name, _ in rows:
            print(name)
        return
    cells = [{c: name if c == "name" else COLUMNS[c](info) for c in args.columns} for name, info in rows]
    if form == "json":
        print(json.dumps(cells, indent=1))
    else:
        print_table(args.columns, [list(row.values()) for row in cells], markdown=form == "markdown")


def _is_wanted(name: str, args: Any) -> bool:
    info = model_info(name)
    if args.family and args.family.lower() != info.family.lower():
        return False
    if args.licence and args.licence.lower() not in info.license.lower():
        return False
    if args.task and not recipes_of(info.name, args.task):
        return False
    for key in ("gmacs", "top1", "params"):
        low, high = getattr(args, f"min_{key}"), getattr(args, f"max_{key}")
        if low is None and high is None:  # parameters are counted where they matter alone
            continue
        if (value := COLUMNS[key](info)) is None:
            return False
        if (low is not None and value < low) or (high is not None and value > high):
            return False
    return True


def print_table(heads: Sequence[str], rows: Sequence[Sequence[Any]], markdown: bool = False) -> None:
    """Print rows under heads: numbers to the right, what is None as a dash."""
    texts = [["-" if x is None else f"{x:g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    if markdown:
        lines = [heads, ["---"] * len(heads), *texts]
        print("\n".join(f"| {' | '.join(line)} |" for line in lines))
        return
    widths = [max(map(len, column)) for column in zip(heads, *texts, strict=True)]
    right = [all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(heads))]
    for line in (heads, *texts):
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)]
        print("  ".join(cells).rstrip())


def _add_info(parser: Parser) -> None:
    parser.add_argument("name", help="name of the model, with or without the tag of its weights")
    parser.add_kwargs()
    parser.add_argument("--format", choices=("text", "json"), default="text", help="what is printed")


def _info(args: Any) -> None:
    from ..data.preprocessing import model_preprocessing

    info = model_info(args.name)
    _, _, tag = args.name.partition(".")
    with torch.device("meta"):
        model = create_model(args.name, **dict(args.kwargs)).eval()
    size = model_preprocessing(model)["input_size"]
    gmacs = count_macs(model, size)[""] / 1e9 if args.kwargs else info.gmacs  # those of the family's table
    facts = {
        "name": info.name,
        "family": info.family,
        "parameters": sum(p.numel() for p in model.parameters()),
        "gmacs": gmacs,
        "input": list(size),
        "top1": info.top1,
        "recipe": info.recipe | {name: value for name, value in args.kwargs if name in info.recipe},
        "recipes": [recipe for task in TASKS for recipe in recipes_of(info.name, task)],
        "code": info.origin,
        "licence": info.license,
        "papers": [{"title": title, "arxiv": arxiv} for title, arxiv in info.papers],
        "weights": {tag: _weights(weights) for tag, weights in info.weights.items()},
        "stages": stages(model, size),
        "bibtex": [bibtex(*paper) for paper in info.papers],
    }
    if args.format == "json":
        print(json.dumps(facts, indent=1))
        return
    rows = [
        ("family", info.family),
        ("parameters", f"{facts['parameters'] / 1e6:.3f} M"),
        ("multiply-adds", f"{gmacs:.4g} G" if gmacs is not None else "not stated"),
        ("input", " x ".join(map(str, size))),
        ("top-1", f"{info.top1} %" if info.top1 is not None else "none published"),
        ("facts", ", ".join(f"{k} {v}" for k, v in facts["recipe"].items()) or "none"),
        ("recipes", ", ".join(facts["recipes"]) or "none"),
        ("code", info.origin),
        ("licence", f"{info.license} (code and weights)" if info.license else "not stated"),
    ]
    rows += [("paper", f"{title}, arXiv {arxiv}") for title, arxiv in info.papers]
    for tag, weights in facts["weights"].items():
        top1 = f"top-1 {weights['top1']} %" if weights["top1"] else ""
        told = [top1, f"{weights['size']} x {weights['size']}", weights["note"]]
        rows += [(f"weights {tag}", "; ".join(filter(None, told))), *(("", place) for place in weights["places"])]
    width = max(len(label) for label, _ in rows)
    print(info.name)
    print("\n".join(f"  {label:{width}}  {value}" for label, value in rows))
    print()
    table = [
        [s["stage"], s["blocks"], s["output"], round(s["params"] / 1e6, 3), round(s["gmacs"], 4)]
        for s in facts["stages"]
    ]
    print_table(["stage", "blocks", "output", "params M", "GMACs"], table)
    print("\n" + "\n".join(facts["bibtex"]))


def _weights(weights: Any) -> dict[str, Any]:
    places = [*weights.urls, *([f"hf-hub:{weights.hf_hub_id}"] if weights.hf_hub_id else []), weights.page]
    places = [place for place in places if place]
    return {"top1": weights.top1, "size": weights.img_size, "note": weights.note, "places": places}


def bibtex(title: str, arxiv: str) -> str:
    """Entry of a paper; its authors are those of arXiv's page."""
    lines = [f"title = {{{title}}}", f"year = {{20{arxiv[:2]}}}", f"eprint = {{{arxiv}}}", "archivePrefix = {arXiv}"]
    lines.append(f"url = {{https://arxiv.org/abs/{arxiv}}}")
    return f"@misc{{arxiv_{arxiv.replace('.', '_')},\n  " + ",\n  ".join(lines) + "\n}"


COMMANDS = (
    Command("list", "print the models", _add_list, _list),
    Command("info", "print what is known of a model", _add_info, _info),
)
