"""Token mixers by name, as the skeletons, `replace_attention` and the comparison take them."""

from .blocks import PluggedIn as PluggedIn
from .entry import Mixer as Mixer
from .entry import Place as Place
from .entry import mix as mix
from .table import MIXERS as MIXERS
from .table import find_mixer as find_mixer
from .table import list_mixers as list_mixers
