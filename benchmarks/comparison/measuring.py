"""Speed, memory and multiply-adds of a row, its time in turns with that of softmax attention."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import linear_regression, median

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from visionattn.macs import count_macs
from visionattn.measure import Seconds, in_turns, peak_memory

from .training import Row

PATCH = {"isotropic": 4, "pyramid": 4}
"""Pixels by side of a token that the mixer sees: of the pyramid in its third stage."""
TOKENS = 4096
"""Of a batch."""


def speed(row: Row, tokens: Sequence[int], rounds: int, device: torch.device, seconds: Seconds) -> dict:
    """What a row takes at maps of so many tokens, for images of one channel.

    Args:
        row: which one.
        tokens: numbers of tokens of an image, squares.
        rounds: measurements of each.
        device: where, in bfloat16 if it is a GPU.
        seconds: the clock.

    Returns:
        by number of tokens: multiply-adds, seconds and bytes for an image forward, and forward with backward, and the
        seconds of softmax attention meanwhile; parameters, those of a block of softmax attention and their deviation
        from these; the exponents of seconds by number of tokens.
    """
    found: dict = {"tokens": {}}
    softmax = replace(row, mixer="softmax", variant="", rule="equal")
    for number in tokens:
        side = math.isqrt(number) * PATCH[row.scaffold]
        batch = max(1, TOKENS // number)
        images, labels = torch.randn(batch, 1, side, side, device=device), torch.randint(10, (batch,), device=device)
        models = [each.make(num_classes=10, img_size=side).to(device) for each in (softmax, row)]
        calls = [partial(step, model, images, labels, back) for back in (False, True) for model in models]
        times = [median(each) / batch for each in in_turns(calls, rounds, seconds)]
        with torch.device("meta"):
            macs = count_macs(row.make(num_classes=10, img_size=side).eval(), (1, side, side))[""]
        found["tokens"][str(number)] = {
            "macs": macs, "batch": batch, "forward": times[1], "training": times[3],
            "softmax_forward": times[0], "softmax_training": times[2],
            "forward_memory": peak_memory(calls[1], device) / batch,
            "training_memory": peak_memory(calls[3], device) / batch,
        }  # fmt: skip
    measured = found["tokens"]
    for what in ("forward", "training"):
        logs = [(math.log(number), math.log(measured[str(number)][what])) for number in tokens]
        found[f"{what}_exponent"] = linear_regression(*zip(*logs, strict=True)).slope if len(logs) > 1 else None
    total, block = zip(*(parameters(each) for each in (row, softmax)), strict=True)
    return found | {
        "parameters": total[0],
        "deviation": total[0] / total[1] - 1,
        "block_deviation": block[0] / block[1] - 1,
    }


def step(model: nn.Module, images: Tensor, labels: Tensor, backward: bool) -> None:
    """Forward in evaluation mode, or forward and backward in that of training."""
    model.train(backward)
    with (
        torch.set_grad_enabled(backward),
        torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"),
    ):
        logits = model(images)
    if backward:
        model.training_loss(cross_entropy(logits.float(), labels), images, logits).backward()
        model.zero_grad()


def parameters(row: Row) -> tuple[int, int]:
    """Parameters of the network at its own image size, and those of a block with the mixer: the first one for which
    there are most blocks."""
    with torch.device("meta"):
        model = row.make(num_classes=10)
    blocks = model.blocks if row.scaffold == "isotropic" else model.stages[2].blocks
    return tuple(sum(p.numel() for p in module.parameters()) for module in (model, blocks[0]))
