"""What each task adds to the loop: its data, model, loss, predictions and metrics."""

from importlib import import_module

from ..errors import VisionattnError
from .config import TaskConfig
from .task import Task


def make_task(config: TaskConfig) -> Task:
    """The task that the options name, whose libraries are imported with it.

    Raises:
        VisionattnError: If one of them is not installed.
    """
    try:
        module = import_module(f".{config.task}", __name__)
    except ModuleNotFoundError as error:
        raise VisionattnError(
            f"{config.task} needs {error.name}: python -m pip install 'visionattn[train,dense]'"
        ) from error
    return getattr(module, config.task.capitalize())(config)
