"""Files and repositories that say themselves which model they are: what `create_model` takes in place of a name."""

import hashlib
import json
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo
from timm.models import push_to_hf_hub, save_for_hf

from .create import create_described, create_model, find_widths
from .data.preprocessing import model_preprocessing
from .errors import VisionattnError, one_line, told_of
from .registry import find, model_info, timm_name
from .weights.description import describe_file, entries_of, made_for, tell_differences
from .weights.files import DESCRIPTION, find_file, read_checkpoint, write_checkpoint
from .weights.layouts import fit_state_dict


def convert_file(
    path: str,
    out: str,
    name: str = "",
    model_kwargs: dict[str, Any] | None = None,
    source: str = "",
    replace: bool = False,
    checkpoint_prefix: str = "",
) -> dict[str, Any]:
    """Turn a published file into a safetensors file of ours that `create_model` takes by its path.

    Args:
        path: a file, or folder with one, in any published layout of the model's family, wrapped as may be.
        out: the safetensors file to write.
        name: registered name, with the tag of the weights where there are several; "" for a file that says it.
        model_kwargs: arguments of the model, where they are not the default ones or those that a file of this model
            says; numbers of classes and input channels are read from the file.
        source: where the file is from; found by its name among the published ones if empty.
        replace: write over a file that is there.
        checkpoint_prefix: where in the file the weights are, if there are several that fit equally well.

    Returns:
        what the header says of the weights: model, model_kwargs, source, license, sha256 of `path`, classes,
        num_classes, preprocessing, and what is not from the file.

    Raises:
        VisionattnError: if the file does not fit the model or `out` cannot be written.
    """
    if Path(out).suffix != ".safetensors":
        raise VisionattnError(f"expected a name that ends in .safetensors, got {out}")
    if Path(out).exists() and not replace:
        raise VisionattnError(f"{out} exists: choose another name, or replace it with --replace")
    content, metadata = read_checkpoint(path := str(find_file(path)), digest := hashlib.sha256())
    entries, model_kwargs = entries_of(content, metadata, path), model_kwargs or {}
    own = entries.get("model", "")
    if not (name or own):
        raise VisionattnError(f"{path} does not say which model it is of: give --model")
    headed = entries.get("task", "classification") != "classification"
    if not name and headed:
        raise VisionattnError(f"{path} is of {entries['task']}: name a model (--model) for its backbone alone")
    if not own or name and find(name)[0] != find(own)[0]:
        entries = {}
    name, known = name or own, entries.get("model_kwargs", {})
    model_kwargs = known | model_kwargs
    with told_of(f"checkpoint {path}"):
        model_kwargs = find_widths(content, name, model_kwargs, checkpoint_prefix) | model_kwargs
        model = create_model(name, **model_kwargs)
        made = made_for(own, known) if entries else made_for(name, model_kwargs)
        tensors, report = fit_state_dict(content, model, made, checkpoint_prefix)
    tell_differences(model, made, path)
    tag, info = find(name)[1], model_info(name)
    published = info.weights.get(tag) or next(iter(info.weights.values()), None)
    urls = published.urls if published else ()
    imagenet = model.num_classes == 1000 and bool(published and published.num_classes == 1000)
    names = ImageNetInfo("imagenet-1k").label_names() if imagenet else None
    if not headed and len(entries.get("classes") or ()) == model.num_classes:
        names = entries["classes"]
    description = {
        "model": name,
        "model_kwargs": model_kwargs,
        "source": source or next((url for url in urls if Path(path).name in url), Path(path).name),
        "license": entries.get("license", info.license),
        "sha256": digest.hexdigest(),
        "classes": names,
        "num_classes": model.num_classes,
        "preprocessing": model_preprocessing(model) | entries.get("preprocessing", {}),
        "adapted": {what: keys for what, keys in report.items() if keys},
    }
    write_checkpoint(out, tensors, {"format": "pt", DESCRIPTION: json.dumps(description)}, replace)
    return description


def push(path: str, place: str, private: bool = False, message: str = "Add model") -> str:
    """Share a checkpoint of train.py or `convert_file`, so that `create_model(place)` makes the same model again.

    Args:
        path: the checkpoint.
        place: `user/repository` on the Hugging Face hub, or `local-dir:folder`.
        private: keep a new repository private.
        message: of the commit.

    Returns:
        what to pass to `create_model`.

    Raises:
        VisionattnError: if the checkpoint does not say which model it is of, or the hub refuses it.
    """
    described = describe_file(path)
    description = described.entries
    if described.task != "classification":
        raise VisionattnError(
            f"cannot push {path}: it is of {described.task}, and timm's format holds classifiers only"
        )
    model = create_described(described)
    # Clients of timm look the name up there.
    model.pretrained_cfg["architecture"] = timm_name(find(description["model"])[0])
    options = {
        "model_config": {"label_names": description.get("classes")},
        "model_args": described.kwargs,
        "safe_serialization": True,
    }
    kind, _, folder = place.partition(":")
    try:
        if kind == "local-dir":
            if not folder:
                raise VisionattnError("expected local-dir:FOLDER, got local-dir: without a folder")
            if Path(folder, "config.json").exists():
                raise VisionattnError(f"{folder} holds a model already")
            save_for_hf(model, folder, **options)
            return place
        repository = place.removeprefix("hf-hub:")
        card = {"license": description.get("license", "other"), "library_name": "timm"}
        card["description"] = f"`{described.name}` of visionattn: `visionattn.create_model('hf-hub:{repository}')`."
        push_to_hf_hub(model, repository, message, private=private, model_card=card, **options)
        return f"hf-hub:{repository}"
    except VisionattnError:
        raise
    except Exception as e:  # what the network, the hub and the disk raise is theirs
        raise VisionattnError(f"cannot push to {place}: {one_line(e)}") from e
