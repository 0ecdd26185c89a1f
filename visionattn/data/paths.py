"""Which files of a folder are data, and which of them the names in annotations mean."""

import os
import re
import reprlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..errors import VisionattnError, shortened

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SYNONYMS = [("train", "training"), ("validation", "val", "valid", "eval", "evaluation")]
SPLITS = [*(name for group in SYNONYMS for name in group), "test", "testing"]
LEFTOVERS = {
    "__macosx", "__pycache__", "@eadir", "@tmp", "#recycle", "$recycle.bin", "system volume information", "lost+found",
    "thumbs.db", "ehthumbs.db", "desktop.ini",
}  # fmt: skip
"""What archivers, file servers and desktops leave in folders."""
QUOTED = reprlib.Repr()
"""Writes values for errors; what aliases of YAML put into each other again and again is cut short."""
QUOTED.maxlevel, QUOTED.maxlist, QUOTED.maxdict, QUOTED.maxstring, QUOTED.maxother = 4, 9, 9, 80, 80
FOREIGN = re.compile(r"/|[A-Za-z]:/|[a-z]+://")
"""Begins a name that means a place of some machine."""


def is_data(name: str) -> bool:
    """Whether a file or folder of that name may be data: no hidden one, nothing that systems leave behind."""
    return not name.startswith(".") and name.casefold() not in LEFTOVERS


def find_files(folder: str | Path, extensions: Sequence[str] = EXTENSIONS, deep: bool = True) -> list[Path]:
    """Files with one of the extensions, sorted by path; links are followed, no folder is read twice.

    Args:
        folder: where they are.
        extensions: in lower case, with their points.
        deep: look into the folders below too.
    """
    return sorted(Path(path) for path in _walk(str(folder), tuple(extensions), deep, set()))


def _walk(folder: str, extensions: tuple[str, ...], deep: bool, seen: set[tuple[int, int]]) -> Iterator[str]:
    pending = [folder]
    while pending:  # a loop of links is as deep as the system allows, a recursion is not
        folder = pending.pop()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            below = []
            for entry in entries:
                if not is_data(entry.name):
                    continue
                if os.path.splitext(entry.name)[1].lower() in extensions and not _is_folder(entry):
                    yield entry.path
                elif deep and _is_folder(entry):
                    below.append(entry.path)
        pending += sorted(below, reverse=True)  # which of two ways to a folder is taken must not vary


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def class_files(folder: Path) -> dict[str, list[Path]]:
    """Images of each folder in a folder, those of deeper ones included.

    Raises:
        OSError: a folder cannot be read.
    """
    status = os.stat(folder)
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if is_data(entry.name) and _is_folder(entry)]
    # A link back to the folder itself would make images of all classes those of one.
    above = {(status.st_dev, status.st_ino)}
    return {name: [Path(p) for p in _walk(str(folder / name), EXTENSIONS, True, set(above))] for name in names}


def child(folder: Path, names: Sequence[str], test: Callable[[Path], bool] = Path.is_dir) -> Path | None:
    """The first of the names that a folder holds, in any case of letters."""
    for name in names:
        if test(folder / name):
            return folder / name
    if not folder.is_dir():
        return None
    with os.scandir(folder) as entries:
        there = {entry.name.casefold(): folder / entry.name for entry in sorted(entries, key=lambda e: e.name)}
    found = (there.get(name.casefold()) for name in names)
    return next((path for path in found if path is not None and test(path)), None)


def regular(path: str | Path) -> str | Path:
    """The path, if what it leads to is a file, not a pipe or a device that could be read without end.

    Raises:
        OSError: it is none.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("it is no regular file")
    return path


def is_plain(name: str) -> bool:
    """Whether a name means a file in a folder or deeper, as it stands."""
    return not (FOREIGN.match(name) or "\\" in name or "\0" in name or ".." in name.split("/"))


def inside(path: str | Path, root: Path) -> Path | None:
    """A path as seen from a folder, if it is in it, by its name or by where it leads.

    Links of the folder may lead elsewhere: it is the user who made them. Names that climb out of it may not.
    """
    try:
        path, folder = Path(os.path.abspath(path)), Path(os.path.abspath(root))
        if not path.is_relative_to(folder):
            path, folder = path.resolve(), folder.resolve()
        return root / path.relative_to(folder) if path.is_relative_to(folder) else None
    except (OSError, ValueError, RuntimeError):  # a zero in the name, a loop of links
        return None


def locate(
    name: str, folders: Sequence[Path], root: Path, test: Callable[[Path], bool] = os.path.isfile
) -> Path | None:
    """What annotations mean by a name, looked for in some folders; None if there is nothing of that name in `root`.

    Paths of another machine, backslashes among them, and those that climb are looked for by their last parts, the
    longest first.

    Args:
        name: as the annotations have it.
        folders: in `root`; the earlier ones go first.
        root: the folder of the data, out of which no name leads.
        test: what it must be.
    """
    if not name or len(name) > 4096:  # no system has longer ones
        return None
    for spelt in dict.fromkeys((name, name.replace("\\", "/"))):
        for folder in folders:
            path = folder / spelt if is_plain(spelt) else inside(folder / spelt, root)
            if path is not None and test(path):
                return path
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..")][-8:]
    for start in range(len(parts)):
        for folder in folders:
            path = folder.joinpath(*parts[start:])
            if test(path):
                return path
    return None


def refuse_outside(name: str, root: Path, where: str) -> None:
    """Raise an error for a name that `locate` did not find.

    Raises:
        VisionattnError: says whether it leads out of the folder.
    """
    what = "is not there" if is_plain(name) else "is there neither as it stands nor by its last part"
    outside = "" if inside(Path(root, name.replace("\\", "/")), root) else ", and nothing outside of it is read"
    raise VisionattnError(f"{where} {shown(name)}, which {what} in {root} (data.root){outside}")


def shown(value: object) -> str:
    """A value of a file as errors quote it: in one line, and cut where it is long."""
    if isinstance(value, str) and value:
        return shortened(value, 80)
    try:
        return shortened(QUOTED.repr(value), 80)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list in a list in ...
        return f"a {type(value).__name__}"
