"""Draws a block of a model as SVG, from what happens when it is called: its layers in order, shapes, and residuals."""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

WIDTH, BOX, HEIGHT, GAP = 460, 260, 32, 26
ADDS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__iadd__, Tensor.add_, torch.addcmul}
PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__imul__, Tensor.mul_}
OTHERS = {
    F.scaled_dot_product_attention: "softmax attention",
    F.softmax: "softmax attention",
    torch.softmax: "softmax attention",
    Tensor.softmax: "softmax attention",
    torch.fft.rfft2: "global filter (FFT)",
    torch.fft.irfft2: "global filter (FFT)",
}
"""Functions that are steps of their own, as layers are."""


@dataclass
class Step:
    """A box of the picture: a layer that was called, or a sum.

    Args:
        label: what is written in it.
        shape: of what it returns.
        group: the part of the block that it is in.
        sources: number of the steps that a sum adds, -1 for the block's input.
    """

    label: str
    shape: str
    group: str = ""
    sources: list[int] = field(default_factory=list)


class _Functions(TorchFunctionMode):
    """Calls back for every function of tensors."""

    def __init__(self, seen: Callable) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.seen(func, args, out)
        return out


def trace(block: nn.Module, call: Callable[[], object]) -> list[Step]:
    """What happens in a block while a model is called.

    Args:
        block: a module of the model.
        call: calls the model.
    """
    steps: list[Step] = []
    made: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no other tensor gets the number of one of these
    stack: list[nn.Module] = []
    names = {module: name for name, module in block.named_modules()}

    def note(label: str, group: str, out: Tensor, sources: Sequence[int] = ()) -> None:
        steps.append(Step(label, "x".join(map(str, out.shape[1:])), group, list(sources)))
        made[id(out)] = len(steps) - 1
        kept.append(out)

    def enter(module: nn.Module, inputs: tuple) -> None:
        if module is block:
            made[id(inputs[0])] = -1
            kept.append(inputs[0])
        stack.append(module)

    def leave(module: nn.Module, inputs: tuple, out: object) -> None:
        stack.pop()
        out = out[0] if isinstance(out, tuple) else out
        if module is block or not isinstance(out, Tensor):
            return
        if isinstance(module, nn.Identity | nn.Dropout) or any(module.children()):
            before = made.get(id(inputs[0])) if isinstance(module, nn.Identity | nn.Dropout) else len(steps) - 1
            if before is not None:  # it passes on what came to it, or what the last of its layers made
                made.setdefault(id(out), before)
                kept.append(out)
        else:
            note(describe(module), group_of(module), out)

    def group_of(module: nn.Module) -> str:
        name = names[module].partition(".")[0]
        part = getattr(block, name, module)
        return type(part).__name__ if any(part.children()) else ""

    def function(func: Callable, inputs: tuple, out: Tensor) -> None:
        if stack == [block] and func in ADDS:
            sources = [made[id(t)] for t in inputs[:2] if isinstance(t, Tensor) and id(t) in made]
            if len(sources) == 1:  # the input in another layout
                sums = [i for i, step in enumerate(steps) if step.label == "+"]
                sources.append(sums[-1] if sums else -1)
            if sources:
                note("+", "", out, sources)
        elif len(stack) > 1 and any(stack[-1].children()):
            group = group_of(stack[1])
            gate = func in PRODUCTS and all(isinstance(t, Tensor) and t.ndim == out.ndim for t in inputs[:2])
            label = "product, a gate" if gate else OTHERS.get(func, "")
            if label and not (steps and (steps[-1].label, steps[-1].group) == (label, group)):
                note(label, group, out)

    handles = [m.register_forward_pre_hook(enter) for m in block.modules()]
    handles += [m.register_forward_hook(leave) for m in block.modules()]
    with _Functions(function), torch.no_grad():
        call()
    for handle in handles:
        handle.remove()
    return steps


def describe(module: nn.Module) -> str:
    """A layer in a few words."""
    kind = type(module).__name__
    if isinstance(module, nn.Conv2d):
        k, grouped = "x".join(map(str, module.kernel_size)), module.groups == module.in_channels > 1
        dilated = f", dilation {module.dilation[0]}" if module.dilation[0] > 1 else ""
        return f"{'depthwise ' if grouped else ''}conv {k}{dilated}"
    if isinstance(module, nn.Linear):
        return f"linear {module.in_features} to {module.out_features}"
    return kind


def draw(steps: list[Step], title: str) -> str:
    """The picture, as SVG.

    Args:
        steps: of the block.
        title: above it.
    """
    title = html.escape(title)
    left, top = (WIDTH - BOX) // 2, 64
    y = [top + i * (HEIGHT + GAP) for i in range(len(steps))]
    height = top + len(steps) * (HEIGHT + GAP) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'font-family="system-ui, sans-serif" font-size="13" role="img" aria-label="{title}">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#607d8b"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{WIDTH // 2}" y="22" text-anchor="middle" font-weight="600" fill="#263238">{title}</text>',
    ]
    parts += _groups(steps, y, left)
    middle = WIDTH // 2
    parts.append(_arrow(middle, 34, middle, y[0]))
    for i, step in enumerate(steps):
        if i:
            parts.append(_arrow(middle, y[i - 1] + HEIGHT, middle, y[i]))
            shape = html.escape(steps[i - 1].shape.replace("x", " × "))
            parts.append(f'<text x="{middle + 8}" y="{y[i] - 6}" font-size="10" fill="#78909c">{shape}</text>')
        if step.label == "+":
            parts.append(
                f'<circle cx="{middle}" cy="{y[i] + HEIGHT // 2}" r="13" fill="#fff3e0" stroke="#fb8c00"/>'
                f'<text x="{middle}" y="{y[i] + HEIGHT // 2 + 5}" text-anchor="middle" fill="#e65100">+</text>'
            )
            for source in step.sources:
                if source < i - 1:
                    start = 44 if source == -1 else y[source] + HEIGHT + GAP // 2
                    at, end, x = middle - 13, y[i] + HEIGHT // 2, 26
                    parts.append(
                        f'<path d="M{middle} {start} H{x + 8} Q{x} {start} {x} {start + 8} V{end - 8} '
                        f'Q{x} {end} {x + 8} {end} H{at}" fill="none" stroke="#fb8c00" stroke-width="1.5" '
                        'marker-end="url(#tip)"/>'
                    )
        else:
            parts.append(
                f'<rect x="{left}" y="{y[i]}" width="{BOX}" height="{HEIGHT}" rx="6" fill="{_colour(step.label)}" '
                'stroke="#90a4ae"/>'
                f'<text x="{middle}" y="{y[i] + HEIGHT // 2 + 5}" text-anchor="middle" fill="#263238">'
                f"{html.escape(step.label)}</text>"
            )
    parts.append(_arrow(middle, y[-1] + HEIGHT, middle, height - 8))
    shape = html.escape(steps[-1].shape.replace("x", " × "))
    parts.append(f'<text x="{middle + 8}" y="{height - 14}" font-size="10" fill="#78909c">{shape}</text>')
    return "\n".join([*parts, "</svg>"])


def _groups(steps: list[Step], y: list[int], left: int) -> list[str]:
    """Frames around the layers of one part."""
    parts, i = [], 0
    while i < len(steps):
        j = i
        while j + 1 < len(steps) and steps[j + 1].group == steps[i].group:
            j += 1
        if steps[i].group:
            parts.append(
                f'<rect x="{left - 14}" y="{y[i] - 11}" width="{BOX + 28}" height="{y[j] - y[i] + HEIGHT + 22}" '
                'rx="10" fill="#f5f7f9" stroke="#cfd8dc" stroke-dasharray="4 3"/>'
                f'<text transform="translate({left + BOX + 22} {(y[i] + y[j] + HEIGHT) // 2}) rotate(90)" '
                f'text-anchor="middle" font-size="12" fill="#546e7a">{html.escape(steps[i].group)}</text>'
            )
        i = j + 1
    return parts


def _arrow(x1: int, y1: int, x2: int, y2: int) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#607d8b" stroke-width="1.5" marker-end="url(#tip)"/>'


def _colour(label: str) -> str:
    kinds = (("norm", "#e8f5e9"), ("linear", "#e3f2fd"), ("conv", "#ede7f6"), ("gelu", "#fffde7"), ("act", "#fffde7"))
    return next((colour for word, colour in kinds if word in label.lower()), "#fce4ec")
