"""What each task adds to the loop: its data, model, loss, predictions and metrics."""

from importlib import import_module

from .config import TaskConfig
from .task import Task


def make_task(config: TaskConfig) -> Task:
    """The task that the options name, whose libraries are imported with it."""
    name = config.task.capitalize()
    return getattr(import_module(f".{config.task}", __name__), name)(config)
