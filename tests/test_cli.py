"""The command line: one parser, one line for what is wrong, results on stdout alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import visionattn
from visionattn.cli import commands, main
from visionattn.cli.catalog import COLUMNS
from visionattn.recipes import folder, list_recipes
from visionattn.training.checkpoint import save_checkpoint
from visionattn.weights.files import DESCRIPTION, write_checkpoint


def told(capsys: pytest.CaptureFixture, *argv: str) -> str:
    assert main(list(argv)) == 0
    return capsys.readouterr().out


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and all(name in out for name in commands())


@pytest.mark.parametrize("name", commands())
def test_help_of_a_command(capsys, name):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0 and "usage: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give a command: list, info"),
        (["lisst"], "invalid choice: 'lisst'"),
        (["list", "--max_params", "many"], "option max_params: Expected a float. Got value: many"),
        (["list", "--columns", "name,colour"], "there is no column colour; there are name"),
        (["info"], "give NAME (see visionattn info --help)"),
        (["predict"], "give IMAGE (see visionattn predict --help)"),
        (["plot", "nowhere", "--output", __file__ + ".png"], "nowhere is not a run folder"),
        (["info", "van_b0", "--jsn"], "unrecognized arguments: --jsn"),
        (["compare", "van_b0"], "two models or more"),
        (["benchmark", "test_van", "--batch", "0"], "from 1 up"),
        (["benchmark", "test_van", "--threads", "100000"], "expected --threads of at most "),
        (["benchmark", "test_van", "--device", "nowhere"], "cannot use device nowhere"),
        (["benchmark", "test_van", "--int8", "--compile"], "--int8 is for inference"),
        (["train", "--config", "recipe:dinat_tin"], "did you mean classification/dinat_tiny"),
        (["train", "--optim.lrr", "1"], "did you mean --optim.lr"),
        (["train", "--epoks", "1"], "did you mean --epochs?"),
        (["--quiet", "train", "--optim.eps", "-2"], "option optim.eps: expected a number above 0, got -2"),
        (["list", "--min_params", "5", "--max_params", "3"], "--min_params 5 is above --max_params 3"),
        (["list", "--table", "--format", "json"], "--table is a format of its own"),
        (["train", "--config", "recipe:zzz"], "there is no recipe zzz: there are "),
        (["completion", "fish"], "invalid choice: 'fish'"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(capsys, argv, message):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert message in err and len(err.splitlines()) == 1 and not out


def test_list_filters_and_sorts(capsys):
    chosen = ["list", "--family", "dinat", "--max_params", "30", "--min_top1", "80", "--licence", "mit"]
    rows = json.loads(told(capsys, *chosen, "--sort", "top1", "--descending", "--format", "json"))
    names = [row["name"] for row in rows]
    assert "dinat_mini" in names and "dinat_small" not in names
    figures = [row["top1"] for row in rows]
    assert figures == sorted(figures, reverse=True) and min(figures) >= 80
    assert told(capsys, *chosen).split() == sorted(names)  # names alone where there is no terminal
    table = told(capsys, "list", "van_*", "--format", "markdown", "--columns", ",".join(COLUMNS)).splitlines()
    assert table[0].count("|") == len(COLUMNS) + 1 and len(table) == 2 + len(visionattn.list_models("van_*"))
    detectors = told(capsys, "list", "--task", "detection").split()
    assert "focalnet_tiny_lrf" in detectors and "attnet_t1" not in detectors


@pytest.mark.parametrize("name", ["van_b0", "convit_tiny", "dinat_mini", "halonet26t", "test_sparsifiner"])
def test_info_adds_up(capsys, name):
    """The stages have all parameters but those of tokens and positions, and all multiply-adds."""
    facts = json.loads(told(capsys, "info", name, "--format", "json"))
    assert sum(stage["gmacs"] for stage in facts["stages"]) == pytest.approx(facts["gmacs"], rel=2e-3)
    params = sum(stage["params"] for stage in facts["stages"])
    assert 0.96 * facts["parameters"] <= params <= facts["parameters"]
    assert all(f"eprint = {{{paper['arxiv']}}}" in facts["bibtex"][i] for i, paper in enumerate(facts["papers"]))
    text = told(capsys, "info", name)
    assert facts["stages"][-1]["output"] in text and "licence" in text


def test_arguments_of_a_model(capsys, tmp_path):
    """A mixer in a skeleton can be asked for wherever a name can; a checkpoint says its own, channels too."""
    kwargs = ["--kwargs", "mixer=agent", "in_chans=1", "num_classes=7", "depth=1"]
    facts = json.loads(told(capsys, "info", "isotropic_xsmall", "--format", "json", *kwargs, "img_size=64"))
    model = visionattn.create_model("isotropic_xsmall", mixer="agent", in_chans=1, num_classes=7, depth=1, img_size=64)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters()) and facts["input"] == [1, 64, 64]
    assert facts["gmacs"] == pytest.approx(sum(stage["gmacs"] for stage in facts["stages"]), rel=1e-3)
    assert "mixer agent, drop_path_rate 0.1" in told(capsys, "info", "isotropic_small", *kwargs)
    image = tmp_path / "image.png"
    Image.new("L", (40, 40), 90).save(image)
    explained = ["explain", str(image), "--model", "test_isotropic", *kwargs, "--output", str(tmp_path / "explained")]
    assert "image" in told(capsys, *explained, "--method", "attention")
    exported = ["export", "test_isotropic", str(tmp_path / "a.pt2"), "--format", "torch", "--size", "64"]
    assert "test_isotropic" in told(capsys, *exported, *kwargs)
    kept = tmp_path / "kept.safetensors"
    entries = {"task": "classification", "model": "test_van", "model_kwargs": {"num_classes": 7, "in_chans": 1}}
    weights = visionattn.create_model("test_van", num_classes=7, in_chans=1).state_dict()
    write_checkpoint(kept, weights, {DESCRIPTION: json.dumps(entries)})
    assert json.loads(told(capsys, "benchmark", str(kept), "--rounds", "1", "--format", "json"))["models"][0]["ms"] > 0
    for command in (["explain", str(image), "--checkpoint", str(kept)], ["export", str(kept), "x.onnx"]):
        assert main([*command, *kwargs]) == 2 and "--kwargs" in capsys.readouterr().err


def test_nothing_is_listed(capsys):
    assert main(["list", "zzz*"]) == 0
    out, err = capsys.readouterr()
    assert not out and err == "no model is like that\n"


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A checkpoint of a model that has a layout for transformers, an image and a run."""
    folder, kwargs = tmp_path_factory.mktemp("kept"), {"num_classes": 5, "in_chans": 1, "depths": [1, 1, 1, 1]}
    model = visionattn.create_model("test_focalnet", **kwargs)
    entries = {"task": "classification", "model": "test_focalnet", "model_kwargs": kwargs}
    write_checkpoint(folder / "kept.safetensors", model.state_dict(), {DESCRIPTION: json.dumps(entries)})
    Image.new("L", (40, 40), 90).save(folder / "a.png")
    (folder / "run").mkdir()
    (folder / "run" / "metrics.csv").write_text("epoch,train_loss,val_top1\n1,2.0,50.0\n2,1.0,60.0\n")
    return folder


WRITERS = {
    "convert": (["convert", "kept.safetensors", "out/a.safetensors"], "a.safetensors"),
    "to a file": (["convert", "kept.safetensors", "out/a.pth", "--to", "official"], "a.pth"),
    "to a folder": (["convert", "kept.safetensors", "out", "--to", "hf"], "config.json"),
    "explain": (["explain", "a.png", "--checkpoint", "kept.safetensors", "--output", "out"], "a-gradcam.png"),
    "predict": (["predict", "a.png", "--checkpoint", "kept.safetensors", "--json", "out/a.json"], "a.json"),
    "plot": (["plot", "run", "--output", "out/a.png"], "a.png"),
    "export": (["export", "kept.safetensors", "out/a.pt2", "--format", "torch", "--size", "64"], "a.pt2"),
}


@pytest.mark.parametrize("name, links", [*((name, True) for name in WRITERS), ("plot", False)])
def test_what_appears_meanwhile_is_not_written_over(kept, tmp_path, monkeypatch, capsys, name, links):
    """By a command that was not asked to, and only by that one; also where there are no links."""
    argv, written = WRITERS[name]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    (tmp_path / "out").mkdir()
    precious, sync = tmp_path / "out" / written, os.fsync

    def appears(file: int) -> None:
        precious.exists() or precious.write_text("precious")
        sync(file)

    def no_links(*args) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", appears)
        assert main(argv) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert f"{written} exists, and did not when this began" in told and precious.read_text() == "precious"
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {written, "model.safetensors"}
    assert main([*argv, "--replace" if argv[0] == "convert" else "--overwrite"]) == 0
    assert precious.read_bytes() != b"precious"


@pytest.mark.parametrize("out", ["a.png", "a.png/deeper"])
def test_a_file_is_no_folder(kept, monkeypatch, capsys, out):
    monkeypatch.chdir(kept)
    held = Path("a.png").read_bytes()
    for argv in (
        ["convert", "kept.safetensors", out, "--to", "hf"],
        ["convert", "kept.safetensors", out, "--to", "hf", "--replace"],
        ["explain", "a.png", "--checkpoint", "kept.safetensors", "--output", out],
        ["check", "a.png"],
    ):
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and "a.png" in err
    assert Path("a.png").read_bytes() == held


def test_benchmark_and_compare(capsys):
    found = json.loads(told(capsys, "benchmark", "test_van", "test_patnet", "--rounds", "2", "--format", "json"))
    assert [row["model"] for row in found["models"]] == ["test_van", "test_patnet"]
    assert all(row["ms"] > 0 and row["MiB"] > 0 for row in found["models"]) and found["about"]["torch"]
    rows = json.loads(
        told(capsys, "compare", "test_van", "test_van", "--rounds", "2", "--fuse", "--format", "json", "--quiet")
    )
    assert rows[0]["speed"] == 1 and rows[1]["params"] == rows[0]["params"]
    assert "test_van" in told(capsys, "benchmark", "test_van", "--training", "--rounds", "2")


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_benchmark_and_compare_take_models_of_every_task(capsys, tmp_path, task):
    kept = str(tmp_path / "kept.safetensors")
    head, kwargs, create = {
        "detection": ("fcos", {"fpn_channels": 64}, visionattn.create_detector),
        "segmentation": ("fpn", {"pyramid_channels": 32, "segmentation_channels": 32}, visionattn.create_segmenter),
    }[task]
    entries = {"task": task, "model": "test_van", "model_kwargs": {}, "head": head, "head_kwargs": kwargs}
    entries |= {"classes": list("abc"), "data": {}, "annotations": {}, "joint": {}}
    save_checkpoint(Path(kept), create("test_van", head, 3, **kwargs).state_dict(), entries)
    options = ["--rounds", "1", "--size", "64", "--format", "json", "--quiet"]
    assert json.loads(told(capsys, "benchmark", kept, *options))["models"][0]["ms"] > 0
    assert len(json.loads(told(capsys, "compare", "test_van", kept, *options))) == 2
    refused = [["--training"], ["--fuse"], *([["--dtype", "bfloat16"]] if task == "detection" else [])]
    for given in refused:
        assert main(["benchmark", kept, "--quiet", *given]) == 2
        assert f"is of {task}" in (err := capsys.readouterr().err) and err.count("\n") == 1
    if task == "detection":
        assert main(["export", kept, str(tmp_path / "a.onnx")]) == 2
        assert "a detector's file has one size: give --size" in capsys.readouterr().err


def test_push_wants_a_folder(kept, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["push", str(kept / "kept.safetensors"), "local-dir:"]) == 2
    assert "expected local-dir:FOLDER" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_train_and_validate_are_the_scripts(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--config", "recipe:digits", "--epochs", "1", "--print_config"])
    assert end.value.code == 0 and "test_dinat" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["validate", "--help"])
    assert end.value.code == 0 and "--tta" in capsys.readouterr().out


def test_recipes_have_names():
    assert folder().is_dir() and "classification/dinat_tiny" in list_recipes()
    assert all(recipe.startswith("detection/") for recipe in list_recipes("detection"))


def test_completion(capsys):
    """What is printed is a script that bash reads."""
    script = told(capsys, "completion", "bash")
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert all(name in script for name in commands())


def test_nothing_of_progress_is_among_the_results():
    code = "from visionattn.progress import track, set_quiet; import time, visionattn.progress as p; p.EVERY = 0.01\n"
    code += "for i in track(range(3), 'counting'): time.sleep(0.02)\nset_quiet(True)\n"
    code += "for i in track(range(3), 'silent'): time.sleep(0.02)\nprint('result')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "result\n" and "counting: 1 of 3" in done.stderr and "silent" not in done.stderr
