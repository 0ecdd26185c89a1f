"""The images that somebody names for predictions: files, folders, patterns, addresses, and stdin."""

import glob
import io
import os
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import unquote, urlsplit

from PIL import Image

from ..data.images import to_mode, why_unreadable
from ..data.paths import EXTENSIONS, find_files, is_data, regular
from ..errors import VisionattnError, shortened, user_input
from ..weights.download import PATIENCE, is_address

MOST_BYTES = 2**27
"""No larger file is taken from an address or stdin, which would have to be held in memory."""
MOST_SECONDS = 60.0
"""Time that an address has to send its file."""


@dataclass(frozen=True)
class Input:
    """An image that was named.

    Args:
        name: what it is called in results and errors.
        open: gives its file.
        picture: what a picture of it is called, in some folder and without a suffix.
    """

    name: str
    open: Callable[[], IO[bytes]]
    picture: Path

    def read(self, mode: str) -> Image.Image:
        """The image as `to_mode` converts it.

        Raises:
            VisionattnError: if it cannot be had or read.
        """
        try:
            with self.open() as file, Image.open(file) as image:
                return to_mode(image, mode)
        except FileNotFoundError as error:
            raise VisionattnError(f"cannot read {shortened(self.name)}: there is no such file or folder") from error
        except Exception as error:  # decoders raise whatever they like
            raise VisionattnError(f"cannot read {shortened(self.name)}: {why_unreadable(error)}") from error


def find_inputs(names: Sequence[str]) -> list[Input]:
    """The images that names stand for, in the order of the names; those of a folder or pattern sorted by path.

    Args:
        names: files, folders, which are searched to any depth, shell patterns (`**` for any depth), addresses and "-".
            One of which there is nothing, or no image in it, stands for an image that cannot be read.

    Raises:
        VisionattnError: if stdin is named twice, or a folder cannot be read.
    """
    if names.count("-") > 1:
        raise VisionattnError("there is one image on stdin: give - once")
    return [found for name in names for found in _inputs_of(name)]


def _inputs_of(name: str) -> Iterator[Input]:
    if name == "-":
        yield Input("-", _stdin, Path("stdin"))
    elif is_address(name):
        file = PurePosixPath(unquote(urlsplit(name).path)).stem
        yield Input(name, partial(_fetched, name), Path(file.replace("\0", "") or "image"))
    elif os.path.isdir(name):
        with user_input(f"cannot read {name}", OSError):
            paths = find_files(name)
        yield from _files(paths, Path(name)) if paths else [_nothing(name, "it holds no images")]
    elif os.path.lexists(name) or not glob.has_magic(name):
        yield _file(Path(name), Path(Path(name).stem))
    else:
        suffix = Path(name).suffix
        wanted = EXTENSIONS if glob.has_magic(suffix) or not suffix else (*EXTENSIONS, suffix.lower())
        paths = [Path(path) for path in sorted(glob.glob(name, recursive=True))]
        paths = [p for p in paths if p.suffix.lower() in wanted and is_data(p.name) and p.is_file()]
        fixed = takewhile(lambda part: not glob.has_magic(part), Path(name).parts[:-1])
        yield from _files(paths, Path(*fixed)) if paths else [_nothing(name, "no image matches it")]


def _nothing(name: str, told: str) -> Input:
    """What stands for a name that leads to no image."""

    def fail() -> IO[bytes]:
        raise VisionattnError(f"{told}: expected files as {', '.join(EXTENSIONS)}")

    return Input(name, fail, Path(Path(name).name))


def _files(paths: Sequence[Path], folder: Path) -> Iterator[Input]:
    """Files of a folder, whose pictures go by their places in it, with the suffix where two differ in that alone."""
    places = [path.relative_to(folder) for path in paths]
    count = Counter(place.with_suffix("") for place in places)
    for path, place in zip(paths, places, strict=True):
        yield _file(path, place if count[place.with_suffix("")] > 1 else place.with_suffix(""))


def _file(path: Path, picture: Path) -> Input:
    return Input(str(path), lambda: open(regular(path), "rb"), picture)


def refuse_namesakes(inputs: Sequence[Input]) -> None:
    """Pictures go by the names of the images.

    Raises:
        VisionattnError: if two of them are called the same.
    """
    twice = [str(name) for name, count in Counter(each.picture for each in inputs).items() if count > 1]
    if twice:
        told = f"several images are called {twice[0]}, and so would be their pictures"
        raise VisionattnError(f"{told}: give a folder, whose pictures go by their places in it")


def _stdin() -> io.BytesIO:
    return io.BytesIO(_bounded(sys.stdin.buffer))


def _fetched(address: str) -> io.BytesIO:
    """The file of an address, in memory; hosts that send it slowly, or one that is too large, are given up."""
    request = urllib.request.Request(address, headers={"User-Agent": "visionattn"})  # some refuse Python's own
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return io.BytesIO(_bounded(answer, time.monotonic() + MOST_SECONDS))


def _bounded(file: IO[bytes], until: float = float("inf")) -> bytes:
    parts, size = [], 0
    read = getattr(file, "read1", file.read)  # what there is, without waiting for more
    while part := read(2**20):
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            raise VisionattnError(f"it is larger than {MOST_BYTES >> 20} MiB")
        if time.monotonic() > until:
            raise VisionattnError(f"it did not come within {MOST_SECONDS:g} s")
    return b"".join(parts)
