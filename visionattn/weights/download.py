"""Fetching published weights from a mirror, the Hugging Face hub and plain addresses, into torch.hub's or its cache."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, get_session
from torch.hub import get_dir

from ..errors import VisionattnError, one_line, shortened
from ..registry import Variant, Weights
from .files import HUB_FILES, find_file, place, read_checkpoint

MIRROR = "VISIONATTN_WEIGHTS"
"""Environment variable: a folder, or the address of one, where every file is looked for first."""
HUB = "hf-hub:"
SUFFIXES = (".safetensors", ".pth")
HASHED = re.compile(r"-([0-9a-f]{8,64})\.")
"""What torch.hub's file names say of their content."""
PATIENCE = 5.0
"""Seconds for a server's first answer."""


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
    if wrong := [source for source in sources if not source.startswith(HUB) and not is_address(source)]:
        raise VisionattnError(f"cannot fetch {model}: expected an address or {HUB}..., got {shortened(wrong[0])}")
    files = [f"{name}{suffix}" for name in names for suffix in SUFFIXES]
    mirrored = list(dict.fromkeys(files + [file for source in sources for file in _mirrored(source, names)]))
    mirror = os.environ.get(MIRROR, "")
    remote = is_address(mirror)
    if mirror and not remote:
        if not os.path.isdir(mirror):
            raise VisionattnError(f"{MIRROR} is neither a folder nor an address: {shortened(mirror)}")
        if found := next((path for file in mirrored if (path := Path(mirror, file)).is_file()), None):
            return found
    by_name = [cache / file for file in files[: len(SUFFIXES)]]
    if found := next(filter(Path.is_file, by_name), None):
        return found
    failures, silent = [], {}
    try:
        for file in mirrored if remote else ():
            address = f"{mirror.rstrip('/')}/{file}"
            with suppress(_Missing):
                return _from_url(address, cache / _cached(address, names), silent)
        failures += [f"{MIRROR} {shortened(mirror)} has none of {', '.join(mirrored)}"] if mirror else []
    except Exception as e:  # what the network, the hub and the disk raise is theirs
        failures.append(f"{MIRROR} {shortened(mirror)}: {one_line(e)}")
    hub_is_asked = bool(silent) or not mirror  # one that answers would have what may be had
    for source in sources:
        try:
            if source.startswith(HUB):
                return from_hub(source.removeprefix(HUB), cache_dir, hub_is_asked)
            return _from_url(source, cache / _cached(source, names), silent)
        except Exception as e:
            failures.append(f"{shortened(source)}: {one_line(e)}")
    place = cache / (f"{names[0]}.pth" if names else _cached(sources[0], names) if sources else "w.pth")
    place_it = f"save the file as {place}, or in the folder that {MIRROR} names"
    if by_hand:
        failures.append(f"download it by hand from {by_hand} and {place_it}")
    elif failures:
        failures.append(f"or {place_it}")
    raise VisionattnError(f"cannot fetch {model}: " + ("; ".join(failures) or "no weights were released"))


def find_published(name: str, cfg: dict, overlay: dict, variant: Variant, cache_dir: str | None) -> Path | dict:
    """The file, fetched if need be, or the state dict that `pretrained=True` asks for.

    Args:
        name: of the model.
        cfg: timm's configuration of the weights.
        overlay: entries in place of those.
        variant: of the model.
        cache_dir: folder for downloads; None for the usual ones.

    Raises:
        VisionattnError: if it is nowhere to be had.
    """
    places = overlay if any(overlay.get(key) for key in ("state_dict", "file", "url", "hf_hub_id")) else cfg
    if places.get("state_dict"):
        return places["state_dict"]
    if places.get("file"):
        return find_file(places["file"])
    tag, first = cfg.get("tag") or "", next(iter(variant.weights), "")
    published = variant.weights.get(tag, Weights())
    sources = []
    if hub := places.get("hf_hub_id"):
        sources.append(f"{HUB}{hub}" + (f":{places['hf_hub_filename']}" if places.get("hf_hub_filename") else ""))
    if url := places.get("url") or None:
        sources += published.urls if url in published.urls else [url]
    if places.get("hf_hub_id") != published.hf_hub_id or url not in (*published.urls, None):
        # Somebody's own weights, which no file that goes by the model's name may stand in for.
        return fetch([], sources, name, cache_dir=cache_dir)
    names = [f"{name}.{tag}"] if tag else []
    if tag == first:
        names.append(name)
    by_hand = f"{published.page} ({published.note})" if published.page and published.note else published.page
    return fetch(names, sources, names[0], by_hand, cache_dir)


class _Missing(VisionattnError):
    """An address has no file."""


def from_hub(repository: str, cache_dir: str | None = None, asked: bool = True) -> Path:
    """A file of a repository on the Hugging Face hub, or in its cache where the hub does not answer.

    Args:
        repository: `user/repository`, and `@revision` and `:file` where they are not the usual ones.
        cache_dir: of the hub's; None for the usual one.
        asked: ask the hub at all, in one short try first.

    Raises:
        VisionattnError: if neither has it, or the hub must not be asked (`HF_HUB_OFFLINE`).
    """
    repository, _, file = repository.partition(":")
    repository, _, revision = repository.partition("@")
    silence = "" if asked else f"is not asked where {MIRROR} is named"
    try:
        if asked:
            get_session().request("HEAD", constants.ENDPOINT, timeout=PATIENCE)
    except Exception as e:
        silence = f"{constants.ENDPOINT} does not answer ({one_line(e)})"
    files = [file] if file else HUB_FILES
    for name in files:
        try:
            options = {"cache_dir": cache_dir, "local_files_only": bool(silence)}
            return Path(hf_hub_download(repository, name, revision=revision or None, **options))
        except EntryNotFoundError as e:
            if isinstance(e, LocalEntryNotFoundError) and not silence:  # it may be there, but the hub cannot be asked
                raise
    raise VisionattnError(f"{silence}, and the cache has none" if silence else f"holds none of {', '.join(files)}")


def _from_url(url: str, path: Path, silent: dict[str, str]) -> Path:
    """The file of an address.

    Args:
        url: the address.
        path: of the file in the cache.
        silent: hosts that were found not to answer, and what happened.
    """
    if path.is_file() and _matches(path):
        return path
    host = urlsplit(url).netloc
    if host in silent:
        raise VisionattnError(silent[host])
    try:
        answer = get_session().request("HEAD", url, timeout=PATIENCE)
    except Exception as e:
        silent[host] = f"does not answer ({one_line(e)})"
        raise VisionattnError(silent[host]) from e
    if answer.status_code in (404, 410):  # others may only be meant for what a HEAD is
        raise _Missing(f"has no such file (status {answer.status_code})")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path):
        if not path.is_file() or not _matches(path):
            _download(url, path)
    return path


def _download(url: str, path: Path) -> None:
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with open(temporary, "wb") as file:
            # torch.hub's own takes half a file for the whole where a connection is cut (1 of 2 MB, without an error),
            # and does not go on where it was; hf_hub_download knows repositories only. This is what is below it.
            http_get(url, file, displayed_filename=path.name)
        if not _matches(temporary):
            expected = HASHED.search(path.name)[1]
            raise VisionattnError(f"its SHA-256 is {_sha256(temporary)[:16]}..., not the {expected}... of its name")
        read_checkpoint(temporary)  # a page that says sorry comes as a file too
        place(temporary, path)
    except VisionattnError as e:
        raise VisionattnError(str(e).replace(f"checkpoint {temporary}", "what it sent")) from e
    finally:
        temporary.unlink(missing_ok=True)


def _matches(path: Path) -> bool:
    """Whether a file is what its name says, if it says so."""
    expected = HASHED.search(path.name)
    return expected is None or _sha256(path).startswith(expected[1])


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


def is_address(text: str) -> bool:
    """Whether a text is an http or https address."""
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _file_name(url: str, names: list[str]) -> str:
    """What an address calls its file; where it says nothing, or nothing of its own, the first name or a hash of it."""
    file = PurePosixPath(unquote(urlsplit(url).path)).name
    suffix = re.search(r"\.(safetensors|pth|pt|bin|tar|ckpt)$", file)
    if suffix and file not in HUB_FILES:
        return file
    name = names[0] if names else f"visionattn_{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    return name + (suffix[0] if suffix else ".pth")


def _cached(url: str, names: list[str]) -> str:
    """What the file of an address is called in the cache: other addresses' files may have its name, and other bytes.

    A name that holds a hash of the content belongs to it, and stays as torch.hub has it; so does a model's own name.
    """
    file = _file_name(url, names)
    if HASHED.search(file) or PurePosixPath(file).stem in names:
        return file
    stem, _, suffix = file.rpartition(".")
    return f"{stem[:100]}.{hashlib.sha256(url.encode()).hexdigest()[:12]}.{suffix}"


def _mirrored(source: str, names: list[str]) -> list[str]:
    """Where a mirror may have the file of a source."""
    if not source.startswith(HUB):
        return [_file_name(source, names)]
    repository, _, file = source.removeprefix(HUB).partition(":")
    return [f"{repository.partition('@')[0]}/{file}" for file in ([file] if file else HUB_FILES)]
