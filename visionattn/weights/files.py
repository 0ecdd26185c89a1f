"""Checkpoint files: read without executing anything they hold, written whole or not at all."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import VisionattnError, one_line, shortened, user_input
from .pickled import MOST_TENSORS, read_pickled

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"
"""How the name of the file ends that says, beside the parts of a checkpoint, which part holds which tensor."""
STATE_FILES = re.compile(
    r"(optimizer|scheduler|scaler|sampler|random_states|rng_state|training_args|custom_checkpoint)"
)
"""How the names begin of what training frameworks keep beside the weights."""
MOST_HEADER = 1 << 25
"""Bytes of a safetensors header: a hundred times the largest that we know."""
DESCRIPTION = "visionattn"
"""Entry of a safetensors header that says, as JSON, which model the weights belong to and how they are used."""
CONTENT_HASH = "content_sha256"
"""Entry of a safetensors header that guards the tensors and the other entries of the header."""


def read_checkpoint(path: str | PathLike, digest: Any = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a checkpoint file, read without executing anything it holds.

    The checksums of torch.save's archives and the content hash of files that `write_checkpoint` made are verified.

    Args:
        path: a safetensors file, one that torch.save wrote, the index of one in parts (`*.index.json`), or a folder
            with one of these.
        digest: hash object of hashlib's, which takes the bytes of the file; of one in parts, those of the index.

    Returns:
        the (nested, where torch.save wrote it) dictionary of tensors and plain values that the file holds, and the
        safetensors header's metadata. Objects of other kinds are left out.

    Raises:
        VisionattnError: if the file is missing or damaged, holds a module pickled whole, or would expand past a small
            multiple of its size.
    """
    path = find_file(path)
    try:
        if not path.is_file():
            raise FileNotFoundError
    except (OSError, ValueError) as e:  # names that are too long, or hold a zero
        raise VisionattnError(f"checkpoint {shortened(path)} does not exist or is not a file") from e
    try:
        with open(path, "rb") as file:
            if digest is not None:
                hashlib.file_digest(file, lambda: digest)
                file.seek(0)
            if path.name.endswith(INDEX):
                return _read_parts(path, file.read(MOST_HEADER + 1)), {}
            head = file.read(9)  # of safetensors: the length of a JSON header, and its brace
            pickled = head[:1] in (b"P", b"\x80") and head[8:] != b"{"
            header = int.from_bytes(head[:8], "little")
            if not pickled and head[8:] == b"{" and MOST_HEADER < header < os.fstat(file.fileno()).st_size:
                raise VisionattnError(f"is refused: its header of {header} bytes is longer than {MOST_HEADER}")
            content, metadata = (read_pickled(file), {}) if pickled else _read_safetensors(file)
    except VisionattnError as e:
        raise VisionattnError(f"checkpoint {path} {e}") from e
    except Exception as e:  # damaged bytes cause whatever they like
        raise VisionattnError(f"checkpoint {path} is damaged ({one_line(e)})") from e
    if not isinstance(content, Mapping):
        raise VisionattnError(f"checkpoint {path} holds a {type(content).__name__}, expected a dictionary of tensors")
    return dict(content), metadata


def find_file(path: str | PathLike) -> Path:
    """The checkpoint in a folder, by the names that the Hugging Face hub and timm use, or the file itself.

    Args:
        path: a folder or a file.

    Raises:
        VisionattnError: if the folder holds none, or several of which none has such a name.
    """
    path = Path(path)
    try:
        files = sorted(file for file in path.iterdir() if file.is_file())
    except (OSError, ValueError):  # no folder
        return path
    for name in (*HUB_FILES, *(name + INDEX for name in HUB_FILES)):
        if path / name in files:
            return path / name
    for suffix in (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".tar"):
        found = [f for f in files if f.suffix == suffix and not STATE_FILES.match(f.name)]
        if len(found) > 1:
            names = ", ".join(shortened(file.name) for file in found[:4])
            raise VisionattnError(f"{path} holds {len(found)} checkpoints ({names}, ...): name the file")
        if found:
            return found[0]
    raise VisionattnError(f"{path} holds no checkpoint: expected {', '.join(HUB_FILES)} or another")


def _read_parts(path: Path, text: bytes) -> dict[str, Tensor]:
    """The tensors of a checkpoint that is written in several files, by its index."""
    parts = json.loads(text)["weight_map"] if len(text) <= MOST_HEADER else {}
    names = sorted(set(parts.values()))
    if wrong := [name for name in names if Path(name).name != name or name.endswith(INDEX)]:
        raise VisionattnError(f"is refused: it names {shortened(wrong[0])}, not a file beside it")
    tensors = {}
    for name in names:
        tensors |= read_checkpoint(path.with_name(name))[0]
    if missing := sorted(parts.keys() - tensors.keys()):
        raise VisionattnError(f"is damaged: its parts lack {len(missing)} tensors ({shortened(missing[0])}, ...)")
    return {key: tensors[key] for key in parts}


def _read_safetensors(file: BinaryIO) -> tuple[dict[str, Tensor], dict[str, str]]:
    opened = f"/dev/fd/{file.fileno()}"  # safetensors opens it twice: its name may be another file by then
    try:
        with safe_open(opened if os.path.exists(opened) else file.name, framework="pt") as content:
            if len(keys := content.keys()) > MOST_TENSORS:
                raise VisionattnError(f"is refused: it has {len(keys)} tensors, more than {MOST_TENSORS}")
            tensors = {key: content.get_tensor(key) for key in keys}
            metadata = content.metadata() or {}
    except SafetensorError as e:
        raise VisionattnError(f"is damaged, or neither safetensors nor of torch.save ({one_line(e)})") from e
    expected = metadata.pop(CONTENT_HASH, None)
    if expected not in (None, content_hash(tensors, metadata)):
        raise VisionattnError("is damaged (its content does not match its hash)")
    return tensors, metadata


def content_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of tensors, with their names, types and shapes, and metadata.

    Args:
        tensors: by name.
        metadata: by name.
    """
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for key, value in sorted(tensors.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        value = value.detach().cpu().contiguous()
        # One value alone is contiguous whatever its stride, which a view as bytes would mind.
        digest.update(value.as_strided((value.numel(),), (1,)).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_checkpoint(
    path: str | PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], replace: bool = True
) -> None:
    """Write a safetensors file with a content hash, whole or not at all, and read it again to be sure.

    Args:
        path: of the file.
        tensors: by name; they may share memory.
        metadata: texts for the header.
        replace: one that is there.

    Raises:
        VisionattnError: if it cannot be written, for want of space or otherwise; what was there stays.
    """
    path = Path(path)
    separate, seen = {}, set()
    for key, value in tensors.items():  # safetensors refuses tensors that share memory, as tied parameters do
        separate[key] = value.clone() if value.data_ptr() in seen else value.contiguous()
        seen.add(value.data_ptr())
    metadata = dict(metadata)
    metadata[CONTENT_HASH] = content_hash(separate, metadata)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777  # as the umask has it; safetensors makes files for their owner alone
        save_file(separate, temporary, metadata)
        temporary.chmod(mode)
        read_checkpoint(temporary)
        place(temporary, path, replace)
    except (OSError, SafetensorError) as e:
        raise VisionattnError(f"cannot write {path}: {one_line(e)}") from e
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: str | Callable[[BinaryIO], Any], replace: bool = True) -> None:
    """Write a small file, whole or not at all.

    Args:
        path: of the file.
        content: a text, or what is called with the file and writes to it.
        replace: one that is there.

    Raises:
        VisionattnError: if it cannot be written; what was there stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with user_input(f"cannot write {path}", OSError):
        try:
            if isinstance(content, str):
                temporary.write_text(content, errors="backslashreplace")  # names of files need not be text
            else:
                with temporary.open("wb") as file:
                    content(file)
            place(temporary, path, replace)
        finally:
            temporary.unlink(missing_ok=True)


def place(temporary: Path, path: Path, replace: bool = True) -> None:
    """Put a finished file in its place, once its bytes are on the disk.

    Args:
        temporary: the file, in the folder of `path` or in one inside of it.
        path: its place.
        replace: a file that is there; else one that came there since it was looked for stays.

    Raises:
        VisionattnError: if there is one that is not to be replaced.
    """
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    if not replace:
        try:
            os.link(temporary, path)
        except OSError:  # which it also is where file systems have no links
            if path.exists():
                raise VisionattnError(f"{path} exists, and did not when this began: it stays as it is") from None
            replace = True
        else:
            temporary.unlink()
    if replace:
        os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from a file or folder, by a hidden file beside it that goes with the last of them.

    Args:
        path: of what they are to wait for.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    name = path.with_name(f".{path.name}.lock")
    with user_input(f"cannot write {path}", OSError):
        while True:
            lock = open(name, "w")  # noqa: SIM115
            with suppress(OSError):  # some file systems have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), name.stat()):
                    break
            lock.close()  # whoever held it has removed it
    try:
        yield
    finally:
        name.unlink(missing_ok=True)
        lock.close()
