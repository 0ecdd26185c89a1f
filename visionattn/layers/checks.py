"""What layers refuse of numbers that they are given, each in one line."""

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any


def check_counts(**given: int) -> None:
    """Raise ValueError unless these are integers from 1 up."""
    _check(given, Integral, lambda value: value >= 1, "an integer {} >= 1")


def check_positive(**given: float) -> None:
    """Raise ValueError unless these are finite numbers above 0."""
    _check(given, Real, lambda value: 0 < value < math.inf, "{} > 0")


def check_not_negative(**given: float) -> None:
    """Raise ValueError unless these are finite numbers from 0 up."""
    _check(given, Real, lambda value: 0 <= value < math.inf, "{} >= 0")


def check_rates(**given: float) -> None:
    """Raise ValueError unless these are between 0 and 1. What `nn.Dropout` is given it checks itself."""
    _check(given, Real, lambda value: 0 <= value <= 1, "{} between 0 and 1")


def _check(given: dict[str, Any], kind: type, accepted: Callable[[Any], bool], told: str) -> None:
    for name, value in given.items():
        if isinstance(value, bool) or not (isinstance(value, kind) and accepted(value)):
            raise ValueError(f"expected {told.format(name)}, got {value!r}")
