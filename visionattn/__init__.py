"""Vision backbones built on attention and attention-like token mixers."""

from . import data as data
from . import models as models
from . import moved as moved
from .create import create_detector as create_detector
from .create import create_model
from .create import create_segmenter as create_segmenter
from .registry import list_models, model_info, register_model

__version__ = "0.1.0"
__all__ = ["create_model", "list_models", "model_info", "register_model"]
