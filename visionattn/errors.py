"""What visionattn raises when it was asked for something it cannot do. The message is one line."""

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

UNUSABLE = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP)
"""What the system says of paths that somebody gave, where there is nothing to be looked for."""
OUT_OF_MEMORY = "can't allocate memory", "out of memory", "Storage size calculation overflowed"
"""What torch says then."""
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


INSTALL = {
    **dict.fromkeys(
        ("accelerate", "docstring_parser", "typeshed_client", "matplotlib", "sklearn"),
        "'visionattn[train]'",
    ),
    "tensorboard": "'visionattn[train]'",
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime", "openvino", "torchao"), "'visionattn[export]'"),
    **dict.fromkeys(
        ("albumentations", "cv2", "faster_coco_eval", "segmentation_models_pytorch", "torchmetrics"),
        "'visionattn[dense]'",
    ),
    "gradio": "'visionattn[demo]'",
    "datasets": "datasets",
}
"""What pip is to be asked for, by the names under which the libraries are imported that a base install lacks."""


class VisionattnError(ValueError):
    """A request that cannot be met; says what was given and what is accepted, in one line."""

    def __init__(self, told: object = "") -> None:
        super().__init__(printable(told))


class NotInstalledError(VisionattnError, ImportError):
    """A request needs a library that is not installed."""


class UnknownModelError(VisionattnError, RuntimeError):
    """No model is registered under a name."""


class UnknownArgumentError(VisionattnError, TypeError):
    """A model does not take an argument of that name, or not of that type."""


@contextmanager
def told_of(place: str, *kinds: type[Exception]) -> Iterator[None]:
    """Names the place in errors.

    Args:
        place: what they are about.
        kinds: of other errors, which become one line: what layers raise that a file asks for what cannot be, for one.
    """
    try:
        yield
    except NotInstalledError:
        raise
    except VisionattnError as error:
        raise type(error)(f"{place}: {error}") from error
    except kinds as error:
        raise VisionattnError(f"{place} cannot be met ({one_line(error)})") from error


@contextmanager
def user_input(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn what a library raises about something that the user gave into one clear line.

    Args:
        what: cannot be done, with the name of what was given.
        kinds: of errors that are the user's to mend.

    Raises:
        VisionattnError: in place of those.
    """
    try:
        yield
    except VisionattnError:
        raise
    except kinds as error:
        raise VisionattnError(f"{what}: {all_lines(error)}") from error


@contextmanager
def optional() -> Iterator[None]:
    """Around what imports libraries that a base install lacks: says in one line what to install.

    Raises:
        NotInstalledError: if one of them is not installed.
    """
    try:
        yield
    except VisionattnError:
        raise
    except ImportError as error:
        told = (error.name or str(error)).replace("-", "_")
        if (lacking := next((name for name in INSTALL if re.search(rf"\b{name}\b", told)), None)) is None:
            raise
        raise NotInstalledError(f"this needs {lacking}: python -m pip install {INSTALL[lacking]}") from error


def require(*names: str) -> None:
    """Look for libraries that will be imported later, when there would be something to lose.

    Args:
        names: under which they are imported.

    Raises:
        NotInstalledError: if one of them is not installed.
    """
    with optional():
        for name in names:
            if find_spec(name) is None:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def run(main: Callable[[list[str]], int | None]) -> int:
    """Call a script's main with its arguments; the exit code, with one line on stderr for what the user can mend.

    Args:
        main: the script; what it returns is the exit code, None is 0.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of files need not be text, nor terminals know every character
            stream.reconfigure(errors="backslashreplace")
    try:
        with optional():
            code = main(sys.argv[1:]) or 0
        sys.stdout.flush()
        return code
    except VisionattnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads the results has had enough of them, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return 141  # as shells put it
    except OSError as error:
        if error.errno == errno.ENOSPC:
            print("error: no space is left where the results go", file=sys.stderr)
            return 2
        if error.errno not in UNUSABLE or error.filename is None:
            raise
        print(f"error: cannot use {shortened(error.filename)}: {error.strerror}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(told in str(error) for told in OUT_OF_MEMORY):
            raise
        print(f"error: this takes more memory than there is ({one_line(error)[:LONGEST]})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def one_line(error: Exception) -> str:
    """What an error says, cut to its first line."""
    return printable((str(error).strip() or type(error).__name__).split("\n")[0])[:200]


def all_lines(error: Exception) -> str:
    """What an error says, its lines joined to one."""
    return printable(" ".join(str(error).split()) or type(error).__name__)
