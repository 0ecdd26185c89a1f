"""What a model looks at: attention maps, gates and kernels of its blocks, Grad-CAM and attention rollout."""

from .capture import attention_maps as attention_maps
from .map import Map as Map
from .maps import layer_maps as layer_maps
from .relevance import Relevance as Relevance
from .relevance import cam_layers as cam_layers
from .relevance import grad_cam as grad_cam
from .relevance import rollout as rollout
