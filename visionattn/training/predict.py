"""What a checkpoint of train.py makes of image files: pictures for detection and segmentation, classes for others."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from PIL import Image

from ..data.images import to_mode
from ..errors import VisionattnError, printable, user_input
from ..tasks import TASKS, make_task
from ..weights import load_checkpoint
from ..weights.description import Described, check_made, read_described
from .checkpoint import write_file
from .config import parse_validate
from .evaluation import image_mode, make_accelerator, options_of


def predict(
    checkpoint: str,
    files: Sequence[str],
    output: str | None = None,
    threshold: float | None = None,
    overwrite: bool = False,
) -> None:
    """Print what the model makes of images and, for boxes, masks and semantic maps, draw it.

    Args:
        checkpoint: of train.py.
        files: of the images.
        output: folder for a PNG of each image, named after it; None: predictions. Classifiers make none.
        threshold: least score of the objects that are drawn and counted, and of the classes of a model that gives an
            image any number of them; None: 0.5. Others have no use for it.
        overwrite: write over pictures that are there.

    Raises:
        VisionattnError: if a file cannot be read, or would be written over, or an option is of no use to the task.
    """
    description, content = held = read_described(checkpoint)
    if any(description.get(entry) is None for entry in ("model", "classes", "data")):
        raise VisionattnError(f"{checkpoint} was not saved by train.py: it does not say which model and classes it has")
    config = parse_validate(["--checkpoint", checkpoint], partial(options_of, read=lambda _: held))
    classes, several = description["classes"], bool(description.get("multi_label"))
    sample = TASKS[config.task].sample
    no_pictures, has_scores = sample == "class", sample == "objects" or several
    useless = {
        "--output": no_pictures and output is not None,
        "--overwrite": no_pictures and overwrite,
        "--threshold": not has_scores and threshold is not None,
    }
    if name := next((name for name, given in useless.items() if given), None):
        raise VisionattnError(f"option {name} is of no use to {config.task}: leave it out")
    pictures = [] if no_pictures else _pictures(files, Path(output or "predictions"), overwrite)
    threshold = 0.5 if has_scores and threshold is None else threshold
    task = make_task(replace(config, checkpoint=""))
    name, kwargs = task.made
    described = Described(f"checkpoint {checkpoint}", name, kwargs, {}, description, Path(checkpoint), content)
    check_made(described, lambda: task.create_model(len(classes)))
    model = task.create_model(len(classes)).eval()
    load_checkpoint(model, checkpoint, content=content)
    task.resolve(model)
    prepare, collate, device = task.transform(False).image, task.collate(False), make_accelerator("no").device
    model.to(device)
    for number, file in enumerate(files):
        with user_input(f"cannot read {file}", OSError, ValueError), Image.open(file) as opened:
            image = to_mode(opened, image_mode(model))
        with torch.no_grad():
            output_of = task.predict(model, send_to_device(collate([prepare(image)], [0])[0], device))[0]
        if not pictures:
            print(printable(f"{file}: {task.summarise(output_of, classes, threshold)}"), flush=True)
            continue
        found = task.to_full_size(output_of, (image.height, image.width))
        with user_input(f"cannot write {pictures[number]}", OSError):
            pictures[number].parent.mkdir(parents=True, exist_ok=True)
        picture = task.draw_on(image, found, classes, threshold)
        write_file(pictures[number], partial(picture.save, format="png"))
        told = task.summarise(found, classes, threshold)
        print(printable(f"{file}: {told}; see {pictures[number]}"), flush=True)


def _pictures(files: Sequence[str], folder: Path, overwrite: bool) -> list[Path]:
    """Where the picture of each image goes."""
    twice = [name for name, count in Counter(Path(file).stem for file in files).items() if count > 1]
    if twice:
        raise VisionattnError(f"several images are called {twice[0]}, and so would be their pictures")
    pictures = [folder / f"{Path(file).stem}.png" for file in files]
    if not overwrite and (there := next((path for path in pictures if path.exists()), None)):
        raise VisionattnError(f"{there} exists: give --output another folder, or --overwrite")
    return pictures
