"""Speed and memory of models, for inference and a step of training, alone or against another implementation.

    python benchmarks/throughput.py                                    # one model of each family
    python benchmarks/throughput.py 'van_*' --against reference        # as published: benchmarks/reference/
    python benchmarks/throughput.py --all --against timm,reference     # the first of these that has the model
    python benchmarks/throughput.py van_b1 --int8 --against plain      # what fusing or int8 changes in inference
    python benchmarks/throughput.py dinat_mini --device cuda --dtype bfloat16 --compile --compile-mode max-autotune

Both sides take turns in one process, each in its better memory layout. The ratio is their median time by ours, above 1
where ours is faster, with the quartiles of the ratios of the rounds. GFLOP/s are twice the multiply-adds of the
registry, three times as many for a training step, beside the best of a few large matrix products. A training step is
forward, cross-entropy, backward and AdamW's update; its memory is what it allocates beside weights and AdamW's state.
The difference of logits is relative to the largest one, with the peer's weights read by ours as any published file is.

Of the models, Hugging Face's transformers has FocalNet, and DiNAT with an old NATTEN, which does not run any more.
"""

import contextlib
import gc
import json
import math
import sys
import traceback
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median

import timm
import torch
from common import REFERENCES, Parser, Table, ceiling, output, ratio, reference, shake
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import visionattn
from visionattn.errors import VisionattnError, all_lines, run
from visionattn.macs import count
from visionattn.measure import DTYPES, LAYOUTS, add_machine, in_turns, machine, peak_memory, positive, start
from visionattn.models.focalnet import FocalNet
from visionattn.registry import ModelInfo, find, timm_name
from visionattn.weights import convert_state_dict

REPRESENTATIVES = (
    "agent_pvt_tiny", "attnet_t1", "convit_tiny", "davit_tiny", "dinat_mini", "flowformer", "focalnet_tiny_srf",
    "halonet26t", "hornet_tiny_gf", "illama_tiny", "litv2_small", "moh_vit_small_75", "nalaformer_xt", "overlock_xt",
    "patnet_t2", "sgformer_s", "sparsifiner_deit_small", "van_b1",
)  # fmt: skip
SAME = 1e-3
"""Of the largest logit, up to which two sides compute one function, in float32."""
MOST_PARAMETERS = 60e6
"""Of the models that patterns and --all stand for."""


class Side:
    """A model as it is timed.

    Args:
        model: ours or the peer's.
        args: options.
        training: time training steps.
        x: (B, C, H, W).
        targets: (B,).
    """

    def __init__(self, model: nn.Module, args: Namespace, training: bool, x: Tensor, targets: Tensor) -> None:
        for module in model.modules():  # nothing is dropped: what is drawn differs
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
        self.model = model.to(x.device, torch.float32 if args.autocast else x.dtype).train(training)
        self.call = torch.compile(self.model, mode=args.compile_mode) if args.compile else self.model
        self.x, self.targets, self.training = x, targets, training
        self.autocast = torch.autocast(x.device.type, DTYPES[args.dtype], enabled=args.autocast)

    def use(self, layout: str) -> None:
        """Bring weights and images to a layout."""
        self.layout = layout
        for parameter in self.model.parameters():
            if parameter.ndim == 4:  # `Module.to` would ask more dimensions of weights for a layout that they have not
                parameter.data = parameter.data.contiguous(memory_format=LAYOUTS[layout])
        self.x = self.x.contiguous(memory_format=LAYOUTS[layout])
        # Anew, as it keeps moments in the layout of the weights.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-6) if self.training else None

    def logits(self) -> Tensor:
        with self.autocast:
            out = self.call(self.x)
        out = getattr(out, "logits", out)
        return out if isinstance(out, Tensor) else out[0]

    def step(self) -> None:
        if not self.training:
            with torch.inference_mode():
                self.logits()
            return
        cross_entropy(self.logits().float(), self.targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def sized(create: Callable[..., nn.Module], name: str, size: int, default: int) -> nn.Module:
    """A model for a size of images, if it has to know."""
    if size != default:
        with contextlib.suppress(TypeError):
            return create(name, img_size=size)
    return create(name)


def timm_peer(name: str, size: int) -> nn.Module | None:
    if timm_name(name) == name:  # timm had none so called
        return None
    model = sized(timm.create_model, name, size, visionattn.model_info(name).input_size[-1])
    assert type(model).__module__.startswith("timm."), f"{name} of timm is {type(model)}"
    return model


def reference_peer(name: str, size: int) -> nn.Module | None:
    family = visionattn.model_info(name).family
    if family not in REFERENCES or name not in reference(family).VARIANTS:
        return None
    return sized(reference(family).create_model, name, size, 224)


def transformers_peer(name: str, size: int) -> nn.Module | None:
    from transformers import FocalNetConfig, FocalNetForImageClassification

    _, _, entry = find(name)
    if entry.takes is not FocalNet:
        return None
    names = {"use_postln": "use_post_layernorm", "use_postln_in_modulation": "use_post_layernorm_in_modulation"}
    options = {names.get(key, key): value for key, value in entry.variant.kwargs.items()}
    depths = options.setdefault("depths", (2, 2, 6, 2))
    for key, default in (("focal_levels", 2), ("focal_windows", 3)):
        value = options.get(key, default)
        options[key] = [value] * len(depths) if isinstance(value, int) else list(value)
    options["hidden_sizes"] = [options.get("embed_dim", 96) * 2**i for i in range(len(depths))]
    return FocalNetForImageClassification(FocalNetConfig(image_size=size, num_labels=1000, **options))


def plain_peer(name: str, size: int) -> nn.Module:
    return visionattn.create_model(name, img_size=size)


PEERS = {"timm": timm_peer, "transformers": transformers_peer, "reference": reference_peer, "plain": plain_peer}


def find_peer(name: str, size: int, libraries: Iterable[str]) -> tuple[str, nn.Module] | None:
    """The first of the libraries that has the model, and its model."""
    for library in libraries:
        if (model := PEERS[library](name, size)) is not None:
            return library, model
    return None


def choose(args: Namespace) -> list[str]:
    """Names of the models that the options stand for.

    Raises:
        VisionattnError: if there is none.
    """
    names = []
    for pattern in args.models or (["*"] if args.all else REPRESENTATIVES):
        if not any(c in pattern for c in "*?["):
            names.append(visionattn.model_info(pattern).name)
            continue
        found = [name for name in visionattn.list_models(pattern) if args.models or not name.startswith("test_")]
        names += [name for name in found if visionattn.model_info(name).params < MOST_PARAMETERS]
        if not found:
            raise VisionattnError(f"no model is called {pattern}; see visionattn.list_models()")
    return list(dict.fromkeys(names))


def count_macs(info: ModelInfo, size: int) -> float | None:
    """Multiply-adds in 1e9."""
    if size == info.input_size[-1] or info.gmacs is None:
        return info.gmacs
    return count(info.name, (3, size, size)) / 1e9


def measure(info: ModelInfo, args: Namespace, device: torch.device, seconds: Callable, training: bool) -> dict | None:
    """A row of the table; None if there is no peer."""
    size = args.size or info.input_size[-1]
    x = torch.randn(args.batch, 3, size, size, device=device)
    x = x if args.autocast else x.to(DTYPES[args.dtype])
    ours = visionattn.create_model(info.name, img_size=size)
    library = differs = None
    models = [shake(ours)]
    if args.against:
        if (peer := find_peer(info.name, size, args.against)) is None:
            return None
        library = peer[0]
        ours.load_state_dict(convert_state_dict(shake(peer[1]).state_dict(), ours))
        models.append(peer[1])
    if args.fuse and not training:
        ours.eval().fuse()
    if args.int8 and not training:
        visionattn.quantize(ours.eval())
    targets = torch.randint(ours.num_classes, (args.batch,), device=device)
    sides = [Side(model, args, training, x, targets) for model in models]
    choose_layouts(sides, args, seconds)
    if len(sides) > 1 and not training:
        with torch.inference_mode():
            logits = [side.logits().float() for side in sides]
        differs = ((logits[0] - logits[1]).abs().max() / logits[1].abs().max()).item()
        if args.dtype == "float32" and not args.int8 and not differs < SAME:
            raise VisionattnError(
                f"logits differ by {differs:.1e} from {library}'s, which compute another function here"
            )
    times = in_turns([side.step for side in sides], args.rounds, seconds)
    memory = [peak_memory(side.step, device) for side in sides] if training else []
    row = {"model": info.name, "family": info.family, "mode": "training" if training else "inference", "size": size}
    row |= {"peer": library, "layouts": [side.layout for side in sides], "times": times, "memory": memory}
    row |= {"ms": median(times[0]) * 1e3, "images_s": args.batch / median(times[0]), "difference": differs}
    if (gmacs := count_macs(info, size)) is not None:
        row |= {"gmacs": gmacs, "gflops": (6 if training else 2) * gmacs * row["images_s"]}
    if library:
        row["ratio"], *row["quartiles"] = ratio(*times)
        row["peer_ms"] = median(times[1]) * 1e3
        row["memory_ratio"] = memory[0] / memory[1] if training else None
    return row


def choose_layouts(sides: list[Side], args: Namespace, seconds: Callable) -> None:
    """Bring each side to the layout asked for, or to its better one by three turns in each."""
    layouts, tried = ([args.layout] if args.layout in LAYOUTS else list(LAYOUTS)), {}
    for layout in layouts:
        for side in sides:
            side.use(layout)
        if len(layouts) > 1:
            times = in_turns([side.step for side in sides], 3, seconds)
            tried |= {(side, layout): median(each) for side, each in zip(sides, times, strict=True)}
    for side in sides if tried else []:
        side.use(min(layouts, key=lambda layout, side=side: tried[side, layout]))


def mean_over_families(rows: Iterable[dict], key: str) -> float:
    """Geometric mean over the families of that over the variants of each."""
    families: dict[str, list[float]] = {}
    for row in rows:
        families.setdefault(row["family"], []).append(math.log(row[key]))
    return math.exp(fmean(fmean(each) for each in families.values()))


def show(table: Table, row: dict, best: float) -> None:
    """Print a row."""
    cells = row | {"GMACs": row.get("gmacs"), "GFLOP_s": row.get("gflops")}
    cells["%_of_best"] = 100 * row["gflops"] / best if "gflops" in row else None
    cells["quartiles"] = "{:.2f}-{:.2f}".format(*row["quartiles"]) if row["peer"] else None
    cells["MiB"], cells["peer_MiB"], *_ = [each / 2**20 for each in row["memory"]] + [None] * 2
    cells["layouts"] = "/".join("NHWC" if layout == "channels_last" else "NCHW" for layout in row["layouts"])
    table.row(**cells)


def show_means(rows: list[dict], mode: str) -> None:
    """Print what the rows of a mode come to."""
    for what, key, worst in (("time, peer / ours", "ratio", min), ("memory, ours / peer", "memory_ratio", max)):
        if chosen := [row for row in rows if row["mode"] == mode and row.get(key)]:
            mean = mean_over_families(chosen, key)
            print(f"{mode} {what}: {mean:.3f}, worst {worst(row[key] for row in chosen):.3f}")


def parse(argv: list[str]) -> Namespace:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names or patterns; none: one model of each family")
    parser.add_argument("--all", action="store_true", help="every model under 60 M parameters")
    parser.add_argument(
        "--against", default="", help=f"peers, the first that has the model: {','.join(PEERS)} (our model, not fused)"
    )
    parser.add_argument("--mode", choices=("inference", "training", "both"), default="both", help="what to time")
    parser.add_argument("--batch", type=positive, default=8, help="images")
    parser.add_argument("--size", type=positive, help="height and width in pixels; that of the model's weights if none")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and images")
    parser.add_argument("--autocast", action="store_true", help="float32 weights, computing in --dtype")
    parser.add_argument("--compile", action="store_true", help="torch.compile both sides")
    parser.add_argument("--compile-mode", help="default, reduce-overhead, max-autotune, ...")
    parser.add_argument("--fuse", action="store_true", help="fold our batch norms and layer scales; times inference")
    parser.add_argument("--int8", action="store_true", help="int8 weights of ours on a CPU, fused; times inference")
    parser.add_argument(
        "--layout", choices=("best", *LAYOUTS), default="best", help="of memory; best: the better of each"
    )
    parser.add_argument("--markdown", action="store_true", help="print a table in Markdown")
    parser.add_argument("--json", type=output(), help="file for all that was measured")
    add_machine(parser)
    args = parser.parse_args(argv)
    args.against = [library for library in args.against.split(",") if library]
    if unknown := [library for library in args.against if library not in PEERS]:
        raise VisionattnError(f"--against takes {', '.join(PEERS)}, got {unknown[0]}")
    if "transformers" in args.against and find_spec("transformers") is None:
        raise VisionattnError("--against transformers needs transformers: python -m pip install transformers")
    if args.compile_mode and not args.compile:
        raise VisionattnError("--compile-mode says how to --compile: give both")
    if args.autocast and args.dtype == "float32":
        raise VisionattnError("--autocast computes in --dtype: give bfloat16 or float16")
    if args.int8 or args.fuse:
        if args.mode == "training":
            raise VisionattnError("--int8 and --fuse are for inference, got --mode training")
        args.mode = "inference"
    if args.int8 and (args.compile or args.autocast or args.dtype != "float32" or args.device != "cpu"):
        raise VisionattnError("--int8 is for float32 on a CPU, without --compile and --autocast")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    names = choose(args)
    device, seconds = start(args)
    best = ceiling(DTYPES[args.dtype], device, seconds)
    about = machine(device) | {
        key: str(getattr(args, key))
        for key in ("batch", "dtype", "autocast", "compile", "compile_mode", "fuse", "int8", "clock")
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()) + f"; matrix products {best:.0f} GFLOP/s\n")
    columns = {
        "model": "22",
        "size": "4d",
        "mode": "9",
        "images/s": "8.1f",
        "ms": "8.1f",
        "GMACs": "6.2f",
        "GFLOP/s": "7.0f",
    }
    columns |= {"% of best": "9.0f", "MiB": "7.0f", "layouts": "9"}
    if args.against:
        columns |= {"peer": "9", "peer ms": "8.1f", "ratio": "5.2f", "quartiles": "9", "peer MiB": "8.0f"}
        columns |= {"memory ratio": "5.2f", "difference": "8.1e"}
    table, rows, failed, left = Table(columns, args.markdown), [], [], []
    for name in names:
        for training in (False, True) if args.mode == "both" else (args.mode == "training",):
            torch.compiler.reset()  # which lets go of the last models, and counts how often their code was compiled
            gc.collect()
            try:
                row = measure(visionattn.model_info(name), args, device, seconds, training)
            except (RuntimeError, AssertionError, TypeError, ValueError) as error:  # whatever the two raise
                *_, (last, line) = traceback.walk_tb(error.__traceback__)
                where = "" if str(error) else f" at {Path(last.f_code.co_filename).name}:{line}"
                print(f"{name}: {all_lines(error)[:300]}{where}", file=sys.stderr, flush=True)
                failed.append(name)
                break
            if row is None:
                left.append(name)
                break
            rows.append(row)
            show(table, row, best)
            if args.json:
                args.json.write_text(json.dumps({"about": about | {"gflops": best}, "rows": rows}, indent=1))
    if left and not rows:
        raise VisionattnError(f"{' or '.join(args.against)} has none of {', '.join(left)}")
    if args.against and rows:
        print("\ngeometric means over the families, of those over their models:")
        show_means(rows, "inference")
        show_means(rows, "training")
    if left:
        print(f"not in {' or '.join(args.against)}: {', '.join(left)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run(main))
