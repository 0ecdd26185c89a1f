"""A page for the browser: drop an image, see what a model makes of it, and where in the image it looks."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .data.drawing import to_image
from .data.images import to_mode
from .errors import VisionattnError
from .reports.findings import evidence
from .reports.page import overlay
from .tasks import TASKS
from .tasks.task import image_mode
from .training.inputs import Input
from .training.opened import Opened

SIDE = 320
"""Height of the pictures in the page."""
NOTHING = "Drop an image on the left."


def make_answer(opened: Opened) -> Callable[[Image.Image, float], tuple[Any, Image.Image | None, str]]:
    """What the page calls.

    Args:
        opened: the model.

    Returns:
        a function of an image and a least score, which gives the answer, probabilities by class for a classifier or
        else a picture; a picture of what counted, None where nothing did; and the answer in words.
    """
    task, model, classes = opened.task, opened.model, opened.classes
    is_classifier, device = TASKS[opened.task.config.task].sample == "class", next(model.parameters()).device
    has_scores = TASKS[opened.task.config.task].sample == "objects" or opened.several

    def answer(image: Image.Image | None, threshold: float) -> tuple[Any, Image.Image | None, str]:
        if image is None:
            return None, None, NOTHING
        image = to_mode(image, image_mode(model))
        prepared = task.transform(False).image(image)
        batch, _ = task.collate(False)([prepared], [0])
        with torch.no_grad():
            moved = batch.to(device) if isinstance(batch, torch.Tensor) else [each.to(device) for each in batch]
            (output,) = task.predict(model, moved)
        (heat,) = evidence(model, prepared[None].to(device), [output], classes)
        least = threshold if has_scores else None
        if is_classifier:
            said, seen = task.summarise(output, classes, least), to_image(prepared, *_statistics(opened))
            if not hasattr(output, "softmax") or len(output) != len(classes):  # another task's
                return None, None, said
            shares = output.float().sigmoid() if opened.several else output.float().softmax(0)
            found: Any = dict(zip(classes, shares.tolist(), strict=True))
        else:
            full = task.to_full_size(output, (image.height, image.width))
            found, seen = task.draw_on(image, full, classes, threshold), image
            said = task.summarise(full, classes, least)
            found = _large(found, Image.Resampling.NEAREST)
        counted = None if heat is None else overlay(_large(seen, Image.Resampling.BICUBIC), heat)
        return found, counted, said

    return answer


def _large(image: Image.Image, resample: Image.Resampling) -> Image.Image:
    """A small image as large as the page has room for, which would leave it small."""
    factor = max(1, SIDE // max(image.size))
    return image.resize((factor * image.width, factor * image.height), resample)


def _statistics(opened: Opened) -> tuple[Any, Any]:
    return opened.task.config.data.mean, opened.task.config.data.std


def make_page(opened: Opened, title: str) -> Any:
    """The page, a `gradio.Blocks`.

    Args:
        opened: the model.
        title: what it is called.
    """
    import gradio

    answer, sample = make_answer(opened), TASKS[opened.task.config.task].sample

    def answered(path: str | None, threshold: float) -> tuple[Any, Image.Image | None, str]:
        try:
            photo = Input("the image", partial(open, path, "rb"), Path())
            return answer(None if path is None else photo.read(image_mode(opened.model)), threshold)
        except (VisionattnError, ValueError, OSError) as error:  # of this image
            raise gradio.Error(str(error), print_exception=False) from error

    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        gradio.Markdown(f"# {title}")
        with gradio.Row():
            image = gradio.Image(label="Image", sources=["upload", "clipboard"], height=SIDE)
            # Read here, as the other commands read images. Gradio writes files for classes that inherit of its own.
            image.preprocess = lambda payload: None if payload is None else payload.path
            if sample == "class":
                found = gradio.Label(num_top_classes=5, label="Classes")
            else:
                found = gradio.Image(
                    type="pil", label="Boxes" if sample == "objects" else "Map", interactive=False, height=SIDE
                )
            heat = gradio.Image(type="pil", label="What counted (Grad-CAM)", interactive=False, height=SIDE)
        least = gradio.Slider(0, 1, 0.5, label="Least score", visible=sample == "objects" or opened.several)
        said = gradio.Textbox(NOTHING, label="In words", interactive=False)
        for event in (image.change, least.release):
            event(answered, [image, least], [found, heat, said], show_progress="minimal")
    return page


def run_demo(page: Any, host: str, port: int, share: bool, block: bool = True) -> str:
    """Serve a page; its address.

    Args:
        page: of `make_page`.
        host: name or number to listen at.
        port: number; 0 for any that is free.
        share: have gradio's servers give it a public address for a while.
        block: go on until interrupted.

    Raises:
        VisionattnError: if it cannot be served there.
    """
    try:
        _, local, public = page.launch(
            server_name=host, server_port=port or None, share=share, prevent_thread_lock=True, quiet=True
        )
    except OSError as error:
        told = "another program is there: give another --port" if "empty port" in str(error) else error
        raise VisionattnError(f"cannot serve at {host}:{port}: {told}") from error
    print(f"demo at {public or local}, end it with Ctrl-C", flush=True)
    if block:
        page.block_thread()
    return local
