"""The two scaffolds every family fills in: `Hierarchical` (stages on maps) and `Isotropic` (one sequence of tokens).

They hold what every backbone repeats: timm's model contract (features, intermediates, heads, gradient checkpointing,
parameter groups), input checks and position tables that follow the input size.
"""

from .base import FORMATS as FORMATS
from .base import Backbone as Backbone
from .base import InputCheck as InputCheck
from .base import check_output_format as check_output_format
from .hierarchical import POOLS as POOLS
from .hierarchical import Hierarchical as Hierarchical
from .hierarchical import Stage as Stage
from .hierarchical import check_lengths as check_lengths
from .isotropic import Isotropic as Isotropic
from .mechanics import Mechanics as Mechanics
