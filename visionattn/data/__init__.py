"""Images for training and validation: where they come from, how they are prepared, in which order they come."""

from .preprocessing import create_transform as create_transform
