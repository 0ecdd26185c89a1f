"""Neighbourhood attention against the formulation that gathers kernel^2 keys and values per query.

    python benchmarks/neighborhood_attention.py [--batch 2] [--size 224] [--device cpu] [--clock cpu] [--threads 1]

At every shape that the stages of dinat_mini and dinat_tiny have, both compute the same layer from the same projected
queries, keys and values, in turns: the forward pass, and forward and backward with the gradients of all of them and of
the biases. The table gives the median times in milliseconds, gather / ours, the most memory that forward and backward
hold at once beside their input, in MiB, ours / gather, and the largest difference of the outputs.
"""

import sys
from argparse import RawDescriptionHelpFormatter
from functools import cache, partial

import torch
from common import Parser, against_gather, against_gather_table, reference
from torch import Tensor

from visionattn.errors import VisionattnError, run
from visionattn.layers import NeighborhoodAttention2d
from visionattn.layers.neighborhood_attention import _neighborhood_attention
from visionattn.measure import DTYPES, add_machine, positive, start

HEAD_DIM, KERNEL = 32, 7
STAGES = ((4, 2, 8), (8, 4, 4), (16, 8, 2), (32, 16, 1))
"""Stride, heads and dilation of the second half of the blocks; that of the first half is 1."""


@cache
def indices(H: int, W: int, dilation: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Keys of every query on the map and their places in the table of biases: (H * W * KERNEL^2,)."""
    (rows, row_bias), (cols, col_bias) = (reference("dinat").neighbors(n, KERNEL, dilation) for n in (H, W))
    keys = rows[:, None, :, None] * W + cols[None, :, None, :]
    biases = row_bias[:, None, :, None] * (2 * KERNEL - 1) + col_bias[None, :, None, :]
    return keys.flatten().to(device), biases.flatten().to(device)


def gather_attention(layer: NeighborhoodAttention2d, qkv: Tensor) -> Tensor:
    """The same attention with every query's keys and values copied out."""
    B, H, W, _ = qkv.shape
    keys, biases = indices(H, W, layer.dilation[0], qkv.device)
    q, k, v = qkv.view(B, H * W, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    gathered = (*q.shape[:3], KERNEL**2, q.shape[-1])
    logits = torch.einsum("bhnd,bhnkd->bhnk", q * layer.scale, k.index_select(2, keys).view(gathered))
    logits = logits + layer.rpb.flatten(1).index_select(1, biases).view(logits.shape[1:])
    out = torch.einsum("bhnk,bhnkd->bhnd", logits.softmax(-1), v.index_select(2, keys).view(gathered))
    return out.transpose(1, 2).reshape(B, H, W, -1)


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=positive, default=2, help="images")
    parser.add_argument("--size", type=positive, default=224, help="height and width of the images in pixels")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of all tensors")
    parser.add_argument("--markdown", action="store_true", help="print a table in Markdown")
    add_machine(parser)
    args = parser.parse_args(argv)
    if args.size < 32 * KERNEL:  # smaller maps are padded, and the projection takes part
        raise VisionattnError(f"expected a size of {32 * KERNEL} or more, whose maps windows fit, got {args.size}")
    device, seconds = start(args)
    table = against_gather_table({"map": "13", "heads": "7", "dilation": "8d"}, args, device)
    for stride, heads, dilated in STAGES:
        length, C = args.size // stride, heads * HEAD_DIM
        for dilation in sorted({1, dilated}):
            like = {"device": device, "dtype": DTYPES[args.dtype]}
            layer = NeighborhoodAttention2d(C, heads, KERNEL, dilation, **like)
            qkv = torch.randn(args.batch, length, length, 3 * C, **like, requires_grad=True)
            both = [partial(attend, layer, qkv) for attend in (gather_attention, _neighborhood_attention)]
            found = against_gather(*both, [qkv, layer.rpb], args.rounds, seconds)
            table.row(map=f"{args.batch}x{length}x{length}", heads=f"{heads}x{HEAD_DIM}", dilation=dilation, **found)


if __name__ == "__main__":
    sys.exit(run(main))
