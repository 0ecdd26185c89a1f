"""`visionattn benchmark` and `visionattn compare`."""

import json
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ..create import create_model
from ..errors import VisionattnError
from ..export.about import task_of
from ..macs import count_macs
from ..measure import DTYPES, LAYOUTS, Seconds, add_machine, in_turns, machine, peak_memory, positive, start
from ..progress import tell
from ..quantize import quantize
from ..registry import model_info
from ..weights.description import is_place
from .catalog import print_table
from .parser import Command, Parser


def _add_common(parser: Parser) -> None:
    parser.add_argument("--batch", type=positive, default=1, help="images at once")
    parser.add_argument("--size", type=positive, help="height and width in pixels; that of the model's weights if none")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of weights and images")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), default="channels_last", help="of memory")
    parser.add_argument("--compile", action="store_true", help="torch.compile the models")
    parser.add_argument("--fuse", action="store_true", help="fold batch norms and layer scales first")
    parser.add_argument("--int8", action="store_true", help="int8 weights, on a CPU")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="what is printed")
    add_machine(parser)


def _add_benchmark(parser: Parser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="registered names or checkpoints")
    parser.add_argument("--training", action="store_true", help="time training steps, and tell their memory")
    _add_common(parser)


def _add_compare(parser: Parser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="registered names or checkpoints, two or more")
    _add_common(parser)


def _made(name: str, args: Any, device: torch.device, training: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """A model as the options want it run, and facts of it as it was made: its name, the size of its images, million
    parameters and multiply-adds in 1e9."""
    kwargs = {"img_size": args.size} if args.size and not is_place(name) else {}
    model = create_model(name, **kwargs).train(training)
    task = task_of(model)
    if training and task != "classification":
        raise VisionattnError(f"--training is for classifiers: {name} is of {task}")
    if task == "detection" and args.dtype != "float32":
        raise VisionattnError(f"{name} is of detection, whose boxes are of float32: leave out --dtype")
    if args.fuse and not hasattr(model, "fuse"):
        raise VisionattnError(f"--fuse is for classifiers and extractors: {name} is of {task}")
    channels, size = _input(model, args.size)
    macs = None
    if task != "detection":  # what these do goes by what they find
        macs = count_macs(deepcopy(model).eval().to("meta"), (channels, size, size))[""] / 1e9
    params = sum(p.numel() for p in model.parameters())
    facts = {"model": name, "size": size, "params": params / 1e6, "gmacs": macs}
    if args.fuse:
        model.fuse()
    if args.int8:
        model = quantize(model)
    model = model.to(device, DTYPES[args.dtype], memory_format=LAYOUTS[args.layout])
    if args.compile:
        model.compile()
    return model, facts


def _step(model: nn.Module, x: torch.Tensor, targets: torch.Tensor) -> None:
    if model.training:
        cross_entropy(model(x).float(), targets).backward()
        model.zero_grad()
        return
    with torch.inference_mode():
        model(x)


def _call(model: nn.Module, args: Any, device: torch.device) -> Callable[[], None]:
    channels, size = _input(model, args.size)
    x = torch.randn(args.batch, channels, size, size, device=device, dtype=DTYPES[args.dtype])
    targets = torch.zeros(args.batch, dtype=torch.long, device=device)
    return partial(_step, model, x.contiguous(memory_format=LAYOUTS[args.layout]), targets)


def _start(args: Any, training: bool = False) -> tuple[torch.device, Seconds]:
    """The device and the clock.

    Raises:
        VisionattnError: if the options do not go together.
    """
    if args.int8 and (training or args.compile or args.dtype != "float32" or args.device != "cpu"):
        raise VisionattnError("--int8 is for inference in float32 on a CPU, without --compile")
    if args.fuse and training:
        raise VisionattnError("--fuse is for inference: leave out --training")
    for name in args.models:
        if not is_place(name):
            model_info(name)  # refuses what there is not before anything is told
    device, seconds = start(args)
    tell(", ".join(f"{key} {value}" for key, value in machine(device).items()))
    return device, seconds


def _benchmark(args: Any) -> None:
    device, seconds = _start(args, args.training)
    rows = []
    for name in args.models:
        model, row = _made(name, args, device, args.training)
        call = _call(model, args, device)
        (times,) = in_turns([call], args.rounds, seconds)
        row |= {"ms": 1e3 * median(times), "images/s": args.batch / median(times)}
        row["MiB"] = peak_memory(call, device) / 2**20
        rows.append(row)
    if args.format == "json":
        options = {key: getattr(args, key) for key in ("batch", "dtype", "layout", "compile", "fuse", "int8")}
        print(json.dumps({"about": machine(device) | options, "models": rows}, indent=1))
        return
    heads = list(rows[0])
    print_table(heads, [[_rounded(row[head]) for head in heads] for row in rows])


def _input(model: nn.Module, size: int | None) -> tuple[int, int]:
    """Channels of its images, and their side."""
    from ..data.preprocessing import model_preprocessing

    channels, _, own = model_preprocessing(model)["input_size"]
    return channels, size or own


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _compare(args: Any) -> None:
    if len(args.models) < 2:
        raise VisionattnError(f"give two models or more to compare, got {args.models[0]}")
    device, seconds = _start(args)
    rows, calls = [], []
    for name in args.models:
        model, row = _made(name, args, device)
        calls.append(_call(model, args, device))
        rows.append(row | {"licence": model.pretrained_cfg.get("license")})
        if not is_place(name):
            rows[-1]["top1"] = model_info(name).top1
    times = [median(each) for each in in_turns(calls, args.rounds, seconds)]
    for row, call, time in zip(rows, calls, times, strict=True):
        row |= {"ms": 1e3 * time, "images/s": args.batch / time, "MiB": peak_memory(call, device) / 2**20}
        row["speed"] = times[0] / time
    if args.format == "json":
        print(json.dumps(rows, indent=1))
        return
    heads = list(dict.fromkeys(key for row in rows for key in row))
    print_table(heads, [[_rounded(row.get(head)) for head in heads] for row in rows])
    print(f"\nspeed: times that of {args.models[0]}, both in turns, {args.batch} images in {args.dtype}")


COMMANDS = (
    Command("benchmark", "time models, and tell their memory", _add_benchmark, _benchmark),
    Command("compare", "facts and speed of models side by side", _add_compare, _compare),
)
