"""What a frozen backbone makes of images, once and for all."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..data.images import ImageSet
from ..errors import VisionattnError, user_input
from ..explain.capture import evaluating
from ..layers.key_driven_gqa import changing_allocations, kept
from ..weights.files import content_hash, locked

KINDS = ("class", "mean", "patches", "all")
"""The class token; the mean of the patches, or of the map; each of these; the class token and each of these."""


def has_class_token(model: nn.Module) -> bool:
    """Whether the last block of a backbone has a class token.

    Args:
        model: one of ours or timm's.
    """
    takes = signature(model.forward_intermediates).parameters if hasattr(model, "forward_intermediates") else ()
    return "return_prefix_tokens" in takes and getattr(model, "cls_token", None) is not None


@torch.no_grad()
def last_block(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the last block of a backbone returns, before the last norm: the map, and the class token.

    Nothing of the backbone changes: it runs in eval mode, and is left in the mode that it was in.

    Args:
        model: one of ours or timm's.
        images: (B, C, H, W).

    Returns:
        (B, C', H', W') and (B, C'), or None.

    Raises:
        VisionattnError: if the model does not give what its blocks return.
    """
    if not hasattr(model, "forward_intermediates"):
        raise VisionattnError(f"{type(model).__name__} has no forward_intermediates: its features cannot be probed")
    options = {"indices": 1, "norm": False, "output_fmt": "NCHW", "intermediates_only": True}
    with evaluating(model), kept(changing_allocations(model)):
        if has_class_token(model):
            ((patches, prefix),) = model.forward_intermediates(images, return_prefix_tokens=True, **options)
            return patches, prefix[:, 0] if prefix.shape[1] else None
        return model.forward_intermediates(images, **options)[0], None


def frozen_features(model: nn.Module, images: Tensor, kind: str = "patches") -> Tensor:
    """What a frozen backbone makes of images, for a probe: of its last block, before the last norm.

    Args:
        model: one of ours or timm's; it is left as it is.
        images: (B, C, H, W).
        kind: "class" for the class token or "mean" for the mean of the patches, (B, C'); "patches" or "all", which is
            the class token and these, (B, N, C'). Maps count as patches in row-major order.

    Raises:
        VisionattnError: if there is no such kind, or no class token.
    """
    if kind not in KINDS:
        raise VisionattnError(f"expected features of kind {', '.join(KINDS)}, got {kind!r}")
    patches, token = last_block(model, images)
    if kind == "mean":
        return patches.mean((2, 3))
    if kind == "patches":
        return patches.flatten(2).mT
    if token is None:
        raise VisionattnError(f"{type(model).__name__} has no class token: take mean, or patches")
    return token if kind == "class" else torch.cat([token[:, None], patches.flatten(2).mT], 1)


class Stored(NamedTuple):
    """Features of images, on the disk where they come from `stored`, and the images' classes."""

    features: Tensor
    labels: Tensor


def fingerprint(images: ImageSet) -> str:
    """What tells images from others: their files with sizes and dates where they have some, else their places.

    Args:
        images: the images, none of which is read.
    """
    digest = hashlib.sha256(f"{images.name} {images.classes} {len(images.source)}".encode())
    for index in images.indices:
        name = images.source.filename(index, absolute=True) if hasattr(images.source, "filename") else None
        facts = os.stat(name) if name and os.path.isfile(name) else None
        digest.update(f"{index} {name} {facts and (facts.st_size, facts.st_mtime_ns)}\n".encode(errors="replace"))
    return digest.hexdigest()


def key_of(model: nn.Module, about: Mapping[str, Any]) -> str:
    """Name for the features of a model.

    Args:
        model: the model, whose weights count.
        about: what else decides what they are; JSON's types alone.
    """
    text = json.dumps(dict(about), sort_keys=True, default=str)
    return hashlib.sha256((content_hash(model.state_dict(), {}) + text).encode()).hexdigest()[:24]


def stored(path: Path, count: int, batches: Iterable[tuple[Tensor, Tensor]], about: Mapping[str, Any]) -> Stored:
    """Features in a folder of their own, computed if it is not there.

    The folder is there whole or not at all, and processes that want the same one compute it once.

    Args:
        path: of the folder.
        count: images.
        batches: features and classes of all of them, in order; asked for where they have to be computed.
        about: what they are of, for people.

    Raises:
        VisionattnError: if the folder cannot be written, or is damaged.
    """
    with user_input(f"cannot write {path}", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        if not path.is_dir():
            _write(path, count, batches, about)
    with user_input(f"{path} is damaged: remove it", OSError, ValueError, EOFError):
        read = [torch.from_numpy(np.load(path / f"{name}.npy", mmap_mode="c")) for name in Stored._fields]
        if any(len(each) != count for each in read):
            raise ValueError(f"expected features of {count} images, found {len(read[0])}")
    return Stored(*read)


def _write(path: Path, count: int, batches: Iterable[tuple[Tensor, Tensor]], about: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with user_input(f"cannot write {path}", OSError):
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed, as this one has the lock
        temporary.mkdir()
        try:
            (temporary / "about.json").write_text(json.dumps(dict(about), indent=1, default=str))
            labels = []
            with open(temporary / "features.npy", "wb") as file:
                for made, classes in batches:
                    if not made.isfinite().all():
                        raise VisionattnError("the features are not finite: try --precision no")
                    made = made.cpu().numpy()
                    if not labels:
                        header = {"descr": made.dtype.str, "fortran_order": False, "shape": (count, *made.shape[1:])}
                        np.lib.format.write_array_header_1_0(file, header)
                    file.write(made.tobytes())
                    labels.append(classes.cpu())
                file.flush()
                os.fsync(file.fileno())
            np.save(temporary / "labels.npy", torch.cat(labels).numpy())
            temporary.rename(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
