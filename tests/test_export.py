"""Exported files compute what the model does, at any size, and say how they are to be used."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numerics import filled
from PIL import Image

import visionattn
from visionattn.cli import main
from visionattn.errors import VisionattnError
from visionattn.export import export, export_aoti, export_onnx, export_openvino, export_torch, files, load
from visionattn.export.graph import traceable, traced
from visionattn.export.measured import open_folder
from visionattn.export.running import disagreement, usual_disagreement
from visionattn.weights.files import DESCRIPTION, write_checkpoint

EXAMPLE = Path(__file__).parent.parent / "examples" / "onnx_runtime.py"
SHAPES = [(1, 3, 64, 64), (2, 3, 97, 81), (1, 3, 130, 96), (2, 3, 64, 64)]
QUICK = "test_illama"
"""An export takes seconds."""
PUBLISHED = (
    *("attnet_xxs", "convit_tiny", "davit_tiny", "focalnet_tiny_srf", "halonet26t", "hornet_tiny_7x7", "illama_tiny"),
    *("flowformer", "litv2_small", "nalaformer_xt", "dinat_mini", "nat_mini", "patnet_t0"),
    *("agent_deit_tiny", "moh_vit_small_75", "overlock_xt", "sgformer_s", "sparsifiner_deit_small", "van_b0"),
)


@pytest.mark.parametrize(
    "name",
    [n if n == QUICK else pytest.param(n, marks=pytest.mark.slow) for n in visionattn.list_models("test_*")]
    + [pytest.param(n, marks=pytest.mark.slow) for n in PUBLISHED],
)
def test_one_onnx_file_agrees_at_any_size(name, tmp_path):
    shallow = {"depth": 2} if name == QUICK else {}
    model = filled(visionattn.create_model(name, num_classes=10, **shallow))
    made = export_onnx(model, tmp_path / "model.onnx")  # which compares at three sizes, with one image and with two
    assert (made.disagreement < 1e-4 or made.usual) and len({shape[2:] for shape in made.shapes}) == 3
    assert os.listdir(tmp_path) == ["model.onnx"]
    run, about = load(tmp_path / "model.onnx")
    file, own = (
        usual_disagreement(run, traced(model), SHAPES) if made.usual else (disagreement(run, traced(model), SHAPES), 0)
    )
    assert file <= max(1e-4, 2 * own)
    assert about["model"] == name and about["opset"] >= 18 and about["classes"] is None
    assert about["preprocessing"]["mean"] == list(model.pretrained_cfg["mean"])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 0.01])
def test_a_file_that_computes_anything_else_is_not_kept(wrong, tmp_path, monkeypatch, capsys):
    def loaded(file):
        run, about = load(file)
        return lambda x: [torch.cat([out[..., :-1], out[..., -1:] + wrong], -1) for out in run(x)], about

    monkeypatch.setattr(files, "load", loaded)
    options = ["--format", "torch", "--quiet", "--kwargs", "depth=1"]
    assert main(["export", "test_isotropic", str(tmp_path / "a.pt2"), *options]) == 2
    assert "is not kept" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_draws_noise_is_not_kept_for_that_reason(tmp_path, monkeypatch):
    model = visionattn.create_model("test_isotropic", mixer="pgqa", depth=1, num_classes=10).eval()
    monkeypatch.setitem(files.FORMATS, "torch", replace(files.FORMATS["torch"], write=lambda file, _: file.touch()))
    monkeypatch.setattr(files, "load", lambda file: (lambda x: [model(x)], {}))
    with pytest.raises(VisionattnError, match="from what the model computes, which draws noise at every call"):
        files.export(model, tmp_path / "a.pt2", "torch")


def test_large_graphs_are_folded_alone(tmp_path, monkeypatch):
    model = filled(visionattn.create_model("test_isotropic", num_classes=10, depth=1))
    nodes = {}
    for limit in (files.REWRITTEN, 10):
        monkeypatch.setattr(files, "REWRITTEN", limit)
        made = export_onnx(model, tmp_path / f"{limit}.onnx")
        nodes[limit] = len(onnx.load(made.path).graph.node)
        assert made.disagreement < 1e-5
    assert nodes[10] > nodes[10_000]


@pytest.mark.parametrize("mixer, kept", [("moh", (True, False)), ("softmax", (False, False))])
def test_ranks_may_turn_on_last_digits_of_some_images(mixer, kept, tmp_path, monkeypatch, capsys):
    """A model that goes by ranks may differ on few images of a shape, but not on most; any other on none."""
    images: dict[tuple, int] = {}

    def loaded(file, every):
        run, about = load(file)

        def off(x):
            images[tuple(x.shape)] = count = images.get(tuple(x.shape), -1) + 1  # the first is compared, then five
            return [out + 0.01 * (every or count in (0, 3)) for out in run(x)]

        return off, about

    for every in (False, True):
        images.clear()
        monkeypatch.setattr(files, "load", partial(loaded, every=every))
        options = ["--format", "torch", "--quiet", "--kwargs", f"mixer={mixer}", "depth=1"]
        code = main(["export", "test_isotropic", str(tmp_path / f"{every}.pt2"), *options])
        told = capsys.readouterr()
        assert (code == 0) == kept[every] == (tmp_path / f"{every}.pt2").exists()
        assert ("ranks of values" in told.out) if kept[every] else ("is not kept" in told.err)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder for each of three classes, with images in it."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (root / name).mkdir()
        for i in range(5):
            pixels = rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((90, 70)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    path = tmp_path_factory.mktemp("checkpoint") / "best.safetensors"
    kwargs = {"num_classes": 3, "depth": 2}
    preparation = {"input_size": [3, 48, 48], "crop_pct": 0.9, "interpolation": "bicubic", "crop_mode": "center"}
    preparation |= {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    torch.manual_seed(0)
    model = filled(visionattn.create_model("test_illama", **kwargs))
    entries = {"task": "classification", "model": "test_illama", "model_kwargs": kwargs}
    entries |= {"classes": ["ant", "bee", "cat"], "preprocessing": preparation}
    write_checkpoint(path, model.state_dict(), {DESCRIPTION: json.dumps(entries)})
    return path, visionattn.create_model(path).eval()


def test_command_and_runtime_without_visionattn(checkpoint, photos, tmp_path, capsys):
    path, model = checkpoint
    out = tmp_path / "best.onnx"
    assert main(["export", str(path), str(out), "--data", str(photos), "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "test_illama, onnx opset" in lines[0] and "3 sizes and 2 batch sizes" in lines[1]
    assert [line.split()[0] for line in lines[2:]] == ["top1", "PyTorch", str(out)]
    assert main(["export", str(path), str(out)]) == 2
    assert "exists: choose another name" in capsys.readouterr().err
    image = photos / "bee" / "3.png"
    code = (
        f"import sys; sys.modules['torch'] = sys.modules['visionattn'] = None; sys.argv = {['', str(out), str(image)]}"
    )
    told = subprocess.run(
        [sys.executable, "-c", f"{code}; exec(open({str(EXAMPLE)!r}).read())"],
        capture_output=True,
        text=True,
        check=True,
    )
    x = visionattn.data.create_transform(model)(Image.open(image))[None]
    with torch.no_grad():
        chances = model(x).softmax(1)[0]
    best = int(chances.argmax())
    first = told.stdout.splitlines()[0]
    assert first.endswith(f"% {['ant', 'bee', 'cat'][best]}")
    assert float(first.split(": ")[1].split()[0]) == pytest.approx(100 * chances[best].item(), abs=2)


DENSE = {
    "fpn": {"pyramid_channels": 32, "segmentation_channels": 32},
    "fcos": {"fpn_channels": 64, "score_thresh": 0.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("head", DENSE)
def test_dense_runtime_without_visionattn(head, photos, tmp_path):
    create = visionattn.create_segmenter if head == "fpn" else visionattn.create_detector
    model = filled(create("test_patnet", head, 3, backbone_kwargs={"in_chans": 1}, **DENSE[head])).eval()
    made = export_onnx(model, tmp_path / "a.onnx", size=(64, 96))
    told = subprocess.run(
        [sys.executable, str(EXAMPLE.with_name("onnx_dense_runtime.py")), made.path, photos / "bee/3.png", "out.png"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    ).stdout.splitlines()
    image = Image.open(photos / "bee/3.png").convert("L")
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.size == image.size and drawn.mode == ("L" if head == "fpn" else "RGB")
        found = np.asarray(drawn)
    small = image.resize((82, 64), Image.Resampling.BILINEAR)  # 90 x 70 as large as fits
    x, (mean,), (std,) = (
        torch.zeros(1, 1, 64, 96),
        made.about["preprocessing"]["mean"],
        made.about["preprocessing"]["std"],
    )
    x[0, 0, :, :82] = (torch.from_numpy(np.array(small)) / 255 - mean) / std
    with torch.no_grad():
        if head == "fpn":
            labels = model(x)[0].argmax(0)[:, :82]
            assert {line.split(": ")[0] for line in told} == set(map(str, labels.unique().tolist()))
            expected = Image.fromarray(labels.numpy().astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
            assert (found == np.asarray(expected)).mean() > 0.99  # and the rest are ties
        else:
            (boxes,) = model([x[0]])
            corners = (boxes["boxes"] / (64 / 70)).clamp(min=0).minimum(torch.tensor([90.0, 70, 90, 70]))
            inside = (corners[:, 2:] > corners[:, :2]).all(1)
            assert len(told) == int(((boxes["scores"] >= 0.5) & inside).sum()) and not inside.all()


@pytest.mark.slow
def test_int8_weights(checkpoint, tmp_path):
    made = export_onnx(checkpoint[1], tmp_path / "a.onnx", int8="weights")
    assert 0 < made.disagreement < 0.3
    assert "MatMulInteger" in {node.op_type for node in onnx.load(made.path).graph.node}


def test_static_int8(checkpoint, tmp_path):
    _, model = checkpoint
    images = [torch.randn(1, 3, 48, 48) for _ in range(3)]
    made = export_onnx(model, tmp_path / "a.onnx", size=(48, 48), int8="static", calibration=images)
    kinds = {node.op_type for node in onnx.load(made.path).graph.node}
    assert "QuantizeLinear" in kinds and made.disagreement < 0.3 and made.about["int8"] == "static"
    with pytest.raises(VisionattnError, match="int8 static needs images"):
        export_onnx(model, tmp_path / "b.onnx", int8="static")
    assert os.listdir(tmp_path) == ["a.onnx"]


def test_torch_program(checkpoint, tmp_path):
    path, model = checkpoint
    made = export_torch(model, tmp_path / "a.pt2")
    assert made.disagreement < 1e-4 and made.about["classes"] == ["ant", "bee", "cat"]
    x = torch.randn(3, 3, 96, 80)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(tmp_path / "a.pt2").module()(x)[0], model(x), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in visionattn.list_models("test_*") if n != QUICK])
def test_int8_of_every_family(name, tmp_path):
    """What chooses by rank may choose otherwise: how far the outputs are is told, and not bounded here."""
    pytest.importorskip("torchao")
    model = filled(visionattn.create_model(name, num_classes=10))
    for kind, file in (("onnx", "a.onnx"), ("torch", "a.pt2")):
        assert 0 < export(model, tmp_path / file, kind, (64, 64), "weights").disagreement < float("inf")


@pytest.mark.slow
@pytest.mark.parametrize("int8", ["weights", "static"])
def test_torch_program_with_int8(checkpoint, tmp_path, int8):
    pytest.importorskip("torchao")
    images = [torch.randn(2, 3, 64, 64)]
    made = export_torch(checkpoint[1], tmp_path / "a.pt2", int8=int8, calibration=images)
    assert 0 < made.disagreement < 0.3


@pytest.mark.slow
def test_aoti_package(checkpoint, tmp_path):
    made = export_aoti(checkpoint[1], tmp_path / "a.pt2", size=(48, 48))
    assert made.disagreement < 1e-4 and made.about["model"] == "test_illama"


def test_aoti_without_a_compiler(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(VisionattnError, match=r"needs a C\+\+ compiler: install g\+\+"):
        export_aoti(checkpoint[1], tmp_path / "a.pt2")


@pytest.mark.slow
def test_openvino(checkpoint, tmp_path):
    pytest.importorskip("openvino")
    made = export_openvino(checkpoint[1], tmp_path / "a.xml")
    assert made.disagreement < 1e-4 and made.about["classes"] == ["ant", "bee", "cat"]
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.xml"]


@pytest.mark.slow
def test_features(tmp_path):
    model = filled(visionattn.create_model("test_van", features_only=True))
    made = export_onnx(model, tmp_path / "a.onnx")
    assert made.about["outputs"] == ["map0", "map1", "map2", "map3"] and made.about["task"] == "features"


@pytest.mark.slow
@pytest.mark.parametrize("head", ["upernet", "fpn", "segformer", "unet"])
def test_segmenters(head, tmp_path):
    model = visionattn.create_segmenter("test_van", head, 5).eval()
    assert export_onnx(model, tmp_path / "a.onnx", size=(96, 64)).about["task"] == "segmentation"


@pytest.mark.slow
@pytest.mark.parametrize("head", ["faster_rcnn", "mask_rcnn", "retinanet", "fcos"])
def test_detectors(head, tmp_path):
    least = "box_score_thresh" if "rcnn" in head else "score_thresh"
    model = filled(visionattn.create_detector("test_van", head, 5, fpn_channels=64, **{least: 0.0})).eval()
    made = export_onnx(model, tmp_path / "a.onnx", size=(96, 128))
    assert made.disagreement < 1e-4 and made.about["outputs"][:3] == ["boxes", "labels", "scores"]
    x = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        eager = model([x[0]])[0]
    found = load(made.path)[0](x)
    assert len(found[0]) == len(eager["boxes"]) > 0
    torch.testing.assert_close(found[0], eager["boxes"], rtol=0, atol=1e-3)


def test_nothing_stays_of_an_export_that_is_ended(checkpoint, tmp_path, monkeypatch):
    """By an error, by SIGTERM, or at once: then the next one removes what is left, and nothing of one that runs."""
    (tmp_path / "a.pt2").write_text("earlier")
    dead = subprocess.Popen(["true"])
    dead.wait()
    host, mine = socket.gethostname(), os.getpid()
    running = {f".export-{host}-{mine}-a", f".export-elsewhere-{dead.pid}-a", ".export-notes"}
    for name in (*running, f".export-{host}-{dead.pid}-a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.pt2").touch()

    def end(how):
        def save(program, file, **options):
            assert f".export-{host}-{mine}-" in file
            Path(file).write_text("half of it")
            how()

        monkeypatch.setattr(files, "_program", lambda order: None)
        monkeypatch.setattr(torch.export, "save", save)
        export_torch(checkpoint[1], tmp_path / "a.pt2", overwrite=True)

    def fail():
        raise RuntimeError("no more")

    with pytest.raises(VisionattnError, match="cannot export test_illama to torch: no more"):
        end(fail)
    assert {path.name for path in tmp_path.iterdir()} == running | {"a.pt2"}
    with pytest.raises(SystemExit) as ended:
        end(lambda: os.kill(mine, signal.SIGTERM))
    assert ended.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert {path.name for path in tmp_path.iterdir()} == running | {"a.pt2"}
    assert (tmp_path / "a.pt2").read_text() == "earlier"


def test_stand_ins_of_detectors_compute_the_same():
    torch.manual_seed(0)
    model = visionattn.create_detector("test_van", "faster_rcnn", 5, fpn_channels=64, box_score_thresh=0.0).eval()
    x = torch.randn(3, 64, 96)
    with torch.no_grad():
        plain = model([x])[0]
        with traceable():
            stood_in = model([x])[0]
    for key, value in plain.items():
        torch.testing.assert_close(stood_in[key], value, rtol=0, atol=1e-3)


def test_what_a_file_of_masks_is_compared_with_has_those_of_its_boxes():
    model = visionattn.create_detector("test_van", "mask_rcnn", 5, fpn_channels=64, box_score_thresh=0.0).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        boxes, _, _, masks = traced(model)(x)
        pasted = model([x[0]])[0]["masks"]  # as ever
    assert masks.shape == (len(boxes), 1, 28, 28) and pasted.shape == (len(boxes), 1, 64, 96)


def test_what_cannot_be_exported_is_told_in_a_line(checkpoint, tmp_path):
    path, model = checkpoint
    for call, told in (
        (lambda: export_onnx(model, tmp_path / "a.pt2"), r"ends in \.onnx"),
        (lambda: export_onnx(model, tmp_path / "no/a.onnx"), "is not a folder"),
        (lambda: export_onnx(model, tmp_path / "a.onnx", int8="all"), "int8 one of weights, static"),
        (lambda: export(model, tmp_path / "a.onnx", "tflite"), "kind one of onnx, torch, aoti, openvino"),
        (lambda: export_torch(model, tmp_path / "a.pt2", opset=18), "opset is of ONNX files"),
        (lambda: export_onnx(visionattn.create_model("test_van"), tmp_path / "a.onnx"), "eval mode"),
        (lambda: load(path), "expected an exported file"),
    ):
        with pytest.raises(VisionattnError, match=told):
            call()
    pruned = visionattn.create_model("test_sparsifiner", token_keep_rate=0.5, token_pruning_loc=[3], depth=4).eval()
    with pytest.raises(VisionattnError, match="export it with fixed height and width"):
        export_onnx(pruned, tmp_path / "a.onnx")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("names", [("n01440764", "n01443537"), ("tench, Tinca tinca", "goldfish, Carassius auratus")])
def test_folders_of_some_of_imagenets_classes_are_told_by_either_name(tmp_path, names):
    for name in names:
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / name / f"{i}.png")
    folder = open_folder(tmp_path, visionattn.create_model("test_van"))
    assert folder.labels and set(folder.labels) <= {0, 1}
