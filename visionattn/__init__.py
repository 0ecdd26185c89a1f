"""Vision backbones built on attention and attention-like token mixers."""

from importlib import import_module
from typing import Any

from . import data as data
from . import models as models
from . import moved as moved
from .create import create_model
from .errors import optional as _optional
from .registry import list_models, model_info, register_model

__version__ = "0.1.0"
__all__ = ["create_model", "list_models", "model_info", "register_model"]

_HEAVY = {"create_detector": ".heads.detector", "create_segmenter": ".heads.segmenter"}


def __getattr__(name: str) -> Any:
    """`create_detector` and `create_segmenter`, whose libraries are imported when one is asked for."""
    if name not in _HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _optional():
        return getattr(import_module(_HEAVY[name], __name__), name)
