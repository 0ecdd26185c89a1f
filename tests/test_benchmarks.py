"""The benchmarks run, say what is wrong in one line, and measure what they say."""

import json
import runpy
import sys
from pathlib import Path

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
        ("scaling", ["SelfAtention"], "unknown model SelfAtention"),
        ("scaling", ["SelfAttention", "--sizes", "14"], "two sizes"),
        ("neighborhood_attention", ["--size", "100"], "size of 224 or more"),
        ("dynamic_conv", ["--batch", "0"], "from 1 up"),
    ],
)
def test_requests_that_cannot_be_met(script, name, argv, told):
    code, _, err = script(name, *argv)
    assert code == 2 and told in err and len(err.splitlines()) == 1


def test_throughput_alone(script, tmp_path):
    options = ["--batch", "2", "--rounds", "2", "--threads", "1", "--json", str(tmp_path / "found.json")]
    code, out, _ = script("throughput", "test_van", *options, "--clock", "cpu", "--fuse")
    assert code == 0 and out.count("test_van") == 2
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["mode"] for row in rows] == ["inference", "training"]
    assert rows[1]["memory"][0] > 0 and len(rows[0]["times"][0]) == 2


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


def test_scaling(script, tmp_path):
    options = ["--sizes", "14", "28", "--rounds", "1", "--threads", "1", "--plot", str(tmp_path / "scaling.png")]
    code, out, err = script("scaling", "WindowAttention2d", "GatedPositionalSelfAttention", *options)
    assert code == 0, err
    assert "WindowAttention2d" in out and (tmp_path / "scaling.png").stat().st_size


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
