"""Neighbourhood attention against the formulation that gathers kernel^2 keys and values per query.

    python benchmarks/neighborhood_attention.py [--threads 2] [--device cpu] [--backward]

Both compute the same layer from the same projected queries, keys and values; the table gives the median time of each,
their ratio in this run, and the largest difference of their outputs.
"""

import argparse

import torch
from torch.utils.benchmark import Timer

from visionattn.layers import NeighborhoodAttention2d
from visionattn.layers.neighborhood_attention import _neighborhood_attention

# batch, height, width, heads, head dim, kernel, dilation
CASES = [
    (2, 56, 56, 4, 32, 7, 1),
    (2, 56, 56, 4, 32, 7, 8),
    (2, 28, 28, 8, 32, 7, 1),
    (2, 14, 14, 16, 32, 7, 1),
]


def neighbors(length: int, kernel: int, dilation: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(length, kernel) key positions of every query on an axis, and their indices into the relative table."""
    query = torch.arange(length)
    group, position = query % dilation, query // dilation
    group_length = (length - group + dilation - 1) // dilation
    start = torch.minimum((position - kernel // 2).clamp(min=0), group_length - kernel)
    key = start[:, None] + torch.arange(kernel)
    return key * dilation + group[:, None], key - position[:, None] + kernel - 1


def gather_attention(layer: NeighborhoodAttention2d, qkv: torch.Tensor) -> torch.Tensor:
    """The same attention with every query's keys and values copied out."""
    B, H, W, _ = qkv.shape
    (K, _), (d, _) = layer.kernel_size, layer.dilation
    (rows, row_bias), (cols, col_bias) = (tuple(t.to(qkv.device) for t in neighbors(n, K, d)) for n in (H, W))
    index = (rows[:, None, :, None] * W + cols[None, :, None, :]).reshape(H * W, K * K)
    q, k, v = qkv.view(B, H * W, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    bias = layer.rpb[:, row_bias[:, None, :, None], col_bias[None, :, None, :]].reshape(-1, H * W, K * K)
    logits = torch.einsum("bhnd,bhnkd->bhnk", q * layer.scale, k[:, :, index]) + bias
    return torch.einsum("bhnk,bhnkd->bnhd", logits.softmax(-1), v[:, :, index]).reshape(B, H, W, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--backward", action="store_true", help="time forward and backward together")
    args = parser.parse_args()
    torch.manual_seed(0)
    columns = {"shape": 16, "heads": 8, "kernel": 6, "dilation": 8, "gather ms": 10, "ours ms": 9, "ratio": 6}
    columns["error"] = 8
    print(*(f"{name:>{width}}" for name, width in columns.items()))
    for batch, height, width, heads, dim, kernel, dilation in CASES:
        layer = NeighborhoodAttention2d(heads * dim, heads, kernel, dilation, device=args.device).eval()
        qkv = torch.randn(batch, height, width, 3 * heads * dim, device=args.device, requires_grad=args.backward)

        def run(attend, layer=layer, qkv=qkv):
            with torch.set_grad_enabled(args.backward):
                out = attend(layer, qkv)
            if args.backward:
                torch.autograd.backward(out, torch.ones_like(out))
            return out

        error = (run(gather_attention) - run(_neighborhood_attention)).abs().max().item()
        times = [
            Timer("run(attend)", globals={"run": run, "attend": attend}, num_threads=args.threads)
            .blocked_autorange(min_run_time=2)
            .median
            * 1e3
            for attend in (gather_attention, _neighborhood_attention)
        ]
        print(
            f"{f'{batch}x{height}x{width}':>16} {f'{heads}x{dim}':>8} {kernel:>6} {dilation:>8} "
            f"{times[0]:>10.1f} {times[1]:>9.1f} {times[0] / times[1]:>5.1f}x {error:>8.1e}"
        )


if __name__ == "__main__":
    main()
