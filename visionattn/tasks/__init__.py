"""What each task adds to the loop: its data, model, loss, predictions and metrics."""

from pkgutil import resolve_name

from ..errors import optional
from .config import TaskConfig
from .table import TASKS as TASKS
from .table import Known as Known
from .task import Task


def make_task(config: TaskConfig) -> Task:
    """The task that the options name, whose libraries are imported with it.

    Raises:
        NotInstalledError: if one of them is not installed.
    """
    with optional():
        cls = resolve_name(TASKS[config.task].place)
    return cls(config)
