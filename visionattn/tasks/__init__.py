"""What each task adds to the loop: its data, model, loss, predictions and metrics."""

from importlib import import_module

from ..errors import optional
from .config import TaskConfig
from .task import Task


def make_task(config: TaskConfig) -> Task:
    """The task that the options name, whose libraries are imported with it.

    Raises:
        NotInstalledError: If one of them is not installed.
    """
    with optional():
        module = import_module(f".{config.task}", __name__)
    return getattr(module, config.task.capitalize())(config)
