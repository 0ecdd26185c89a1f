"""Models as other libraries have them: in timm's layout, the published one, or that of transformers."""

import json
import os
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .create import create_model, find_widths
from .data.preprocessing import model_preprocessing
from .errors import VisionattnError, told_of, user_input
from .heads.pyramid import OverBackbone
from .registry import find, timm_name
from .weights.description import describe_place, is_place, made_for
from .weights.files import find_file, read_checkpoint, write_checkpoint, write_file
from .weights.inverse import to_layout
from .weights.layouts import _targets

LAYOUTS = ("timm", "official", "hf")
HF_FILES = ("model.safetensors", "config.json", "preprocessor_config.json")


def write_layout(
    source: str, out: str | os.PathLike, layout: str, name: str = "", replace: bool = False, **kwargs
) -> list[str]:
    """Write a classifier of ours as what others load.

    Args:
        source: checkpoint of train.py or `convert_file`, or a file in any layout of the model `name`.
        out: for "timm" and "official" a file, .safetensors or .pth, with the state dict; for "hf" a folder with
            config.json, model.safetensors and preprocessor_config.json.
        layout: "timm" for the models that timm has, "official" for that of the paper's code, "hf" for the layout that
            transformers has for FocalNet and DiNAT, and had for NAT and VAN.
        name: of the model, where the source does not say it.
        replace: write over what is there.
        **kwargs: arguments of the model `name`.

    Returns:
        paths of what was written.

    Raises:
        VisionattnError: if there is no such layout of the model, or `out` cannot be written.
    """
    out = Path(out)
    if layout not in LAYOUTS:
        raise VisionattnError(f"expected a layout of {', '.join(LAYOUTS)}, got {layout}")
    if layout != "hf" and out.suffix not in (".safetensors", ".pth"):
        raise VisionattnError(f"expected a name that ends in .safetensors or .pth, got {out}")
    wanted = [out / file for file in HF_FILES] if layout == "hf" else [out]
    with user_input(f"cannot write {out}", OSError):  # of names that are too long, for one
        if not replace and (there := next((file for file in wanted if file.exists()), None)):
            raise VisionattnError(f"{there} exists: choose another name, or replace it with --replace")
        if layout == "hf" and not next(each for each in (out, *out.parents) if each.exists()).is_dir():
            raise VisionattnError(f"expected a folder to write to, got {out}, which is a file or inside of one")
    if name:
        prefix = kwargs.pop("checkpoint_prefix", "")
        with told_of(f"checkpoint {source}"):
            kwargs = find_widths(read_checkpoint(find_file(source))[0], name, kwargs, prefix) | kwargs
        model = create_model(name, checkpoint_path=source, checkpoint_prefix=prefix, **kwargs)
    elif is_place(source):
        described = describe_place(source)
        model, name, kwargs = create_model(source), described.name, described.kwargs
    else:
        raise VisionattnError(f"{source} does not say which model it is of: give --model")
    if isinstance(model, OverBackbone):
        raise VisionattnError(f"{source} is of a model with another head: only classifiers have a layout elsewhere")
    base = find(name)[0]
    if layout == "timm":
        state = timm_state_dict(model, base)
    elif layout not in model.layouts:
        known = [each for each in LAYOUTS if each in model.layouts]
        published = f"it was published as {', '.join(known)}" if known else "no weights of its family were published"
        raise VisionattnError(f"{base} has no layout {layout}; {published}")
    else:
        state = to_layout(model, layout)
    if layout != "hf":
        return [_write(state, out, replace)]
    with user_input(f"cannot write {out}", OSError):
        out.mkdir(parents=True, exist_ok=True)
    config = hf_config(model, base, made_for(name, kwargs))
    if base.startswith("nat"):
        state = {key.replace("dinat.", "nat.", 1): value for key, value in state.items()}
    if base.startswith("van"):  # in the published files, and never applied
        width = model.num_features
        state |= {"van.layernorm.weight": torch.ones(width), "van.layernorm.bias": torch.zeros(width)}
    weights, *texts = wanted
    _write(state, weights, replace)
    for file, content in zip(texts, (config, _hf_preprocessing(model)), strict=True):
        write_file(file, json.dumps(content, indent=1), replace)
    return list(map(str, wanted))


def timm_state_dict(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The state dict that timm's model of the same name loads.

    Args:
        model: of ours.
        name: registered name, without a tag.

    Raises:
        VisionattnError: if timm has no such model, or its one differs.
    """
    if timm_name(name) == name:
        raise VisionattnError(f"timm has no {name} of its own: import visionattn, and timm makes ours by that name")
    options = {"num_classes": model.num_classes, "in_chans": model.in_chans}
    if getattr(model, "grid_size", None) is not None:
        options["img_size"] = tuple(side * model.patch_size for side in model.grid_size)
    with torch.device("meta"):
        theirs = timm.create_model(name, **options).state_dict()
    own = model.state_dict()
    ways = []
    for rules in ([], *model.layouts.values()):
        names = {key: target for key in theirs if (target := (_targets(rules, key) or [""])[0]) in own}
        ways.append(names)
    names = max(ways, key=len)
    wrong = [key for key, value in theirs.items() if key not in names or own[names[key]].numel() != value.numel()]
    if wrong or len(names) != len(own):
        told = wrong[0] if wrong else next(key for key in own if key not in names.values())
        raise VisionattnError(f"timm's {name} is another model than this one: {told} is not in both")
    return {key: own[target].reshape(theirs[key].shape).contiguous() for key, target in names.items()}


def hf_config(model: nn.Module, name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json of transformers says of a model.

    Args:
        model: of ours.
        name: registered name, without a tag.
        kwargs: its arguments, where they are not the default ones.
    """
    own = {key: p.default for key, p in signature(type(model)).parameters.items()} | dict(kwargs)
    depths = list(own["depths"]) if "depths" in own else [own["depth"]]
    dims = [info["num_chs"] for info in model.feature_info]
    common = {"num_channels": model.in_chans, "depths": depths}
    labels = model.pretrained_cfg.get("label_names") or [f"LABEL_{i}" for i in range(model.num_classes)]
    common |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    plain = name.removeprefix("test_")
    kind = next((kind for kind in ("dinat", "nat", "van", "focalnet") if plain.startswith(kind)), "")
    if kind in ("dinat", "nat"):
        heads = own["num_heads"] or [dim // 32 for dim in dims]
        specific = {key: own[key] for key in ("embed_dim", "mlp_ratio", "kernel_size", "qkv_bias")}
        specific |= {"num_heads": list(heads), "layer_scale_init_value": own["layer_scale"] or 0.0, "patch_size": 4}
        if kind == "dinat":
            specific["dilations"] = [list(row) for row in own["dilations"] or [[1] * depth for depth in depths]]
    elif kind == "van":
        specific = {"hidden_sizes": dims, "mlp_ratios": list(own["mlp_ratios"]), "layer_norm_eps": own["norm_eps"]}
        specific |= {"layer_scale_init_value": own["layer_scale"], "patch_sizes": [7, 3, 3, 3], "strides": [4, 2, 2, 2]}
    elif kind == "focalnet" and "depths" in own:
        each = {key: own[key] for key in ("focal_levels", "focal_windows")}
        specific = {key: [v] * len(depths) if isinstance(v, int) else list(v) for key, v in each.items()}
        for key in ("embed_dim", "use_conv_embed", "mlp_ratio", "use_layerscale", "normalize_modulator", "patch_size"):
            specific[key] = own[key]
        specific |= {"layerscale_value": own["layerscale_value"], "hidden_sizes": dims}
        specific |= {"use_post_layernorm": own["use_postln"]}
        specific |= {"use_post_layernorm_in_modulation": own["use_postln_in_modulation"]}
        specific["image_size"] = model_preprocessing(model)["input_size"][-1]
    else:
        raise VisionattnError(f"transformers has no configuration of {name}")
    architecture = {"dinat": "Dinat", "nat": "Nat", "van": "Van", "focalnet": "FocalNet"}[kind]
    return {"architectures": [f"{architecture}ForImageClassification"], "model_type": kind} | common | specific


def _hf_preprocessing(model: nn.Module) -> dict[str, Any]:
    own = model_preprocessing(model)
    height, width = own["input_size"][1:]
    edge = int(height / own["crop_pct"])
    resample = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
    return {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": edge},
        "crop_size": {"height": height, "width": width},
        "do_center_crop": True,
        "resample": resample.get(own["interpolation"], 3),
        "image_mean": list(own["mean"]),
        "image_std": list(own["std"]),
        "do_convert_rgb": model.in_chans == 3,
    }


def _write(state: dict[str, Tensor], out: Path, replace: bool) -> str:
    """The state dict as a file, whole or not at all."""
    state = {key: value.detach().contiguous() for key, value in state.items()}
    if out.suffix == ".pth":
        write_file(out, lambda file: torch.save(state, file), replace)
    else:
        write_checkpoint(out, state, {"format": "pt"}, replace)
    return str(out)
