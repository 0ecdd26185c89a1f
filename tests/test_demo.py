"""`visionattn demo`: what the page answers, and the page itself in a browser."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

import visionattn
from visionattn.cli import main as command
from visionattn.data.scenes import Scenes
from visionattn.demo import SIDE, make_answer
from visionattn.tasks.config import TaskConfig
from visionattn.training.checkpoint import save_checkpoint
from visionattn.training.opened import open_model

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KNOWN = {"model": "test_dinat", "classes": list("0123456789"), "data": {}, "annotations": {}, "joint": {}}
HEADS = {
    "detection": ("fcos", visionattn.create_detector, {"fpn_channels": 64}),
    "segmentation": ("fpn", visionattn.create_segmenter, {"pyramid_channels": 32, "segmentation_channels": 32}),
}


@pytest.fixture
def scene() -> Image.Image:
    return Scenes(TaskConfig().annotations, True, False)[0][0]


def saved(folder: Path, task: str) -> str:
    """A checkpoint as train.py leaves it, of random weights."""
    path = folder / f"{task}.safetensors"
    if task == "classification":
        model, own = visionattn.create_model("test_dinat", num_classes=10), {"model_kwargs": {"num_classes": 10}}
    else:
        head, create, kwargs = HEADS[task]
        model = create("test_dinat", head, 10, **kwargs)
        own = {"model_kwargs": {}, "head": head, "head_kwargs": kwargs}
    save_checkpoint(path, model.state_dict(), KNOWN | own | {"task": task})
    return str(path)


def test_answers_of_a_classifier(tmp_path: Path, scene: Image.Image):
    answer = make_answer(open_model(saved(tmp_path, "classification")))
    found, heat, said = answer(scene, 0.5)
    assert list(found) == KNOWN["classes"] and sum(found.values()) == pytest.approx(1, abs=1e-5)
    assert said.startswith(max(found, key=found.get))
    assert (heat is None) == (find_spec("visionattn.explain") is None)
    assert answer(None, 0.5)[:2] == (None, None)


@pytest.mark.parametrize("task", HEADS)
def test_answers_of_dense_models(tmp_path: Path, scene: Image.Image, task: str):
    found, _, said = make_answer(open_model(saved(tmp_path, task)))(scene, 0.5)
    assert max(found.size) >= SIDE - max(scene.size) and said
    assert found.width / found.height == scene.width / scene.height


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give a checkpoint, or --model NAME --pretrained"),
        (["--model", "test_dinat"], "would have random weights"),
        (["none.safetensors"], "none.safetensors"),
        (["--port", "70000"], "option port: expected a number from 0 to 65535, got 70000"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(capsys, monkeypatch, argv, message):
    monkeypatch.setattr("visionattn.cli.demo.require", lambda *names: None)
    assert command(["demo", *argv]) == 2
    out, err = capsys.readouterr()
    assert message in err and len(err.splitlines()) == 1 and not out


@pytest.mark.skipif(find_spec("gradio") is not None, reason="gradio is installed")
def test_what_is_not_installed_is_named(capsys):
    assert command(["demo", "--model", "test_dinat", "--pretrained"]) == 2
    assert capsys.readouterr().err == "error: this needs gradio: python -m pip install 'visionattn[demo]'\n"


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs a browser")
@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_the_page_in_a_browser(tmp_path: Path, scene: Image.Image, task: str):
    """An image is dropped; classes or a picture, the explanation and the answer in words come up."""
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    from visionattn.demo import make_page, run_demo

    opened = open_model(saved(tmp_path, task))
    said = make_answer(opened)(scene, 0.5)[2]
    page = make_page(opened, "demo")
    address = run_demo(page, "127.0.0.1", 0, share=False, block=False)
    scene.save(tmp_path / "scene.png")
    try:
        with playwright.sync_playwright() as started:
            browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
            tab = browser.new_page()
            tab.goto(address)
            tab.set_input_files("input[type=file]", str(tmp_path / "scene.png"))
            answered = "said => [...document.querySelectorAll('textarea')].some(area => area.value === said)"
            tab.wait_for_function(answered, arg=said, timeout=60_000)
            shown = (
                1 + (task != "classification") + (find_spec("visionattn.explain") is not None and task != "detection")
            )
            tab.wait_for_function(f"() => document.querySelectorAll('img[src*=\"file=\"]').length >= {shown - 1}")
            if task == "classification":
                assert tab.locator("text=Classes").count() and tab.locator(f"text={said[0]}").count()
            browser.close()
    finally:
        page.close()
