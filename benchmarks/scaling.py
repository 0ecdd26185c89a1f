"""Time and memory of blocks and models against resolution, with exponents fitted to them.

    python benchmarks/scaling.py                                         # the blocks whose papers tell how cost grows
    python benchmarks/scaling.py HiLoAttention LargeKernelAttention --plot scaling.png
    python benchmarks/scaling.py van_b0 illama_tiny --sizes 224 448 896  # models, by sizes of images

Of each, the forward pass and forward with backward are timed at all sizes in turns, and the most memory that the latter
allocates is taken. A power of the number of pixels is fitted to each: 1 is linear, 2 quadratic cost. Blocks are told
apart by what their papers say: those of linear cost are "above" where an exponent exceeds 1.1. The Lo-Fi half of HiLo
attention is quadratic with a quarter of the keys, its Hi-Fi half alone (alpha 0) is linear; a global filter takes
Fourier transforms, N log N, which is an exponent of about 1.1 over these sizes; a pyramid with attention in its last
stages (LITv2, PATNet) or all of it (ConViT, iLLaMA, Sparsifiner) turns quadratic when maps grow.
"""

import math
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import linear_regression, median

import torch
from common import Parser, Table, output
from torch import Tensor, nn

import visionattn
from visionattn import layers
from visionattn.errors import VisionattnError, require, run
from visionattn.measure import add_machine, in_turns, machine, peak_memory, positive, start

BAR = 1.1
LINEAR, LOGARITHM, QUADRATIC, QUARTER, MODEL = "linear", "N log N", "N^2", "N^2 / 4", "model"
SIZES = {
    **dict.fromkeys((LINEAR, LOGARITHM), (28, 56, 112, 224)),
    **dict.fromkeys((QUADRATIC, QUARTER), (14, 28, 56)),
    MODEL: (224, 448, 672),
}
DIM, HEADS = 64, 2
BLOCKS: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "AttentiveConv2d": (LINEAR, lambda n: layers.AttentiveConv2d(DIM)),
    "ChannelAttention": (LINEAR, lambda n: layers.ChannelAttention(DIM, HEADS)),
    "ConvPosEnc": (LINEAR, lambda n: layers.ConvPosEnc(DIM)),
    "FlowAttention": (LINEAR, lambda n: layers.FlowAttention(DIM, HEADS)),
    "FocalModulation": (LINEAR, lambda n: layers.FocalModulation(DIM, focal_window=3, focal_level=2)),
    "HaloAttention2d": (LINEAR, lambda n: layers.HaloAttention2d(DIM, num_heads=HEADS)),
    "HiLoAttention, Hi-Fi": (LINEAR, lambda n: layers.HiLoAttention(DIM, HEADS, alpha=0.0)),
    "LargeKernelAttention": (LINEAR, lambda n: layers.LargeKernelAttention(DIM)),
    "NeighborhoodAttention2d": (LINEAR, lambda n: layers.NeighborhoodAttention2d(DIM, HEADS)),
    "NeighborhoodAttention2d, dilation 4": (LINEAR, lambda n: layers.NeighborhoodAttention2d(DIM, HEADS, dilation=4)),
    "PartialChannelAttention": (LINEAR, lambda n: layers.PartialChannelAttention(DIM).eval()),  # batch of one
    "PartialConv2d": (LINEAR, lambda n: layers.PartialConv2d(DIM)),
    "PartialSpatialAttention": (LINEAR, lambda n: layers.PartialSpatialAttention(DIM)),
    "RecursiveGatedConv": (LINEAR, lambda n: layers.RecursiveGatedConv(DIM)),
    "VanAttention": (LINEAR, lambda n: layers.VanAttention(DIM)),
    "WindowAttention2d": (LINEAR, lambda n: layers.WindowAttention2d(DIM, HEADS)),
    "GlobalLocalFilter": (LOGARITHM, lambda n: layers.GlobalLocalFilter(DIM, n, n // 2 + 1)),
    "CausalSelfAttention": (QUADRATIC, lambda n: layers.CausalSelfAttention(DIM, HEADS)),
    "GatedPositionalSelfAttention": (QUADRATIC, lambda n: layers.GatedPositionalSelfAttention(DIM, HEADS)),
    "HiLoAttention": (QUARTER, lambda n: layers.HiLoAttention(DIM, HEADS, alpha=0.5)),
    "PartialSelfAttention": (QUADRATIC, lambda n: layers.PartialSelfAttention(DIM)),
    "SelfAttention": (QUADRATIC, lambda n: layers.SelfAttention(DIM, HEADS)),
    "SparseAttention": (QUADRATIC, lambda n: layers.SparseAttention(DIM, n * n + 1, HEADS)),
}
"""What their papers say of the cost in positions, and what makes them for n x n positions."""


def example(block: nn.Module, batch: int, n: int) -> Tensor:
    """An input of n x n positions, in the layout that the block takes."""
    if isinstance(block, layers.SelfAttention | layers.GatedPositionalSelfAttention):
        return torch.randn(batch, n * n + isinstance(block, layers.SparseAttention), DIM)
    last = (
        layers.AgentAttention, layers.ChannelAttention, layers.ConvPosEnc, layers.FlowAttention, layers.FocalModulation,
        layers.HiLoAttention, layers.NeighborhoodAttention2d, layers.WindowAttention2d,
    )  # fmt: skip
    return torch.randn(batch, n, n, DIM) if isinstance(block, last) else torch.randn(batch, DIM, n, n)


def step(module: nn.Module, x: Tensor, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        out = module(x)
    if backward:
        out.backward(torch.ones_like(out))
        module.zero_grad()
        x.grad = None


def exponent(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """Of the power of pixels that fits best."""
    return linear_regression([2 * math.log(n) for n in sizes], [math.log(cost) for cost in costs]).slope


def measure(name: str, args: Namespace, device: torch.device, seconds: Callable) -> dict:
    """Sizes, seconds of forward and of forward with backward, and bytes of the latter."""
    cost, make = BLOCKS.get(name, (MODEL, None))
    sizes = sorted(set(args.sizes or SIZES[cost]))
    steps = []
    for n in sizes:
        if make is None:
            module = visionattn.create_model(name, img_size=n).train()
            x = torch.randn(args.batch, 3, n, n)
        else:
            module = make(n)
            x = example(module, args.batch, n)
        module, x = module.to(device), x.to(device).requires_grad_(make is not None)  # no one trains images
        steps += [partial(step, module, x, backward) for backward in (False, True)]
    times = [median(each) for each in in_turns(steps, args.rounds, seconds)]
    memory = [peak_memory(call, device) for call in steps[1::2]]
    found = {"forward": times[::2], "training": times[1::2], "memory": memory}
    return {"name": name, "cost": cost, "sizes": sizes, **found}


def plot(rows: list[dict], path: Path) -> None:
    """Draw forward and training times and memory over the number of pixels."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 6), layout="constrained")
    panels = {"forward": "forward, ms", "training": "forward and backward, ms", "memory": "of these, MiB"}
    for axes, (what, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for i, row in enumerate(rows):
            style = {"linestyle": "-" if row["cost"] in (LINEAR, MODEL) else "--", "marker": "osv^D"[i % 5]}
            costs = [cost * (2**-20 if what == "memory" else 1e3) for cost in row[what]]
            color = colormaps["tab20"](i % 20)
            axes.loglog([n**2 for n in row["sizes"]], costs, **style, markersize=4, color=color, label=row["name"])
        axes.set(title=title, xlabel="pixels")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="blocks and models; none: all blocks there are here")
    parser.add_argument("--sizes", type=positive, nargs="+", help="sides of maps for blocks, of images for models")
    parser.add_argument("--batch", type=positive, default=1, help="maps or images")
    parser.add_argument("--plot", type=output(".png", ".pdf", ".svg"), help="file for a picture")
    parser.add_argument("--markdown", action="store_true", help="print a table in Markdown")
    add_machine(parser)
    args = parser.parse_args(argv)
    names = [block for name in args.names for block in _chosen(name)]
    if args.sizes and len(set(args.sizes)) < 2:
        raise VisionattnError(f"expected two sizes or more, got {args.sizes[0]}")
    if args.plot:
        require("matplotlib")
    device, seconds = start(args)
    torch.set_flush_denormal(True)  # softmaxes of random maps get so sharp as these grow that products take longer
    print(", ".join(f"{key} {value}" for key, value in machine(device).items()) + f", {args.clock} clock\n")
    columns = {"block or model": "35", "cost": "9", "sizes": "14", "forward": "5.2f", "training": "5.2f"}
    columns |= {"memory": "5.2f", "bar": "5", "ms at largest": "7.1f", "MiB at largest": "7.0f"}
    table, rows = Table(columns, args.markdown), []
    for name in names or BLOCKS:
        rows.append(row := measure(name, args, device, seconds))
        exponents = {what: exponent(row["sizes"], row[what]) for what in ("forward", "training", "memory")}
        cells = {"block_or_model": name, "cost": row["cost"], "sizes": f"{row['sizes'][0]} to {row['sizes'][-1]}"}
        cells["bar"] = ("above" if max(exponents.values()) > BAR else "met") if row["cost"] == LINEAR else None
        table.row(
            **cells, **exponents, ms_at_largest=row["training"][-1] * 1e3, MiB_at_largest=row["memory"][-1] / 2**20
        )
    if args.plot:
        plot(rows, args.plot)
        print(f"\n{args.plot}")


def _chosen(name: str) -> list[str]:
    """The entries of a block, which may have several, or a model."""
    if blocks := [block for block in BLOCKS if block == name or block.startswith(f"{name},")]:
        return blocks
    if hasattr(layers, name):
        raise VisionattnError(f"expected a model, or one of the blocks {'; '.join(BLOCKS)}; got {name}")
    return [visionattn.model_info(name).name]


if __name__ == "__main__":
    sys.exit(run(main))
