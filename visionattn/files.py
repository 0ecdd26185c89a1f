"""Checkpoint files: read without executing anything they hold, written whole or not at all."""

import hashlib
import os
import pickletools
import re
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import VisionattnError

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
PLAIN = {
    "collections.OrderedDict": None,
    "_codecs.encode": None,
    "argparse.Namespace": Namespace,  # scripts keep their options beside the weights
    "yacs.config.CfgNode": OrderedDict,
    "pathlib.PosixPath": PurePosixPath,
    **{f"numpy.{core}.multiarray.scalar": np._core.multiarray.scalar for core in ("core", "_core")},  # and accuracies
    "numpy.dtype": np.dtype,
    **{f"torch.{name}": None for name in ("Size", "device", "storage.TypedStorage", "storage.UntypedStorage")},
    **{f"torch._utils._rebuild_{name}": None for name in ("tensor", "tensor_v2", "parameter", "qtensor")},
}
"""What a pickle may name besides torch's types of elements and storages, and what stands for it where torch knows none.
No more: torch's own list also holds what a hostile file can use to exhaust the memory."""
ELEMENTS = re.compile(r"torch\.(\w+Storage|b?float\d+|u?int\d+|bool|complex\d+|half|double|float|long)")
DESCRIPTION = "visionattn"
"""Entry of a safetensors header that says, as JSON, which model the weights belong to and how they are used."""
CONTENT_HASH = "content_sha256"
"""Entry of a safetensors header that guards the tensors and the other entries of the header."""


def read_checkpoint(path: str | PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a checkpoint file, read without executing anything it holds.

    The checksums of torch.save's archives and the content hash of files that `write_checkpoint` made are verified.

    Args:
        path: a safetensors file, or one that torch.save wrote.

    Returns:
        The (nested, where torch.save wrote it) dictionary that the file holds, and the safetensors header's metadata.

    Raises:
        VisionattnError: if the file is missing, damaged, or holds more than tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise VisionattnError(f"checkpoint {path} does not exist or is not a file")
    try:
        with open(path, "rb") as file:
            head = file.read(9)  # of safetensors: the length of a JSON header, and its brace
            pickled = head[:2] in (b"PK", b"\x80\x02") and head[8:] != b"{"
            content, metadata = (_read_pickled(path, file), {}) if pickled else _read_safetensors(path)
    except VisionattnError as e:
        raise VisionattnError(f"checkpoint {path} {e}") from e
    except Exception as e:  # torch.load raises whatever its unpickler and archive reader meet
        raise VisionattnError(f"checkpoint {path} is damaged ({one_line(e)})") from e
    if not isinstance(content, Mapping):
        raise VisionattnError(f"checkpoint {path} holds a {type(content).__name__}, expected a dictionary of tensors")
    return dict(content), metadata


def find_file(path: str | PathLike) -> Path:
    """The checkpoint in a folder, by the names that the Hugging Face hub and timm use, or the file itself.

    Args:
        path: a folder or a file.

    Raises:
        VisionattnError: if the folder holds none.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    preferred = [path / name for name in HUB_FILES]
    found = [f for f in preferred if f.is_file()] or sorted(path.glob("*.safetensors")) or sorted(path.glob("*.pth"))
    if not found:
        raise VisionattnError(f"{path} holds no checkpoint: expected {', '.join(HUB_FILES)} or another")
    return found[0]


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as e:
        raise VisionattnError(f"is damaged, or neither safetensors nor of torch.save ({one_line(e)})") from e
    expected = metadata.pop(CONTENT_HASH, None)
    if expected not in (None, content_hash(tensors, metadata)):
        raise VisionattnError("is damaged (its content does not match its hash)")
    return tensors, metadata


def _read_pickled(path: Path, file: BinaryIO) -> object:
    file.seek(0)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise VisionattnError("is not a file of torch.save (its archive is compressed)")
            if broken := archive.testzip():
                raise VisionattnError(f"is damaged ({broken} does not match its checksum)")
            pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
            for name in pickles:
                with archive.open(name) as data:
                    _refuse_unsafe(data)
    else:
        file.seek(0)
        for _ in range(5):  # what torch.save wrote before 1.6: magic number, version, system, content, storages
            _refuse_unsafe(file)
    stand_ins = [(value, name) for name, value in PLAIN.items() if value is not None]
    dtypes = [type(np.dtype(kind)) for kind in "?bhilBHILefd"]
    with torch.serialization.safe_globals([*stand_ins, *dtypes]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _refuse_unsafe(pickled: BinaryIO) -> None:
    for opcode, name, _ in pickletools.genops(pickled):
        if opcode.name in ("GLOBAL", "INST"):
            name = name.replace(" ", ".")
            if name not in PLAIN and not ELEMENTS.fullmatch(name):
                raise VisionattnError(
                    f"is refused: its pickle names {name}, more than tensors, plain containers and options"
                )
        elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            raise VisionattnError(f"is refused: its pickle uses {opcode.name}, which torch.save does not")


def content_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of tensors, with their names, types and shapes, and metadata.

    Args:
        tensors: by name.
        metadata: by name.
    """
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for key, value in sorted(tensors.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_checkpoint(path: str | PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with a content hash, whole or not at all, and read it again to be sure.

    Args:
        path: of the file; one that is there is replaced.
        tensors: by name; they may share memory.
        metadata: texts for the header.

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
        save_file(separate, temporary, metadata)
        temporary.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that only their owner may read
        read_checkpoint(temporary)
        place(temporary, path)
    except (OSError, SafetensorError) as e:
        raise VisionattnError(f"cannot write {path}: {one_line(e)}") from e
    finally:
        temporary.unlink(missing_ok=True)


def place(temporary: Path, path: Path) -> None:
    """Put a finished file in its place, once its bytes are on the disk.

    Args:
        temporary: the file, in the folder of `path`.
        path: its place.
    """
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def one_line(error: Exception) -> str:
    """What an error says, cut to its first line."""
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]
