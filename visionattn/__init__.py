"""Vision backbones built on attention and attention-like token mixers."""

from importlib import import_module as _import_module
from types import ModuleType as _ModuleType

from . import data as data
from . import models as models
from . import moved as moved
from .create import create_detector as create_detector
from .create import create_model
from .create import create_segmenter as create_segmenter
from .layers.product import set_pointwise
from .layers.spectral import fold, sigma_reparam
from .models.mixers import list_mixers
from .models.skeletons import mixer_info
from .quantize import quantize
from .registry import list_models, model_info, register_model
from .swap import replace_attention
from .version import __version__ as __version__

__all__ = [
    "create_model",
    "fold",
    "list_mixers",
    "list_models",
    "mixer_info",
    "model_info",
    "quantize",
    "register_model",
    "replace_attention",
    "set_pointwise",
    "sigma_reparam",
]


def __getattr__(name: str) -> _ModuleType:
    """A module by the name that it had."""
    if name not in moved.MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _import_module(f"{__name__}.{name}")
