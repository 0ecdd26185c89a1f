"""What visionattn raises when it was asked for something it cannot do. The message is one line."""

from collections.abc import Iterable


class VisionattnError(ValueError):
    """A request that cannot be met; says what was given and what is accepted."""


class UnknownModelError(VisionattnError, RuntimeError):
    """No model is registered under a name."""


class UnknownArgumentError(VisionattnError, TypeError):
    """A model does not take an argument of that name."""


def check_arguments(name: str, given: Iterable[str], accepted: Iterable[str]) -> None:
    """Refuse arguments that `name` does not take.

    Raises:
        UnknownArgumentError: says which they are and what is accepted.
    """
    if unknown := sorted(set(given) - set(accepted)):
        told = f"{name} got unknown arguments {', '.join(unknown)}; it takes {', '.join(sorted(accepted))}"
        raise UnknownArgumentError(told)
