"""What the benchmarks have in common besides `visionattn.measure`: their parser, and files that are in no package."""

import argparse
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import median, quantiles
from types import ModuleType

import torch
from torch import Tensor, nn

from visionattn.errors import VisionattnError
from visionattn.measure import Seconds, in_turns, machine, peak_memory

REFERENCES = {path.stem: path for path in sorted((Path(__file__).parent / "reference").glob("*.py"))}


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, as those of the other scripts."""

    def error(self, message: str):
        raise VisionattnError(f"{message}; see --help")


def output(*endings: str) -> Callable[[str], Path]:
    """The type of an option that names a file to write, which is looked at before anything is measured."""

    def path(given: str) -> Path:
        path = Path(given)
        if endings and path.suffix not in endings:
            raise argparse.ArgumentTypeError(f"expected a file that ends in {', '.join(endings)}, got {given!r}")
        if path.is_dir() or not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"expected a file in a folder that is there, got {given!r}")
        return path

    return path


@cache
def reference(family: str) -> ModuleType:
    """benchmarks/reference/<family>.py."""
    return load(REFERENCES[family])


def load(path: Path) -> ModuleType:
    """A module that is in no package."""
    spec = importlib.util.spec_from_file_location(f"_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Their time by ours, of the medians, and the quartiles of the ratios of the rounds."""
    each = [b / a for a, b in zip(ours, theirs, strict=True)]
    low, _, high = quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
    return median(theirs) / median(ours), low, high


def ceiling(dtype: torch.dtype, device: torch.device, seconds: Seconds) -> float:
    """Operations in 1e9 a second of the best of a few large matrix products."""
    sizes = [(1024, 1024, 1024), (6272, 384, 1536)] if device.type == "cpu" else [(8192,) * 3, (16384, 4096, 4096)]
    best = 0.0
    for m, k, n in sizes:
        a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
        a @ b.T
        fastest = min(seconds(lambda a=a, b=b: a @ b.T, 1) for _ in range(4))
        best = max(best, 2e-9 * m * k * n / fastest)
    return best


@torch.no_grad()
def shake(model: nn.Module) -> nn.Module:
    """Make scales, shifts and running statistics such as training might, so that nothing is hidden by its start."""
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.add_(torch.randn_like(parameter), alpha=0.05)  # more, and van_b3 overflows
    for key, buffer in model.named_buffers():
        if key.endswith("running_mean"):
            nn.init.normal_(buffer, std=0.05)
        if key.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 1.5)
    return model


class Table:
    """Rows that are printed as they come, in columns or as Markdown.

    Args:
        columns: format of each column by its head, f"{width}" and what else there is to it: "8.1f".
        markdown: print Markdown.
    """

    def __init__(self, columns: Mapping[str, str], markdown: bool = False) -> None:
        self.formats, self.markdown = dict(columns), markdown
        widths = [int(spec.lstrip("<>").partition(".")[0].rstrip("dfsgex")) for spec in columns.values()]
        self.widths = [max(width, len(head)) for head, width in zip(columns, widths, strict=True)]
        self.started = False

    def row(self, **values: object) -> None:
        """Print a row, after the heads of the columns if it is the first; what is None is a dash."""
        if not self.started:
            self._print(list(self.formats))
            if self.markdown:
                print("|" + "---|" * len(self.formats))
        self.started = True
        cells = []
        for head, spec in self.formats.items():
            value = values.get(head.replace(" ", "_").replace("/", "_"))
            cells.append("-" if value is None else str(value) if isinstance(value, str) else f"{value:{spec}}".strip())
        self._print(cells)

    def _print(self, cells: Sequence[str]) -> None:
        if self.markdown:
            print(f"| {' | '.join(cells)} |", flush=True)
        else:
            print(*(f"{cell:>{width}}" for cell, width in zip(cells, self.widths, strict=True)), flush=True)


def against_gather_table(first: Mapping[str, str], args: argparse.Namespace, device: torch.device) -> Table:
    """The table of what `against_gather` returns, after columns of its own, under a line about the machine."""
    about = ", ".join(f"{key} {value}" for key, value in machine(device).items())
    print(f"{about}, {args.dtype}, {args.clock} clock\n")
    columns = dict(first)
    for what in ("forward", "gradients"):
        columns |= {f"{what}: gather": "8.1f", f"{what}: ours": "8.1f", f"{what}: ratio": "5.1f"}
    columns |= {"MiB: gather": "8.1f", "MiB: ours": "8.1f", "MiB: ratio": "5.2f", "difference": "8.1e"}
    return Table(columns, args.markdown)


def against_gather(
    gather: Callable[[], Tensor], ours: Callable[[], Tensor], leaves: Sequence[Tensor], rounds: int, seconds: Seconds
) -> dict[str, float]:
    """Time and memory of two ways to compute the same, without and with gradients, in turns.

    Args:
        gather: that of the peer.
        ours: that of the layer.
        leaves: whose gradients are computed.
        rounds: of each.
        seconds: the clock.
    """
    with torch.no_grad():
        outs = [gather(), ours()]
    grad, row = torch.randn_like(outs[0]), {}

    def step(call: Callable[[], Tensor], backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            out = call()
        if backward:
            out.backward(grad)
            for leaf in leaves:
                leaf.grad = None

    for what, backward in (("forward", False), ("gradients", True)):
        both = [partial(step, call, backward) for call in (gather, ours)]
        for call in both:
            call()
        theirs, own = in_turns(both, rounds, seconds)
        row |= {f"{what}:_gather": median(theirs) * 1e3, f"{what}:_ours": median(own) * 1e3}
        row[f"{what}:_ratio"] = ratio(own, theirs)[0]
    theirs, own = (peak_memory(call, grad.device) / 2**20 for call in both)
    row |= {"MiB:_gather": theirs, "MiB:_ours": own, "MiB:_ratio": own / theirs}
    return row | {"difference": (outs[0] - outs[1]).abs().max().item()}
