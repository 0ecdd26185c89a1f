"""Models with batch norms merged into their products, against the same models as they are.

    python benchmarks/fuse.py [van_b0 patnet_t0 ...] [--threads 2] [--device cpu] [--batch 4] [--size 224]

Both run the forward pass in eval mode, in turns; the table gives the median time of each, the ratio fused / unfused,
and the largest difference of their logits relative to the largest logit.
"""

import argparse
import copy
from statistics import median

import torch
from torch import nn
from torch.utils.benchmark import Timer

import visionattn

NAMES = ("van_b0", "van_b1", "patnet_t0", "patnet_t1", "patnet_t2", "patnet_t2_full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", default=NAMES, help="registered models")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--batch", type=int, default=4, help="images")
    parser.add_argument("--size", type=int, default=224, help="height and width in pixels")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each, taken in turns")
    args = parser.parse_args()
    torch.manual_seed(0)
    columns = {"model": 20, "unfused ms": 10, "fused ms": 9, "ratio": 6, "error": 8}
    print(*(f"{name:>{width}}" for name, width in columns.items()))
    for name in args.names:
        model = visionattn.create_model(name).eval()
        for key, buffer in model.named_buffers():  # as they might be after training
            if key.endswith("running_mean"):
                nn.init.normal_(buffer, std=0.1)
            if key.endswith("running_var"):
                nn.init.uniform_(buffer, 0.5, 1.5)
        fused = copy.deepcopy(model).fuse()
        x = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
        models = [m.to(args.device) for m in (model, fused)]
        with torch.inference_mode():
            logits = [m(x) for m in models]
            timers = [Timer("m(x)", globals={"m": m, "x": x}, num_threads=args.threads) for m in models]
            times = [[], []]
            for _ in range(args.rounds):
                for timer, found in zip(timers, times, strict=True):
                    found.append(timer.blocked_autorange(min_run_time=0.5).median * 1e3)
        plain, merged = map(median, times)
        error = (logits[0] - logits[1]).abs().max() / logits[0].abs().max()
        print(f"{name:>20} {plain:>10.1f} {merged:>9.1f} {merged / plain:>6.2f} {error:>8.1e}", flush=True)


if __name__ == "__main__":
    main()
