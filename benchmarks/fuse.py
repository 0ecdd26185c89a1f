"""Models with batch norms merged into their products, against the same models as they are.

    python benchmarks/fuse.py [van_b0 patnet_t0 ...] [--threads 2] [--device cpu] [--batch 4] [--size 224]

Both run the forward pass in eval mode, in turns; the table gives the median time of each, the ratio fused / unfused,
and the largest difference of their logits relative to the largest logit.
"""

import copy
import sys
from argparse import RawDescriptionHelpFormatter
from functools import partial
from statistics import median

import torch
from measure import Parser, Table, add_machine, in_turns, positive, shake, start

import visionattn
from visionattn.errors import run

NAMES = ("van_b0", "van_b1", "patnet_t0", "patnet_t1", "patnet_t2", "patnet_t2_full")


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, help="registered models")
    parser.add_argument("--batch", type=positive, default=4, help="images")
    parser.add_argument("--size", type=positive, default=224, help="height and width in pixels")
    add_machine(parser)
    args = parser.parse_args(argv)
    names = [visionattn.model_info(name).name for name in args.names]
    device, seconds = start(args)
    table = Table({"model": "20", "unfused ms": "8.1f", "fused ms": "8.1f", "ratio": "6.2f", "error": "8.1e"})
    for name in names:
        model = shake(visionattn.create_model(name)).to(device).eval()
        models = [model, copy.deepcopy(model).fuse()]
        x = torch.randn(args.batch, 3, args.size, args.size, device=device)
        with torch.inference_mode():
            logits = [m(x) for m in models]
            times = in_turns([partial(m, x) for m in models], args.rounds, seconds, shortest=0.5)
        plain, merged = (median(each) * 1e3 for each in times)
        error = (logits[0] - logits[1]).abs().max() / logits[0].abs().max()
        table.row(model=name, unfused_ms=plain, fused_ms=merged, ratio=merged / plain, error=error.item())


if __name__ == "__main__":
    sys.exit(run(main))
