"""Weights: files that are read without executing anything, fetched, converted from published layouts and fitted."""

from .files import read_checkpoint as read_checkpoint
from .files import write_checkpoint as write_checkpoint
from .layouts import convert_state_dict as convert_state_dict
from .layouts import load_checkpoint as load_checkpoint
