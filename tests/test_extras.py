"""What a base install, or one that lacks a library, says: what to install, in one line."""

import os
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

import visionattn
from visionattn.errors import INSTALL
from visionattn.training.checkpoint import save_checkpoint

ROOT = Path(__file__).parents[1]
INSTALLS = re.compile(r"^error: this needs \w+: python -m pip install 'visionattn\[(train|dense)\]'$")
ENTRIES = '''
import os, sys
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path

import visionattn
from visionattn.cli import main
from visionattn.errors import VisionattnError, run

root, folder = map(Path, sys.argv[1:])
hidden, find = set(), PathFinder.find_spec
PathFinder.find_spec = lambda name, *args: None if name.partition(".")[0] in hidden else find(name, *args)
sys.path.insert(0, str(root))
import train, validate

def script(module, *argv):
    def made():
        sys.argv = ["script", *argv]
        return run(module.main)
    return made

def call(name, *arguments):
    def made():
        try:
            getattr(visionattn, name)(*arguments)
        except VisionattnError as error:
            print("error:", error, file=sys.stderr)
            return 2
    return made

def entries():
    """What is called by name, and how; each only makes its own imports."""
    segmenter, classifier, hub = (str(folder / name) for name in ("segmenter.safetensors", "w.safetensors", "hub"))
    dry = ["--dry_run", "--output", str(folder), "--data.num_workers", "0", "--data.val_fraction", "0.95"]
    yield "help", script(train, "--help")
    yield "validate help", script(validate, "--help")
    yield "train", script(train, *dry)
    yield "detection", script(train, "--task", "detection", *dry[:3])
    yield "segmentation", script(train, "--task", "segmentation", *dry[:3])
    yield "hub", script(train, "--data.name", "hfds/none", "--data.root", hub, "--output", hub)
    yield "hub detection", script(train, "--task", "detection", "--data.name", "hfds/none", "--output", hub)
    yield "validate", script(validate, "--checkpoint", segmenter, "--output", str(folder / "r.json"))
    yield "predict", lambda: main(["predict", str(folder / "x.png"), "--checkpoint", segmenter])
    yield "predict class", lambda: main(["predict", str(folder / "x.png"), "--checkpoint", classifier])
    yield "list", lambda: main(["list", "test_*"])
    yield "info", lambda: main(["info", "test_dinat"])
    yield "convert", lambda: main(["convert", classifier, str(folder / "c.safetensors"), "--model", "test_dinat"])
    yield "push", lambda: main(["push", classifier, "local-dir:" + str(folder / f"pushed{os.getpid()}")])
    yield "file", call("create_model", segmenter)
    yield "detector", call("create_detector", "test_dinat", "fcos", 3)
    yield "segmenter", call("create_segmenter", "test_dinat", "fpn", 3)

def attempt(library, name, entry):
    """In a process of its own, in which the library is missing."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    hidden.update(library)
    for module in [m for m in sys.modules if m.partition(".")[0] in library]:
        del sys.modules[module]
    print("=", ",".join(library), name, flush=True)
    os.dup2(1, 2)
    try:
        code = entry()
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        import traceback
        traceback.print_exc()
        code = 99
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(code or 0)

everything = EVERYTHING
for name, entry in entries():
    print("code", attempt(everything, name, entry), flush=True)
# The others are there, and imported already.
import accelerate, albumentations, matplotlib.figure, sklearn.datasets, torchmetrics.detection
import segmentation_models_pytorch
made = dict(entries())
for library, name in LACKING:
    print("code", attempt((library,), name, made[name]), flush=True)
'''
TRAIN = ("docstring_parser", "accelerate", "matplotlib", "sklearn", "tensorboard")
LACKING = [
    *((library, "train", "train") for library in TRAIN),
    *((library, "detection", "dense") for library in ("albumentations", "faster_coco_eval", "torchmetrics")),
    *((library, "segmentation", "dense") for library in ("albumentations", "segmentation_models_pytorch")),
]
"""Libraries, what needs them, and the extra that has them."""


def test_what_is_not_installed_is_told_in_one_line(tmp_path: Path):
    model = visionattn.create_model("test_dinat", num_classes=10)
    known = {"model": "test_dinat", "model_kwargs": {"num_classes": 10}, "classes": list("0123456789"), "data": {}}
    save_checkpoint(tmp_path / "w.safetensors", model.state_dict(), known)
    known |= {"task": "segmentation", "head": "fpn", "head_kwargs": {}, "annotations": {}, "joint": {}}
    save_checkpoint(tmp_path / "segmenter.safetensors", model.state_dict(), known)
    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    text = ENTRIES.replace("EVERYTHING", repr(tuple(INSTALL)))
    (tmp_path / "entries.py").write_text(text.replace("LACKING", repr([entry[:2] for entry in LACKING])))
    done = subprocess.run(
        [sys.executable, tmp_path / "entries.py", ROOT, tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    told = {}
    for part in f"\n{done.stdout}".split("\n= ")[1:]:
        title, *lines, code = part.strip().split("\n")
        library, _, name = title.partition(" ")
        told["all" if "," in library else library, name] = int(code.removeprefix("code ")), lines
    for name in ("help", "validate help", "train", "detection", "segmentation", "hub", "validate", "predict", "file"):
        code, lines = told["all", name]
        assert code == 2 and len(lines) == 1 and INSTALLS.search(lines[0]), (name, lines)
    assert told["all", "segmenter"][0] == 2 and "'visionattn[dense]'" in told["all", "segmenter"][1][0]
    for name in ("list", "info", "convert", "push", "detector"):
        assert told["all", name][0] == 0, told["all", name]
    for library, name, extra in LACKING:
        expected = f"error: this needs {library}: python -m pip install 'visionattn[{extra}]'"
        assert told[library, name] == (2, [expected])
