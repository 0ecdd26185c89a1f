"""What README and docs print runs, with the package as a wheel has it; and the examples do."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = {
    "network or published weights": r"pretrained|\.pth|hf-hub|pip install|git clone|download|checkpoint_path|--share",
    "files of one's own": r"path/to|imagenet|photo|runs/|\.(safetensors|onnx|pt2|jpg)|CHECKPOINT|fashion-mnist",
    "several processes or a GPU": r"num_processes|nproc|config_file|cuda",
    "minutes": r"train\.py|benchmarks/|pytest|tests/kills|visionattn (train|compare|benchmark)",
    "a shell of one's own": r"completion|mkdocs",
}
"""Why a block is not run here, by what is in it."""


def blocks(language: str) -> list:
    """The blocks of a language that can be run here, with their places."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.M | re.S):
            if not any(re.search(needs, match[1]) for needs in NEEDS.values()):
                line = text[: match.start()].count("\n") + 1
                found.append(pytest.param(match[1], id=f"{page.name}:{line}"))
    return found


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder to work in, beside which the wheel is unpacked, with what a checkout has at its top."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    source = folder / "source"
    source.mkdir()
    for name in ("visionattn", "configs", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)  # so that nothing is built inside of the checkout
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    (folder / "work").mkdir()
    (folder / "work" / "hubconf.py").symlink_to(ROOT / "hubconf.py")
    return folder / "work"


def call(folder: Path, *command: str) -> subprocess.CompletedProcess:
    site = str(folder.parent / "site")
    environment = {"PATH": str(folder.parent / "bin") + ":/usr/bin:/bin", "PYTHONPATH": site, "HOME": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def test_the_wheel_has_the_package_and_its_recipes(installed):
    site = installed.parent / "site"
    assert (site / "visionattn" / "recipes" / "classification" / "digits.yaml").is_file()
    assert (site / "visionattn" / "py.typed").is_file() and not (site / "tests").exists()
    code = "import visionattn.recipes as r; print(r.recipe_path('scenes_fcos'))"
    done = call(installed, sys.executable, "-c", code)
    assert done.stdout.startswith(str(site)), done.stderr


def test_python_blocks_run_as_printed(installed):
    """One process runs them all, each with names of its own."""
    found = blocks("python")
    assert len(found) >= 5
    script = installed / "blocks.py"
    calls = [f"exec(compile({block.values[0]!r}, {block.id!r}, 'exec'), {{'__name__': 'block'}})" for block in found]
    script.write_text("\n".join(calls))
    done = call(installed, sys.executable, str(script))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", blocks("bash"))
def test_shell_blocks_run_as_printed(installed, block):
    programs = installed.parent / "bin"
    programs.mkdir(exist_ok=True)
    for name, command in (("visionattn", "-m visionattn"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {command} "$@"\n')
        (programs / name).chmod(0o755)
    done = call(installed, "bash", "-euc", block)
    assert done.returncode == 0, done.stderr


USE = """import torch

import visionattn
from visionattn.layers import FocalModulation, NeighborhoodAttention2d

model = visionattn.create_model("dinat_mini", num_classes=10, features_only=False).eval()
logits = visionattn.quantize(model)(torch.randn(1, 3, 64, 64))
detector = visionattn.create_detector("dinat_mini", "fcos", num_classes=3)
segmenter = visionattn.create_segmenter("dinat_mini", "fpn", num_classes=3)
names: list[str] = visionattn.list_models("dinat_*", pretrained=True)
info = visionattn.model_info(names[0])
size: tuple[int, int, int] = info.input_size
top1: float | None = info.top1
transform = visionattn.data.create_transform(model)
block = NeighborhoodAttention2d(64, num_heads=2, kernel_size=7)
out: torch.Tensor = block(torch.randn(1, 8, 8, 64))
visionattn.set_pointwise("auto")
print(logits, detector, segmenter, size, top1, transform, FocalModulation(32, 3, 2), out.shape)
"""
"""A user's code."""


@pytest.mark.slow
def test_the_public_functions_are_typed(tmp_path):
    """A user who has pyright check everything is told of nothing that is ours."""
    pytest.importorskip("pyright")
    (tmp_path / "use.py").write_text(USE)
    settings = {"typeCheckingMode": "strict", "extraPaths": [str(ROOT)], "reportMissingTypeStubs": False}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def photos(tmp_path) -> Path:
    for kind in ("dark", "bright"):
        (tmp_path / kind).mkdir()
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 80, (40, 48, 3)) + 150 * (kind == "bright")
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / kind / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("finetune_folder", ["{photos}", "--model", "test_van", "--epochs", "1"], "epoch 1: "),
        ("retrieval", ["{photos}", "{photos}/dark/0.png", "--model", "test_van", "--top", "2"], "1.000  "),
        ("swap_attention", [], "M parameters, loss "),
        ("own_fpn", ["test_van"], "stride 32: (1, 128, 7, 11)"),
        ("finetune_detector", ["--steps", "2"], "step 2: "),
    ],
)
def test_examples(photos, name, options, told):
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *(o.format(photos=photos) for o in options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and told in done.stdout, done.stderr
