"""Weights: files that are read without executing anything, fetched, converted from published layouts and fitted."""

from .files import read_checkpoint as read_checkpoint
from .files import write_checkpoint as write_checkpoint
from .layouts import Rule as Rule
from .layouts import check_held as check_held
from .layouts import convert_state_dict as convert_state_dict
from .layouts import find_widths as find_widths
from .layouts import fit_state_dict as fit_state_dict
from .layouts import load_checkpoint as load_checkpoint
from .layouts import load_pretrained as load_pretrained
from .layouts import renumber as renumber
