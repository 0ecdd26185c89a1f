"""What visionattn raises when it was asked for something it cannot do. The message is one line."""

from collections.abc import Iterable

LONGEST = 300
"""Characters that are shown of a name, a path or an address that somebody gave."""


def printable(text: object) -> str:
    """A text in one line: line breaks and whatever else does not print are escaped, as Python writes them in strings.

    Args:
        text: what is to be told, with names of models, classes, files and addresses in it.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: object, longest: int = LONGEST) -> str:
    """A name in one line, cut in its middle if it is too long to be read.

    Args:
        text: the name.
        longest: characters that remain.
    """
    text = printable(text)
    return text if len(text) <= longest else f"{text[: longest // 2]}...{text[3 - longest // 2 :]}"


class VisionattnError(ValueError):
    """A request that cannot be met; says what was given and what is accepted, in one line."""

    def __init__(self, told: object = "") -> None:
        super().__init__(printable(told))


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
