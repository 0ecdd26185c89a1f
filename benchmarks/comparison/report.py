"""The page of the comparison: a table and two pictures of what was found."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from visionattn.errors import VisionattnError, shortened, user_input
from visionattn.models.mixers import MIXERS, Place, PluggedIn

from .pictures import draw_distance, draw_time
from .training import DISTANCES, Row, Run, settled

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
CONTROLS = ("softmax", "none", "activator", "dw7")
LEVEL = 1.05
"""Ratio of two times up to which they count as equal."""


def _setting(run: dict) -> tuple[bool, int, int, int]:
    """What a run was trained with, so that the largest comes last."""
    return run["data"] != "digits", run["epochs"] * run["images"], run["epochs"], run["batch"]


def _told(run: dict) -> str:
    data = "digits" if run["data"] == "digits" else "Fashion-MNIST"
    return f"{data}, {run['epochs']} epochs of {run['images']} images in batches of {run['batch']}"


class Results:
    """A file of one JSON object a line, of everything that is finished. Several processes may add to it.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """What is there. A line that a crash of the machine cut is passed over.

        Raises:
            VisionattnError: if the file cannot be read, or a line is of something else.
        """
        found = []
        with user_input(f"cannot read {self.path}", OSError, UnicodeError):
            lines = self.path.read_text().splitlines() if self.path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                each = json.loads(line)
            except json.JSONDecodeError:
                continue
            try:
                row = Run.of(each["run"]).row if each["what"] == "run" else Row(**each["row"])
                known = {"machine", "found"} <= each.keys() and row.variant in {"", *MIXERS[row.mixer].variants}
            except (LookupError, TypeError, AttributeError):
                known = False
            if not known:
                told = f"expected a result of this version, got {shortened(line, 60)}"
                raise VisionattnError(f"{self.path}, line {number}: {told}")
            found.append(each)
        return found

    def finished(self) -> set[str]:
        """Keys of the runs that are there."""
        return {Run.of(line["run"]).key for line in self.read() if line["what"] == "run"}

    def add(self, what: dict[str, Any]) -> None:
        """Add a line, whole: in one write, after a line break if the last one is cut."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        bad = {key for key, each in what["found"].items() if isinstance(each, float) and not math.isfinite(each)}
        line = json.dumps(what | {"found": what["found"] | dict.fromkeys(bad)}) + "\n"  # JSON lacks nan
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                line = "\n" + line
            os.write(file, line.encode())
        finally:
            os.close(file)


class Found:
    """What was found of rows.

    Args:
        lines: of `Results`; the last one of a kind counts.

    Attributes:
        tiers: those that were run by name, which says with what setting if there were several; the largest comes last.
    """

    def __init__(self, lines: Iterable[dict[str, Any]]) -> None:
        self.runs: dict[str, dict] = {}
        self.speeds: dict[Row, dict] = {}
        self.machines: dict[str, list[dict]] = {}
        for line in lines:
            self.machines.setdefault(line["what"], []).append(line["machine"])
            if line["what"] == "speed":
                self.speeds[Row(**line["row"])] = line["found"]
            else:
                self.runs[Run.of(line["run"]).key] = line
        settings: dict[str, dict[tuple, str]] = {}
        for line in self.runs.values():
            settings.setdefault(line["run"]["tier"], {})[_setting(line["run"])] = _told(line["run"])
        self.tiers = {
            f"{tier} ({each[setting]})" if len(each) > 1 else tier: (tier, setting)
            for tier, each in sorted(settings.items())
            for setting in sorted(each)
        }
        rows = {replace(Row(**line["run"]["row"]), rule="equal") for line in self.runs.values()}
        rows |= {replace(row, rule="equal") for row in self.speeds}
        known = list(MIXERS)
        order = {name: i for i, name in enumerate([*CONTROLS, *(name for name in known if name not in CONTROLS)])}
        self.rows = sorted(rows, key=lambda row: (row.scaffold, row.head_dim, order[row.mixer], row.variant))

    def of(self, row: Row, tier: str) -> dict[float, list[dict]]:
        """What the runs of a row found, by rate, in one of `tiers`."""
        row = settled(row)
        found: dict[float, list[dict]] = {}
        for run, each in ((x["run"], x["found"]) for x in self.runs.values()):
            if Row(**run["row"]) == row and (run["tier"], _setting(run)) == self.tiers[tier]:
                found.setdefault(run["rate"], []).append(each)
        return found

    def accuracies(self, row: Row, tier: str, best: bool = False) -> tuple[float | None, list[float]]:
        """The rate, and the accuracies of its seeds in percent, those that did not diverge: rate 1 or the best one."""
        by_rate = {
            rate: [100 * x["accuracy"] for x in found if "accuracy" in x] for rate, found in self.of(row, tier).items()
        }
        by_rate = {rate: values for rate, values in by_rate.items() if values}
        if not by_rate:
            return None, []
        rate = max(by_rate, key=lambda rate: fmean(by_rate[rate])) if best or 1.0 not in by_rate else 1.0
        return rate, by_rate[rate]

    def milliseconds(self, row: Row) -> float | None:
        """Of forward and backward for an image at the fewest tokens, in terms of softmax attention's in its turns, so
        that it does not matter when each was measured."""
        if row not in self.speeds:
            return None
        first = next(iter(self.speeds[row]["tokens"].values()))
        alike = [x for each, x in self.speeds.items() if (each.scaffold, each.head_dim) == (row.scaffold, row.head_dim)]
        usual = median(next(iter(x["tokens"].values()))["softmax_training"] for x in alike)
        return 1e3 * usual * first["training"] / first["softmax_training"]

    def against(self, row: Row, other: Row, tier: str) -> str:
        """How a row's accuracy is to another's at the shared rate, by their deviation over seeds, those of the other
        standing in where there is one seed: "better", "worse" or "tie"; "" if nothing is known."""
        mine, theirs = self.accuracies(row, tier)[1], self.accuracies(other, tier)[1]
        spread = [stdev(values) ** 2 for values in (mine, theirs) if len(values) > 1]
        if not mine or not theirs or not spread:
            return ""
        difference = fmean(mine) - fmean(theirs)
        if abs(difference) < 2 * fmean(spread) ** 0.5:
            return "tie"
        return "better" if difference > 0 else "worse"

    def verdict(self, row: Row, tier: str) -> str:
        """Against softmax attention: better or worse where both rules of parameters agree, and better only if it takes
        no longer."""
        softmax = replace(row, mixer="softmax", variant="")
        each = [self.against(replace(row, rule=rule), replace(softmax, rule=rule), tier) for rule in ("equal", "mlp 4")]
        if row == softmax or "" in each:
            return ""
        if each[0] != each[1]:
            return "tie"
        mine, theirs = self.milliseconds(row), self.milliseconds(softmax)
        if each[0] == "better" and (mine is None or theirs is None or mine > LEVEL * theirs):
            return "better, but slower"
        return each[0]


def host(row: Row) -> Row | None:
    """Of a gate, the row of what it is plugged into."""
    layer, kwargs = MIXERS[row.mixer].layer(Place(6))
    return replace(row, mixer=kwargs["host"], variant="") if layer is PluggedIn else None


def columns(found: Found, row: Row) -> dict[str, str]:
    """Cells of a row by head."""
    mixer, four = MIXERS[row.mixer], replace(row, rule="mlp 4")
    cells = {"scaffold": row.scaffold, "mixer": row.name}
    speed, other = found.speeds.get(row), found.speeds.get(settled(four))
    if speed:
        cells["parameters, M (block, total: deviation)"] = (
            f"{speed['parameters'] / 1e6:.3f} ({speed['block_deviation']:+.1%}, {speed['deviation']:+.1%})"
        )
    if other:
        cells["MLP 4: parameters, M"] = f"{other['parameters'] / 1e6:.3f}"
    for number, x in (speed or {"tokens": {}})["tokens"].items():
        cells[f"N = {number}: MMACs"] = f"{x['macs'] / 1e6:.1f}"
        cells[f"N = {number}: images/s, forward / with backward"] = f"{1 / x['forward']:.0f} / {1 / x['training']:.0f}"
        cells[f"N = {number}: of softmax's time"] = (
            f"{x['forward'] / x['softmax_forward']:.2f} / {x['training'] / x['softmax_training']:.2f}"
        )
        cells[f"N = {number}: MiB an image"] = f"{x['forward_memory'] / 2**20:.2f} / {x['training_memory'] / 2**20:.2f}"
    if speed and speed["forward_exponent"] is not None:
        cells["exponent of time"] = f"{speed['forward_exponent']:.2f} / {speed['training_exponent']:.2f}"
    diverged = 0
    for tier in found.tiers:
        for rule, each in (("equal", row), ("MLP 4", four)):
            head = f"tier {tier}, {rule}"
            if (values := found.accuracies(each, tier))[1]:
                cells[f"{head}: accuracy"] = shown(*values)
                if len(found.of(each, tier)) > 1:
                    cells[f"{head}: at the best rate"] = shown(*found.accuracies(each, tier, best=True), told=True)
            if settled(each) == each:
                diverged += sum("diverged" in x for same in found.of(each, tier).values() for x in same)
        own = [x for x in found.of(row, tier).get(1.0, []) if "accuracy" in x]
        if own:
            x = own[0]
            cells[f"tier {tier}: loss at 10, 50, 100 %"] = ", ".join(f"{loss:.3f}" for loss in x["losses"])
            if "x2" in x:
                mark = " (resized)" if mixer.fixed else ""
                cells[f"tier {tier}: change at 1.5x, 2x"] = f"{100 * x['x1.5']:+.1f}, {100 * x['x2']:+.1f}{mark}"
            if "by_distance" in x:
                cells[f"tier {tier}: decided"] = f"{x['decided']:.0%}"
                heads = "-".join(map(str, DISTANCES))
                cells[f"tier {tier}: by distance, {heads} px"] = ", ".join(f"{100 * v:.0f}" for v in x["by_distance"])
            cells[f"tier {tier}: change in bfloat16"] = f"{100 * x['bfloat16']:+.1f}"
            if x["batch"] is not None:
                cells[f"tier {tier}: change with the batch"] = f"{x['batch']:.0e}"
            if x.get("reach") is not None:
                cells[f"tier {tier}: gradient beyond 7 x 7"] = f"{max(0.0, x['reach']):.0%}"
            if x["entropy"]:
                cells[f"tier {tier}: entropy by layer, nats"] = ", ".join(f"{v:.1f}" for v in x["entropy"])
        if found.verdict(row, tier):
            cells[f"tier {tier}: against softmax"] = found.verdict(row, tier)
        plain, mine = host(row), found.accuracies(row, tier)[1]
        if plain and mine and (theirs := found.accuracies(plain, tier)[1]) and found.milliseconds(row) is not None:
            longer = found.milliseconds(row) - (found.milliseconds(plain) or 0)
            gain = fmean(mine) - fmean(theirs)
            cells[f"tier {tier}: gain over the host"] = f"{gain:+.1f} for {longer:+.2f} ms"
    special = [mixer.init and f"start: {mixer.init}", mixer.remark, mixer.fixed and "fixed number of tokens"]
    return cells | {"diverged": str(diverged), "remarks": "; ".join(filter(None, special))}


def shown(rate: float | None, values: Sequence[float], told: bool = False) -> str:
    """Mean and deviation of accuracies."""
    deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{fmean(values):.1f}{deviation}" + (f" (x{rate:g})" if told or rate != 1 else "")


def merged(rows: Iterable[Iterable[str]]) -> list[str]:
    """The heads of all rows, each after what it comes after in a row."""
    heads: list[str] = []
    for row in rows:
        place = 0
        for head in row:
            if head not in heads:
                heads.insert(place, head)
            place = heads.index(head) + 1
    return heads


def about(found: Found) -> str:
    """On what machines, with what versions and when; how much each tier was trained."""
    told = []
    for what, machines in found.machines.items():
        keys = [key for key in machines[0] if key != "date"]
        each = dict.fromkeys(", ".join(f"{key} {machine[key]}" for key in keys) for machine in machines)
        dates = sorted({machine["date"] for machine in machines})
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        told.append(f"{'Speed' if what == 'speed' else 'Training'}: {'; '.join(each)}, {when}.")
    budgets: dict[str, set] = {}
    for line in found.runs.values():
        run = line["run"]
        budgets.setdefault(f"{_told(run)}, {run['row']['head_dim']} channels a head", set()).add(run["tier"])
    return " ".join(told + [f"Tier {', '.join(sorted(tiers))}: {text}." for text, tiers in budgets.items()])


def write(page: Path, results: Results) -> None:
    """Put what was found into a page, between its marks, and the pictures beside it.

    Raises:
        VisionattnError: if there is nothing, or the page has no marks or cannot be written.
    """
    if page.is_dir() or not page.parent.is_dir():
        raise VisionattnError(f"cannot write {page}: expected a file in a folder that is there")
    found = Found(results.read())
    if not found.rows:
        raise VisionattnError(f"{results.path} holds no results: train first")
    with user_input(f"cannot read {page}", OSError, UnicodeError):
        text = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    if BEGIN not in text or END not in text:
        raise VisionattnError(f"{page} lacks the lines {BEGIN} and {END}, between which the results go")
    rows = [columns(found, row) for row in found.rows]
    heads = merged(rows)
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    lines += [f"| {' | '.join(row.get(head, '') for head in heads)} |" for row in rows]
    parts = [about(found), "\n".join(lines)]
    for name, draw in (("time", draw_time), ("distance", draw_distance)):
        path = page.with_name(f"{page.stem}_{name}.png")
        if draw(found, path):
            parts.append(f"![Accuracy against {name}]({path.name})")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    page.write_text("\n\n".join([before + BEGIN, *parts, END + after]))
