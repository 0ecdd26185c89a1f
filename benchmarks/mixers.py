"""Any token mixer in one network: who is better at equal parameters, and at equal measured time.

    python benchmarks/mixers.py 0 --workers 2                  # tier 0: trains every mixer, isotropic, equal parameters
    python benchmarks/mixers.py 0 --rules mlp4 --workers 2     # the same MLP for all in place of equal parameters
    python benchmarks/mixers.py 1b --workers 2                 # same or different: two items on a canvas
    python benchmarks/mixers.py 0 --scaffolds pyramid          # the other network
    python benchmarks/mixers.py speed --clock cpu              # images/s, memory, exponents
    python benchmarks/mixers.py report --page docs/mixers.md   # the table and the pictures of all that was found
    python benchmarks/mixers.py 1a --device cuda --scaffolds isotropic pyramid --rules equal mlp4
    python benchmarks/mixers.py 2                              # prints the commands of train.py for ImageNet

Everything but the mixer is fixed: the networks (`visionattn.models.skeletons`), the recipe and, as functions of seed,
epoch and sample, the images and their order. Every finished run is a line of results.jsonl in --output; what a run has
come to is kept beside it at the end of every epoch. So a sweep that was killed goes on when it is started again, at the
epoch where it was, and the same command with more mixers, rates or seeds trains only what is missing. Workers are
processes of one thread each. Runs that diverge are results too.
"""

import fnmatch
import math
import multiprocessing
import os
import shlex
import sys
from argparse import ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing.connection import wait
from pathlib import Path

import torch
from common import Parser
from comparison.measuring import speed
from comparison.report import CONTROLS, Results, write
from comparison.tasks import DEBIAN
from comparison.training import REFERENCE_RATES, Row, Run, claimed, file_of, settled, train

from visionattn.errors import VisionattnError, one_line, require, run, user_input
from visionattn.measure import Seconds, add_machine, machine, positive, start
from visionattn.models.mixers import MIXERS, list_mixers

RULES = {"equal": "equal", "mlp4": "mlp 4"}


@dataclass(frozen=True)
class Tier:
    """How much is trained unless options say otherwise.

    Args:
        epochs: of training.
        images: of an epoch.
        batch: images of an update.
        rates: factors on the reference learning rate.
        seeds: of initialisation and order.
    """

    epochs: int
    images: int
    batch: int = 64
    rates: tuple[float, ...] = (1.0,)
    seeds: tuple[int, ...] = (0,)


TIERS = {
    "0": Tier(15, 10_000),
    "1a": Tier(60, 60_000, rates=(0.5, 1.0, 2.0), seeds=(0, 1, 2)),
    "1b": Tier(6, 10_000, 32),
    "2": Tier(100, 1_281_167, 1024),
}


def factor(text: str) -> float:
    """An argument that multiplies.

    Raises:
        ArgumentTypeError: if it is no finite number above 0.
    """
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise ArgumentTypeError(f"expected a number above 0, got {text!r}")


def natural(text: str) -> int:
    """An argument that may be 0.

    Raises:
        ArgumentTypeError: if it is no number from 0 up.
    """
    if not text.isdecimal():
        raise ArgumentTypeError(f"expected a number from 0 up, got {text!r}")
    return int(text)


def square(text: str) -> int:
    """An argument that counts the places of a square map.

    Raises:
        ArgumentTypeError: if it is no square.
    """
    if math.isqrt(number := positive(text)) ** 2 != number:
        raise ArgumentTypeError(f"expected a square, such as 64, got {text!r}")
    return number


def rows_of(args: Namespace) -> list[Row]:
    """The rows that options ask for, controls first, without those that cannot be made, of which a line tells. One row
    stands for both rules where they make the same network.

    Raises:
        VisionattnError: if a name is of no mixer, or none can be made.
    """
    names = [name for name in list_mixers() if any(fnmatch.fnmatch(name, p) for p in args.mixers or ["*"])]
    if unknown := [p for p in args.mixers or [] if not fnmatch.filter(list_mixers(), p)]:
        raise VisionattnError(f"no mixer is called {unknown[0]}: there are {', '.join(list_mixers())}")
    names.sort(key=lambda name: CONTROLS.index(name) if name in CONTROLS else len(CONTROLS))
    found = []
    for scaffold, rule, name in product(args.scaffolds, args.rules, names):
        for variant in ("", *MIXERS[name].variants):
            row = Row(scaffold, name, variant, RULES[rule], args.head_dim)
            try:
                with torch.device("meta"):
                    row = settled(row)
            except VisionattnError as error:
                print(f"left out: {scaffold}, {row.name} ({one_line(error)})")
            else:
                found.append(row)
    if not found:
        raise VisionattnError(f"none of these mixers can be made: {', '.join(names)}")
    return list(dict.fromkeys(found))


def work(each: Run, folder: Path, args: Namespace) -> None:
    """Train one run, and write what it found, unless another sweep does."""
    device, _ = start(args)
    torch.set_flush_denormal(True)
    results, unfinished, row = Results(folder / "results.jsonl"), folder / "unfinished", each.row
    name = f"{each.tier} {row.scaffold}, {row.name}, {row.rule}, rate x{each.rate:g}, seed {each.seed}"
    with claimed(each, unfinished) as mine:
        if not mine or each.key in results.finished():
            print(f"{name}: of another sweep", flush=True)
            return
        found = train(each, unfinished, device)
        results.add({"what": "run", "run": asdict(each), "found": found, "machine": machine(device)})
        file_of(each, unfinished).unlink(missing_ok=True)
    told = f"diverged at update {found['diverged']}" if "diverged" in found else f"{100 * found['accuracy']:.2f} %"
    print(f"{name}: {told}, {found['seconds']:.0f} s", flush=True)


def sweep(runs: Sequence[Run], args: Namespace) -> None:
    """Train runs that have no results yet.

    Raises:
        VisionattnError: if some ended without.
    """
    done = Results(args.output / "results.jsonl").finished()
    left = [each for each in runs if each.key not in done]
    print(f"{len(runs) - len(left)} of {len(runs)} runs are there", flush=True)
    if not args.workers:
        for each in left:
            work(each, args.output, args)
        return
    # What a step frees is taken again by the next one.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**32))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**34))
    spawn, working, failed = multiprocessing.get_context("spawn"), {}, []
    while left or working:
        while left and len(working) < args.workers:
            each = left.pop(0)
            process = spawn.Process(target=work, args=(each, args.output, args), daemon=True)
            process.start()
            working[process.sentinel] = process, each
        for sentinel in wait(list(working)):
            process, each = working.pop(sentinel)
            process.join()
            if process.exitcode:
                failed.append(each)
    if failed:
        raise VisionattnError(f"{len(failed)} runs failed, of {', '.join(dict.fromkeys(x.row.name for x in failed))}")


def measure(rows: Sequence[Row], args: Namespace, device: torch.device, seconds: Seconds) -> None:
    """Time rows that are not timed yet."""
    torch.set_flush_denormal(True)
    results = Results(args.output / "results.jsonl")
    done = [(line["row"], list(line["found"]["tokens"])) for line in results.read() if line["what"] == "speed"]
    for row in rows:
        if (asdict(row), list(map(str, args.tokens))) in done:
            continue
        found = speed(row, args.tokens, args.rounds, device, seconds)
        about = machine(device) | {"clock": args.clock}
        results.add({"what": "speed", "row": asdict(row), "found": found, "machine": about})
        first = found["tokens"][str(args.tokens[0])]
        print(f"{row.scaffold}, {row.name}, {row.rule}: {1 / first['forward']:.0f} images/s, "
              f"{1 / first['training']:.0f} with backward", flush=True)  # fmt: skip


def show_imagenet(rows: Sequence[Row], args: Namespace) -> None:
    """Print what trains rows on ImageNet: 8 processes, 1024 images an update."""
    for row, rate, seed in product(rows, args.rates, args.seeds):
        peak = rate * 1024 * REFERENCE_RATES[args.what]
        options = [
            *("--config", "configs/bases/imagenet.yaml", "--model", f"{row.scaffold}_small"),
            *("--model_kwargs.mixer", row.mixer, "--model_kwargs.drop_path_rate", "0.1"),
            *("--epochs", str(args.epochs), "--seed", str(seed), "--precision", "bf16", "--optim.lr", f"{peak:g}"),
            *("--optim.clip_grad", "1", "--schedule.warmup_epochs", f"{args.epochs / 20:g}"),
            *("--schedule.warmup_lr", "0", "--schedule.min_lr", f"{1e-6 * peak:g}"),
            *("--data.batch_size", "128", "--data.img_size", "176", "--data.eval_img_size", "224"),
        ]
        if row.variant:
            options += ["--model_kwargs.mixer_kwargs", repr(dict(MIXERS[row.mixer].variants[row.variant]))]
        if row.rule != "equal":
            options += ["--model_kwargs.mlp_ratio", "4"]
        print("accelerate launch --num_processes 8 train.py", shlex.join(options))


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*TIERS, "speed", "report"), help="tier to train, or what else to do")
    parser.add_argument("--mixers", nargs="+", help="names or shell patterns; all if not given")
    parser.add_argument("--scaffolds", nargs="+", choices=("isotropic", "pyramid"), default=["isotropic"])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=["equal"], help="of the MLP's width")
    parser.add_argument(
        "--rates", nargs="+", type=factor, help="factors on the reference rate; of the tier if not given"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=natural, help="of initialisation and order; of the tier if not given"
    )
    parser.add_argument("--epochs", type=positive, help="of the tier if not given")
    parser.add_argument("--images", type=positive, help="of an epoch; of the tier if not given")
    parser.add_argument("--batch", type=positive, help="images of an update; of the tier if not given")
    parser.add_argument(
        "--head-dim", type=positive, default=16, help="channels of an attention head; 16 lets GQA enter"
    )
    parser.add_argument("--tokens", nargs="+", type=square, default=[64, 196], help="of an image, squares, to time")
    parser.add_argument(
        "--data", default=str(DEBIAN) if DEBIAN.is_dir() else "digits",
        help="folder of Fashion-MNIST, which torchvision downloads if it lacks them; or digits",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("runs/mixers"), help="folder of the results")
    parser.add_argument("--page", type=Path, default=Path("docs/mixers.md"), help="where the report goes")
    parser.add_argument("--workers", type=natural, default=1, help="processes; 0 to train in this one")
    add_machine(parser)
    parser.set_defaults(threads=1)
    args = parser.parse_args(argv)
    if args.what == "report":
        require("matplotlib")
        write(args.page, Results(args.output / "results.jsonl"))
        print(args.page)
        return
    if args.what != "2":
        device, seconds = start(args)
        with user_input(f"cannot write {args.output}", OSError):
            args.output.mkdir(parents=True, exist_ok=True)
    rows = rows_of(args)
    if args.what == "speed":
        measure(rows, args, device, seconds)
        return
    tier = TIERS[args.what]
    for name, value in asdict(tier).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.what == "2":
        show_imagenet(rows, args)
        return
    if args.images < args.batch:
        raise VisionattnError(
            f"{args.images} images fill no batch of {args.batch}: give more --images or a lower --batch"
        )
    budget = {"epochs": args.epochs, "images": args.images, "batch": args.batch, "data": args.data}
    sweep(
        [Run(row, args.what, rate, seed, **budget) for rate, seed, row in product(args.rates, args.seeds, rows)],
        args,
    )


if __name__ == "__main__":
    sys.exit(run(main))
