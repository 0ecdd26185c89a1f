"""Convolution by kernels of every position against the formulation that gathers kernel^2 values per position.

    python benchmarks/dynamic_conv.py [--batch 4] [--device cpu] [--clock cpu] [--threads 1]

At the maps and kernels that OverLoCK's two stages with dynamic kernels have for images of 224 pixels, and at those of
detection, both compute the same sums in turns: the forward pass, and forward and backward with the gradients of weights
and values. The table gives the median times in milliseconds, gather / ours, the most memory that forward and backward
hold at once beside their input, in MiB, ours / gather, and the largest difference of the outputs.
"""

import sys
from argparse import RawDescriptionHelpFormatter
from functools import partial

import torch
from common import Parser, against_gather, against_gather_table, reference

from visionattn.errors import run
from visionattn.layers import dynamic_conv2d
from visionattn.measure import DTYPES, add_machine, positive, start

GROUPS, CHANNELS = 8, 16
"""Of one half of the channels of overlock_t's third stage."""
SHAPES = [(size, K) for size in ((14, 14), (28, 28), (50, 84)) for K in (5, 7, 13)]


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=positive, default=4, help="images")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of all tensors")
    parser.add_argument("--markdown", action="store_true", help="print a table in Markdown")
    add_machine(parser)
    args = parser.parse_args(argv)
    device, seconds = start(args)
    table = against_gather_table({"map": "9", "kernel": "6d"}, args, device)
    for (H, W), K in SHAPES:
        like = {"device": device, "dtype": DTYPES[args.dtype]}
        weights = torch.randn(args.batch, GROUPS, H, W, K * K, **like).softmax(-1).requires_grad_()
        value = torch.randn(args.batch, GROUPS, H, W, CHANNELS, **like, requires_grad=True)
        both = [partial(f, weights, value, K) for f in (reference("overlock").na2d_av, dynamic_conv2d)]
        table.row(map=f"{H}x{W}", kernel=K, **against_gather(*both, [weights, value], args.rounds, seconds))


if __name__ == "__main__":
    sys.exit(run(main))
