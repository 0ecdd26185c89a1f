"""Fetching published weights from a mirror, the Hugging Face hub and plain addresses, into torch.hub's or its cache."""

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock
from torch.hub import get_dir

from .errors import VisionattnError
from .files import HUB_FILES, one_line, place, read_checkpoint

MIRROR = "VISIONATTN_WEIGHTS"
"""Environment variable: a folder, or the address of one, where every file is looked for first."""
HUB = "hf-hub:"
SUFFIXES = (".safetensors", ".pth")

_logger = logging.getLogger("visionattn")


def fetch(
    names: Iterable[str], sources: Iterable[str], model: str, by_hand: str = "", cache_dir: str | None = None
) -> Path:
    """A file of weights, downloaded unless it is there.

    It is looked for in the mirror under the given names and those the sources have, in the cache, where it may have
    been put by hand under the first given name, then at the sources, in order. A file comes into the cache whole
    or not at all, is read before it is taken, and is compared with the SHA-256 prefix in its name where there is one,
    in the manner of torch.hub. Processes that want the same file download it once.

    Args:
        names: what else the file may be called, without suffix, `dinat_mini.in1k` for one.
        sources: addresses, or `hf-hub:<repository>[@revision][:file]`.
        model: what errors call it.
        by_hand: where a person finds the file, for the error if nothing else is left.
        cache_dir: folder for downloads; None for torch.hub's and the hub's own.

    Raises:
        VisionattnError: if there is no source, or none that can be used; says why for each.
    """
    names, sources = list(names), list(sources)
    cache = Path(cache_dir or os.path.join(get_dir(), "checkpoints"))
    files = [f"{name}{suffix}" for name in names for suffix in SUFFIXES]
    mirrored = files + [file for source in sources for file in _mirrored(source, names)]
    mirror = os.environ.get(MIRROR, "")
    if mirror and "://" not in mirror:
        if not Path(mirror).is_dir():
            raise VisionattnError(f"{MIRROR} is neither a folder nor an address: {mirror}")
        if found := next((path for file in mirrored if (path := Path(mirror, file)).is_file()), None):
            return found
    by_name = [cache / file for file in files[: len(SUFFIXES)]]
    if found := next(filter(Path.is_file, by_name), None):
        return found
    failures = []
    if "://" in mirror:
        sources = [f"{mirror.rstrip('/')}/{file}" for file in mirrored] + sources
    for source in sources:
        try:
            if source.startswith(HUB):
                return _from_hub(source.removeprefix(HUB), cache_dir)
            return _from_url(source, cache / _file_name(source, names))
        except Exception as e:  # what the network, the hub and the disk raise is theirs
            if not (mirror and source.startswith(mirror)):
                failures.append(f"{source}: {one_line(e)}")
    if mirror:
        failures.insert(0, f"{MIRROR} {mirror} has none of {', '.join(dict.fromkeys(mirrored))}")
    place = cache / (f"{names[0]}.pth" if names else mirrored[0])
    place_it = f"save the file as {place}, or in the folder that {MIRROR} names"
    if by_hand:
        failures.append(f"download it by hand from {by_hand} and {place_it}")
    elif failures:
        failures.append(f"or {place_it}")
    raise VisionattnError(f"cannot fetch {model}: " + ("; ".join(failures) or "no weights were released"))


def _from_hub(repository: str, cache_dir: str | None) -> Path:
    repository, _, file = repository.partition(":")
    repository, _, revision = repository.partition("@")
    for name in [file] if file else HUB_FILES:
        try:
            return Path(hf_hub_download(repository, name, revision=revision or None, cache_dir=cache_dir))
        except EntryNotFoundError as e:
            if isinstance(e, LocalEntryNotFoundError):  # it may be there, but the hub cannot be asked
                raise
    raise VisionattnError(f"holds none of {', '.join(HUB_FILES)}")


def _from_url(url: str, path: Path) -> Path:
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path):
        if not path.is_file():
            _download(url, path)
    return path


def _download(url: str, path: Path) -> None:
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with open(temporary, "wb") as file:
            http_get(url, file, displayed_filename=path.name)
        expected = re.search(r"-([0-9a-f]{8,64})\.", path.name)
        if expected and not (found := _sha256(temporary)).startswith(expected[1]):
            raise VisionattnError(f"its SHA-256 is {found[:16]}..., not the {expected[1]}... of its name")
        read_checkpoint(temporary)  # a page that says sorry comes as a file too
        place(temporary, path)
    except VisionattnError as e:
        raise VisionattnError(str(e).replace(f"checkpoint {temporary}", "what it sent")) from e
    finally:
        temporary.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    lock = path.with_name(f".{path.name}.lock")
    with WeakFileLock(lock):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # who waits for it finds the file, or downloads in its turn


def _file_name(url: str, names: list[str]) -> str:
    """What an address calls its file; where it says nothing, or nothing of its own, the first name or a hash of it."""
    file = PurePosixPath(unquote(urlsplit(url).path)).name
    suffix = re.search(r"\.(safetensors|pth|pt|bin|tar|ckpt)$", file)
    if suffix and file not in HUB_FILES:
        return file
    name = names[0] if names else f"visionattn_{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    return name + (suffix[0] if suffix else ".pth")


def _mirrored(source: str, names: list[str]) -> list[str]:
    """Where a mirror may have the file of a source."""
    if not source.startswith(HUB):
        return [_file_name(source, names)]
    repository, _, file = source.removeprefix(HUB).partition(":")
    return [f"{repository.partition('@')[0]}/{file}" for file in ([file] if file else HUB_FILES)]
