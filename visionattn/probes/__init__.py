"""Frozen-feature evaluation: how good what a backbone makes of images is, with nothing of it trained."""

from .drawing import draw_attention as draw_attention
from .features import frozen_features as frozen_features
from .files import load_probe as load_probe
from .files import save_probe as save_probe
from .heads import AttentiveProbe as AttentiveProbe
from .heads import LinearProbe as LinearProbe
from .knn import knn_classifier as knn_classifier
from .protocol import fit as fit
from .protocol import lars as lars
