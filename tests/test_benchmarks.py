"""The benchmarks run, say what is wrong in one line, and measure what they say."""

import json
import runpy
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from visionattn.measure import peak_memory

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs a script of the folder: exit code, what it printed and what it complained of."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()

    def run(name: str, *argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *argv])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        return end.value.code or 0, *capsys.readouterr()

    yield run
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_and_misspelt_options(script, name):
    code, out, _ = script(name, "--help")
    assert code == 0 and "usage" in out
    code, _, err = script(name, "--no-such-option")
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith("error: ")


@pytest.mark.parametrize(
    ("name", "argv", "told"),
    [
        ("throughput", ["van_b00"], "unknown model van_b00"),
        ("throughput", ["vans_*"], "no model is called vans_*"),
        ("throughput", ["test_van", "--against", "keras"], "--against takes timm, transformers, reference"),
        ("throughput", ["test_van", "--against", "timm"], "timm has none of test_van"),
        ("throughput", ["test_van", "--batch", "0"], "from 1 up"),
        ("throughput", ["test_van", "--device", "nowhere"], "cannot use device nowhere"),
        ("throughput", ["test_van", "--compile-mode", "default"], "give both"),
        ("throughput", ["test_van", "--int8", "--dtype", "bfloat16"], "--int8 is for float32 on a CPU"),
        ("throughput", ["test_van", "--int8", "--mode", "training"], "are for inference"),
        ("throughput", ["test_van", "--autocast"], "give bfloat16 or float16"),
        ("throughput", ["test_van", "--json", "nowhere/x.json"], "a file in a folder that is there"),
        ("throughput", ["test_van", "--json", str(FOLDER)], "a file in a folder that is there"),
        ("scaling", ["SelfAttention", "--plot", str(FOLDER)], "ends in .png, .pdf, .svg"),
        ("scaling", ["SelfAttention", "--plot", "nowhere/x.png"], "a file in a folder that is there"),
        ("scaling", ["CogAttention"], "or one of the blocks AttentiveConv2d; "),
        ("scaling", ["SelfAttention", "--sizes", "8", "1000000"], "more memory than there is"),
        ("neighborhood_attention", ["--size", "1000000"], "more memory than there is"),
        ("scaling", ["SelfAtention"], "unknown model SelfAtention"),
        ("scaling", ["SelfAttention", "--sizes", "14"], "two sizes"),
        ("neighborhood_attention", ["--size", "100"], "size of 224 or more"),
        ("dynamic_conv", ["--batch", "0"], "from 1 up"),
        ("mixers", ["0", "--mixers", "softmacks"], "no mixer is called softmacks"),
        ("mixers", ["2", "--mixers", "gqa", "--head-dim", "96"], "none of these mixers can be made: gqa"),
        ("mixers", ["report", "--output", "nowhere"], "holds no results"),
        ("mixers", ["report", "--page", "nowhere/x.md"], "cannot write nowhere/x.md"),
        ("mixers", ["0", "--rates", "-1"], "a number above 0, got '-1'"),
        ("mixers", ["0", "--rates", "nan"], "a number above 0, got 'nan'"),
        ("mixers", ["0", "--seeds", "-1"], "from 0 up"),
        ("mixers", ["0", "--workers", "-1"], "from 0 up"),
        ("mixers", ["0", "--device", "nowhere", "--output", str(FOLDER)], "cannot use device nowhere"),
        ("mixers", ["0", "--output", __file__], f"cannot write {__file__}"),
        ("mixers", ["0", "--images", "63", "--mixers", "none", "--output", str(FOLDER)], "fill no batch of 64"),
        ("mixers", ["speed", "--tokens", "65"], "a square"),
    ],
)
def test_requests_that_cannot_be_met(script, name, argv, told):
    code, _, err = script(name, *argv)
    assert code == 2 and told in err and len(err.splitlines()) == 1


def test_throughput_alone(script, tmp_path):
    options = ["--batch", "2", "--rounds", "2", "--threads", "1", "--json", str(tmp_path / "found.json")]
    code, out, _ = script("throughput", "test_van", *options, "--fuse")
    assert code == 0 and out.count("inference") == 1 and "training" not in out
    code, out, _ = script("throughput", "test_van", *options, "--clock", "cpu")
    assert code == 0 and out.count("test_van") == 2
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["mode"] for row in rows] == ["inference", "training"]
    assert rows[1]["memory"][0] > 0 and len(rows[0]["times"][0]) == 2


def test_throughput_of_what_cannot_be_compared(script):
    """timm cuts off what patches do not cover, and takes no map that windows do not divide."""
    options = ["--batch", "1", "--rounds", "1", "--mode", "inference", "--against", "timm"]
    code, out, err = script("throughput", "convit_tiny", "--size", "40", *options)
    assert code == 1 and "another function" in err and "geometric" not in out
    code, out, err = script("throughput", "halonet26t", "--size", "96", *options)
    assert code == 1 and len(err.splitlines()) == 1 and "AssertionError at " in err and "geometric" not in out


@pytest.mark.parametrize(("name", "peer"), [("convit_tiny", "timm"), ("patnet_t0", "reference")])
def test_throughput_in_turns(script, tmp_path, name, peer):
    """The peer is not ours, and reads the same weights."""
    options = ["--batch", "2", "--size", "64", "--rounds", "1", "--threads", "1", "--layout", "contiguous"]
    code, out, err = script(
        "throughput", name, *options, "--against", "timm,reference", "--json", str(tmp_path / "found.json")
    )
    assert code == 0, err
    inference, training = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert inference["peer"] == peer and inference["difference"] < 1e-4
    assert training["memory_ratio"] > 0 and "geometric means" in out


def test_layouts_are_of_weights_with_four_dimensions(monkeypatch):
    """A peer's tables may have more."""
    monkeypatch.syspath_prepend(str(FOLDER))
    throughput, peer = import_module("throughput"), nn.Conv2d(3, 4, 3)
    peer.table = nn.Parameter(torch.zeros(1, 1, 2, 3, 1))
    side = throughput.Side(peer, throughput.parse([]), True, torch.randn(1, 3, 8, 8), torch.zeros(1))
    for layout in ("channels_last", "contiguous"):
        side.use(layout)
        assert peer.weight.is_contiguous(memory_format=throughput.LAYOUTS[layout])


def test_scaling(script, tmp_path):
    options = ["--sizes", "14", "28", "--rounds", "1", "--threads", "1", "--plot", str(tmp_path / "scaling.png")]
    code, out, err = script("scaling", "WindowAttention2d", "GatedPositionalSelfAttention", *options)
    assert code == 0, err
    assert "WindowAttention2d" in out and (tmp_path / "scaling.png").stat().st_size


def test_a_comparison_goes_on_where_it_was_stopped(script, tmp_path, monkeypatch):
    """It ends with the same bits, and what is finished is not trained again; the page has all of it."""
    from comparison import training

    monkeypatch.setattr(training, "EXAMPLES", 16)
    calls = []
    more = ["--mixers", "softmax", "--data", "digits", "--epochs", "2", "--images", "32", "--batch", "16"]
    sweep = ["0", *more, "--workers", "0", "--output"]
    assert script("mixers", *sweep, str(tmp_path / "whole"))[0] == 0

    def stop():
        calls.append(None)
        if len(calls) == 4:  # in the second epoch
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "stop_if_alone", stop)
    broken = tmp_path / "broken"
    assert script("mixers", *sweep, str(broken))[0] == 130
    assert not (broken / "results.jsonl").exists() and len(list((broken / "unfinished").iterdir())) == 1
    for trained in (6, 6):  # the second epoch anew, then nothing
        assert script("mixers", *sweep, str(broken))[0] == 0
        assert len(calls) == trained and not list((broken / "unfinished").iterdir())
    found = [json.loads((tmp_path / name / "results.jsonl").read_text())["found"] for name in ("whole", "broken")]
    for each in found:
        del each["seconds"]
    assert found[0] == found[1]
    with (broken / "results.jsonl").open("a") as file:
        file.write('{"what": "run", "ru')  # as a crash of the machine leaves it
    code, _, err = script("mixers", "report", "--output", str(broken), "--page", str(tmp_path / "page.md"))
    assert code == 0, err
    assert f"| {100 * found[0]['accuracy']:.1f} |" in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize("line", ["[1, 2]", "{}", '{"what": "run"}', '{"what": "speed", "row": {"scaffold": 1}}'])
def test_what_is_no_result_is_told(script, tmp_path, line):
    (tmp_path / "results.jsonl").write_text(f"\n{line}\n")
    code, _, err = script("mixers", "report", "--output", str(tmp_path), "--page", str(tmp_path / "page.md"))
    assert code == 2 and "results.jsonl, line 2: expected a result" in err and len(err.splitlines()) == 1


def test_a_run_of_one_update_is_json_and_is_trained_by_one_sweep(script, tmp_path, monkeypatch, recwarn):
    from comparison import training
    from comparison.training import Row, Run, claimed

    monkeypatch.setattr(training, "EXAMPLES", 16)
    setting = {"epochs": 1, "images": 16, "batch": 16, "data": "digits"}
    options = [part for name, value in setting.items() for part in (f"--{name}", str(value))]
    sweep = ["0", "--mixers", "none", *options, "--workers", "0", "--output", str(tmp_path)]
    with claimed(Run(Row("isotropic", "none"), "0", 1.0, 0, **setting), tmp_path / "unfinished") as mine:
        assert mine and "of another sweep" in script("mixers", *sweep)[1]
    assert not (tmp_path / "results.jsonl").exists()
    assert script("mixers", *sweep)[0] == 0 and not recwarn.list
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == 1 and len(json.loads(lines[0], parse_constant=pytest.fail)["found"]["losses"]) == 3


def test_same_or_different_does_not_leak(monkeypatch):
    """Neither what the items are, one by one, nor where, tells the answer."""
    monkeypatch.syspath_prepend(str(FOLDER))
    from comparison.tasks import CANVAS, CLASSES, ITEM, STEP, SameOrDifferent, load_items

    train, test = load_items("digits")
    task = SameOrDifferent(train, test, 4000, epochs=1)
    pairs = [task.pair(False, 0, 1, i) for i in range(len(task))]
    items, classes, places = (np.array(each) for each in zip(*pairs, strict=True))
    same = task.batch(0, 1, range(len(task)))[1].numpy()
    assert (np.array(CLASSES)[classes] == train.labels[items]).all()
    assert ((classes[:, 0] == classes[:, 1]) == same).all() and same.mean() == 0.5
    assert ((abs(places[:, 0] - places[:, 1]) >= ITEM).any(1)).all()
    assert places.max() == CANVAS - ITEM and not (places % STEP).any()
    for which in (0, 1):
        shares = [np.bincount(classes[same == s, which]) / 2000 for s in (0, 1)]
        assert abs(shares[0] - shares[1]).max() < 0.03 and abs(shares[0] - 1 / len(shares[0])).max() < 0.03
        assert abs(places[same == 1, which].mean(0) - places[same == 0, which].mean(0)).max() < 2
    again = task.batch(0, 1, [5, 7])[0]
    assert torch.equal(again[1], task.batch(0, 1, [7])[0][0]) and not torch.equal(again, task.batch(0, 2, [5, 7])[0])


def test_what_is_not_decided_counts_one_half(monkeypatch):
    """Sums over items tell nothing on average, but their sign may be right for two pairs in three, or for one."""
    monkeypatch.syspath_prepend(str(FOLDER))
    from comparison.tasks import CLASSES, SameOrDifferent, load_items

    task, count = SameOrDifferent(*load_items("digits"), 2, epochs=1), len(CLASSES)
    pairs = np.array([(a, b) for a in range(count) for b in range(count)])
    weights = np.where(pairs[:, 0] == pairs[:, 1], 0.5 / count, 0.5 / (count * (count - 1)))
    labels = torch.from_numpy((pairs[:, 0] == pairs[:, 1]).astype(np.int64))
    sums = torch.from_numpy(np.array([-1.0, -1.0, 1.0, 1.0])[pairs].sum(1) - 0.5)  # what places say of their items
    assert float(sums @ (weights * np.where(labels, 1, -1))) == pytest.approx(0, abs=1e-12)
    for scale, expected in ((1.0, 2 / 3), (-1.0, 1 / 3), (0.01, 0.5), (-0.01, 0.5)):
        logits = torch.stack([torch.zeros_like(sums), scale * sums], 1)
        assert float(task.credit(logits, labels) @ weights) == pytest.approx(expected)


def test_a_difference_below_two_deviations_is_a_tie(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from comparison.report import Found
    from comparison.training import Row

    def line(mixer, seed, accuracy):
        run = {"row": asdict(Row("isotropic", mixer)), "tier": "0", "rate": 1.0, "seed": seed}
        run |= {"epochs": 1, "images": 1, "batch": 1, "data": "digits"}
        return {"what": "run", "run": run, "found": {"accuracy": accuracy}, "machine": {}}

    softmax = [line("softmax", seed, 0.80 + 0.01 * seed) for seed in (0, 1, 2)]  # 81 +- 1
    found = Found([*softmax, line("flow", 0, 0.825), line("agent", 0, 0.835), line("halo", 0, 0.785)])
    each = {row.mixer: found.against(row, Row("isotropic", "softmax"), "0") for row in found.rows}
    assert each["flow"] == "tie" and each["agent"] == "better" and each["halo"] == "worse"
    assert found.verdict(Row("isotropic", "agent"), "0") == ""  # which is not known of the other rule


def test_every_setting_has_columns_of_its_own(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from comparison.report import Found, columns
    from comparison.training import Row

    def line(mixer, images, accuracy):
        run = {"row": asdict(Row("isotropic", mixer)), "tier": "0", "rate": 1.0, "seed": 0}
        run |= {"epochs": 1, "images": images, "batch": 1, "data": "digits"}
        found = {"accuracy": accuracy, "losses": [], "bfloat16": 0.0, "batch": None, "entropy": []}
        return {"what": "run", "run": run, "found": found, "machine": {}}

    found = Found([line("flow", 5000, 0.9), line("flow", 200, 0.7), line("none", 200, 0.6)])
    each = {row.mixer: columns(found, row) for row in found.rows}
    few, many = (f"tier 0 (digits, 1 epochs of {n} images in batches of 1), equal: accuracy" for n in (200, 5000))
    assert each["flow"][few] == "70.0" and each["flow"][many] == "90.0"
    assert each["none"][few] == "60.0" and many not in each["none"]


@pytest.mark.slow
def test_the_page_tells_the_results_that_are_kept(script, tmp_path):
    """docs/mixers.md is of benchmarks/mixers_results, with both pictures."""
    page, kept = tmp_path / "mixers.md", FOLDER.parent / "docs" / "mixers.md"
    page.write_text(kept.read_text())
    assert script("mixers", "report", "--output", str(FOLDER / "mixers_results"), "--page", str(page))[0] == 0
    assert page.read_text() == kept.read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"mixers.md", "mixers_time.png", "mixers_distance.png"}


def test_an_axis_leaves_out_what_lies_far_below(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from comparison.pictures import _least

    assert _least([50.0]) == 50 and _least([70.0, 80, 81, 82]) == 70  # not that far
    assert _least([10.0, 80, 81, 82, 83, 84]) == pytest.approx(80.25 - 2 * 2.5)


def test_memory_is_what_a_step_holds_at_once():
    """Four layers of 1 MiB maps whose outputs are kept for the backward pass."""
    layers = [layer for _ in range(4) for layer in (nn.Linear(512, 512, bias=False), nn.Sigmoid())]
    model, x = nn.Sequential(*layers), torch.randn(512, 512)

    def step():
        model(x).sum().backward()
        model.zero_grad()

    step()
    # Backward of the last product: what three sigmoids gave, a gradient in, a gradient out, and that of a weight.
    assert peak_memory(step, torch.device("cpu")) == pytest.approx(6 * 2**20, rel=1e-3)
