"""Weights as training frameworks, and people, save them: found wherever they are, whatever else is in the file."""

import argparse
import collections
import json
import logging
import os
import pathlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import visionattn
from visionattn.cli import main
from visionattn.errors import VisionattnError
from visionattn.publish import convert_file
from visionattn.weights import read_checkpoint
from visionattn.weights.layouts import convert_state_dict, load_checkpoint, load_pretrained

NAME, CLASSES = "test_van", 3


class AttributeDict(dict):
    """Of Lightning's kind: a dictionary by inheritance."""


class HistoryBuffer:
    """Of mmengine's kind: an object with arrays inside."""

    def __init__(self) -> None:
        self.log, self.count = np.arange(5.0), np.int64(5)


class MessageHub:
    def __init__(self) -> None:
        self.scalars = collections.OrderedDict(loss=HistoryBuffer())
        self.when = pathlib.Path("work_dirs")


def prefixed(prefix: str, tensors: dict) -> dict:
    return {f"{prefix}{key}": value for key, value in tensors.items()}


def noise(tensors: dict) -> dict:
    return {key: torch.rand(value.shape) if value.is_floating_point() else value for key, value in tensors.items()}


def optimizer(tensors: dict) -> dict:
    state = {i: {"step": torch.tensor(3.0), "exp_avg": value} for i, value in enumerate(tensors.values())}
    return {"state": state, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": list(state)}]}


def infixed(tensors: dict) -> dict:
    """As FSDP and compiled blocks write it."""
    return {
        "_fsdp_wrapped_module." + key.replace("blocks.0.", "_fsdp_wrapped_module.blocks.0._orig_mod."): value
        for key, value in tensors.items()
    }


def lightning(tensors: dict, prefix: str, **others) -> dict:
    return {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": collections.OrderedDict(prefixed(prefix, tensors) | others),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.tensor(0.3)}},
        "optimizer_states": [optimizer(tensors)],
        "lr_schedulers": [{"last_epoch": 3, "fn": argparse.Namespace(warmup=lambda_free)}],
        "hparams_name": "kwargs",
        "hyper_parameters": AttributeDict(lr=0.1, root=pathlib.Path("data"), size=np.int64(32)),
    }


def lambda_free() -> None:
    """A function that a pickle names."""


WAYS = {
    "plain": lambda sd: sd,
    "parameters": lambda sd: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in sd.items()},
    "lightning model": lambda sd: lightning(sd, "model."),
    "lightning net": lambda sd: lightning(sd, "net."),
    "lightning backbone, loss and metric": lambda sd: lightning(
        sd, "model.backbone.", **{"criterion.weight": torch.ones(3), "train_acc.correct": torch.tensor(1)}
    ),
    "mmengine": lambda sd: {
        "meta": {"epoch": 12, "dataset_meta": {"classes": ("cat", "dog")}, "cfg": argparse.Namespace(a=1)},
        "message_hub": MessageHub(),
        "state_dict": prefixed("backbone.", {k: v for k, v in sd.items() if not k.startswith("head.")})
        | prefixed("head.fc.", {k[5:]: v for k, v in sd.items() if k.startswith("head.")})
        | {"data_preprocessor.mean": torch.ones(3, 1, 1)},
        "optimizer": optimizer(sd),
        "param_schedulers": [{"last_step": 3}],
    },
    "mmengine with averages": lambda sd: {
        "state_dict": prefixed("backbone.", noise(sd)),
        "ema_state_dict": prefixed("module.backbone.", sd) | {"steps": torch.tensor(3)},
    },
    "timm": lambda sd: {
        "epoch": 3,
        "arch": NAME,
        "state_dict": noise(sd),
        "state_dict_ema": sd,
        "optimizer": optimizer(sd),
        "args": argparse.Namespace(lr=0.1),
        "amp_scaler": {"scale": 65536.0},
        "metric": np.float64(81.5),
    },
    "compiled": lambda sd: prefixed("_orig_mod.", sd),
    "distributed": lambda sd: {"model_state_dict": prefixed("module.", sd), "best_acc1": torch.tensor(0.8)},
    "distributed and compiled": lambda sd: {"model": prefixed("module._orig_mod.", sd)},
    "deepspeed": lambda sd: {
        "module": prefixed("module.", sd),
        "buffer_names": [],
        "optimizer": None,
        "ds_version": "1",
    },
    "deepspeed, lightning": lambda sd: {"state_dict": prefixed("_forward_module.model.", sd)},
    "fsdp": lambda sd: {"model": infixed(sd)},
    "fsdp, lightning": lambda sd: {"state_dict": prefixed("_forward_module.net.", infixed(sd))},
    "averaged": lambda sd: prefixed("module.", sd) | {"n_averaged": torch.tensor(7)},
    "moving average": lambda sd: {"model": noise(sd), "model_ema": prefixed("module.", sd)},
    "moving average in a module": lambda sd: prefixed("net.", noise(sd)) | prefixed("ema.ema_model.", sd),
    "catalyst": lambda sd: {"model_state_dict": sd, "optimizer_state_dict": optimizer(sd), "epoch_metrics": {"a": 1.0}},
    "fastai": lambda sd: {"model": prefixed("0.model.", sd), "opt": optimizer(sd)},
    "hugging face's wrapper of timm": lambda sd: prefixed("timm_model.", sd),
    "classifier": lambda sd: prefixed("classifier.", sd),
    "student alone": lambda sd: {"state_dict": prefixed("student.", sd)},
    "network": lambda sd: {"network": {"state": prefixed("network.", sd)}},
    "deep": lambda sd: {"trainer": {"state": {"task": prefixed("module.model._orig_mod.encoder.backbone.", sd)}}},
    "backbone beside its classifier": lambda sd: {
        "state_dict": prefixed("encoder.", {k: v for k, v in sd.items() if not k.startswith("head.")})
        | prefixed("classifier.", {k[5:]: v for k, v in sd.items() if k.startswith("head.")})
    },
    "a dictionary of its own kind": lambda sd: {"weights": AttributeDict(sd)},
    "saved twice": lambda sd: {"model": sd, "state_dict": {k: v.clone() for k, v in sd.items()}},
    "a loss's weight": lambda sd: sd | {"loss_weight": torch.ones(5), "metric.total": torch.tensor(1.0)},
    "another model too": lambda sd: (
        prefixed("vision.", sd) | prefixed("text.", {f"{i}.w": torch.ones(2) for i in range(999)})
    ),
}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    tensors = visionattn.create_model(NAME, num_classes=CLASSES).state_dict()
    return {k: v + 0.5 if v.is_floating_point() else v for k, v in tensors.items()}


def assert_loaded(model: nn.Module, weights: dict) -> None:
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_saving(way, weights, tmp_path, caplog):
    content = WAYS[way](weights)
    path = tmp_path / "w.pth"
    torch.save(content, path, _use_new_zipfile_serialization=len(way) % 2 == 0)
    model = visionattn.create_model(NAME, num_classes=CLASSES, checkpoint_path=str(path))
    assert_loaded(model, weights)
    model.load_state_dict(noise(weights))
    load_checkpoint(model, path)
    assert_loaded(model, weights)
    # What was not used is told of, in one line each time.
    used = sum(isinstance(v, torch.Tensor) for v in flat(read_checkpoint(path)[0])) <= len(weights)
    assert len(caplog.records) == (0 if used else 2), caplog.text
    assert all("w.pth: dropped" in r.getMessage() and r.levelname == "WARNING" for r in caplog.records)


def flat(content: dict) -> list:
    return [v for value in content.values() for v in (flat(value) if isinstance(value, dict) else [value])]


@pytest.mark.parametrize("way", ["lightning model", "mmengine", "timm", "fsdp", "backbone beside its classifier"])
def test_the_command_converts_them(way, weights, tmp_path, capsys):
    torch.save(WAYS[way](weights), tmp_path / "w.pth")
    out = str(tmp_path / "w.safetensors")
    assert main(["convert", str(tmp_path / "w.pth"), out, "--model", NAME]) == 0
    assert_loaded(visionattn.create_model(out), weights)


@pytest.mark.parametrize("prefix", ["", "model.", "timm_model.", "backbone."])
def test_folders_and_parts(prefix, weights, tmp_path):
    """As accelerate and transformers leave them."""
    tensors = prefixed(prefix, weights)
    whole, parts, pickled = (tmp_path / name for name in ("whole", "parts", "pickled"))
    for folder in (whole, parts, pickled):
        folder.mkdir()
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "training_args.bin"):
        (whole / name).write_bytes(b"none of ours")
    save_file(tensors, whole / "model.safetensors")
    torch.save(tensors, pickled / "pytorch_model.bin")
    names = sorted(tensors)
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, keys in files.items():
        save_file({key: tensors[key] for key in keys}, parts / file)
    index = {"metadata": {}, "weight_map": {key: file for file, keys in files.items() for key in keys}}
    (parts / "model.safetensors.index.json").write_text(json.dumps(index))
    for place in (whole, parts, parts / "model.safetensors.index.json", pickled):
        model = visionattn.create_model(NAME, num_classes=CLASSES, checkpoint_path=str(place))
        assert_loaded(model, weights)
    os.remove(parts / "model-00002-of-00002.safetensors")
    with pytest.raises(VisionattnError, match="model-00002-of-00002.safetensors does not exist"):
        visionattn.create_model(NAME, checkpoint_path=str(parts))


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ({"weight_map": {"a": "../w.safetensors"}}, "is refused: it names ../w.safetensors, not a file beside it"),
        ({"weight_map": {"a": "/etc/passwd"}}, "is refused: it names /etc/passwd"),
        ({"weight_map": {"a": "model.safetensors.index.json"}}, "is refused: it names model.safetensors.index.json"),
        ({"weight_map": {"b": "w.safetensors"}}, "is damaged: its parts lack 1 tensors"),
        ({"weight_map": {"b": 3}}, "is damaged"),
        ({"weight_map": []}, "is damaged"),
        ([], "is damaged"),
    ],
)
def test_indices_that_are_no_good(index, told, tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "w.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(VisionattnError, match=told):
        read_checkpoint(tmp_path / "model.safetensors.index.json")


def test_a_folder_of_several_files(weights, tmp_path):
    for name in ("best", "last"):
        save_file(weights, tmp_path / f"{name}.safetensors")
    with pytest.raises(VisionattnError, match=r"holds 2 checkpoints \(best.safetensors, last.safetensors, ...\): name"):
        visionattn.create_model(NAME, checkpoint_path=str(tmp_path))


AMBIGUOUS = {
    "student and teacher": lambda a, b: {"state_dict": prefixed("student.", a) | prefixed("teacher.", b)},
    "dictionaries": lambda a, b: {"student": prefixed("backbone.", a), "teacher": prefixed("backbone.", b)},
    "two backbones": lambda a, b: {"model": prefixed("student.backbone.", a) | prefixed("teacher.backbone.", b)},
    "in a module": lambda a, b: prefixed("module.student.", a) | prefixed("module.teacher.", b),
}


TOLD = "holds weights under .*student.* and .*teacher.* that fit equally well: choose one by checkpoint_prefix"


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_what_fits_equally_well_is_asked_for(case, weights):
    others = noise(weights)
    content, model = AMBIGUOUS[case](weights, others), visionattn.create_model(NAME, num_classes=CLASSES)
    with pytest.raises(VisionattnError, match=TOLD):
        load_pretrained(model, content)
    for prefix, expected in (("student", weights), ("teacher", others)):
        load_pretrained(model, content, checkpoint_prefix=prefix)
        assert_loaded(model, expected)


def test_the_choice_is_there_wherever_files_are_loaded(weights, tmp_path, capsys):
    path, out, others = str(tmp_path / "w.pth"), str(tmp_path / "w.safetensors"), noise(weights)
    torch.save(AMBIGUOUS["dictionaries"](weights, others), path)
    model = visionattn.create_model(NAME, num_classes=CLASSES)
    with pytest.raises(VisionattnError, match=f"w.pth: {TOLD}"):
        load_checkpoint(model, path)
    with pytest.raises(VisionattnError, match=f"w.pth: {TOLD}"):
        visionattn.create_model(NAME, checkpoint_path=path)
    with pytest.raises(VisionattnError, match=f"w.pth: {TOLD}"):
        convert_file(path, out, NAME)
    load_checkpoint(model, path, "teacher")
    assert_loaded(model, others)
    made = visionattn.create_model(NAME, num_classes=CLASSES, checkpoint_path=path, checkpoint_prefix="teacher")
    assert_loaded(made, others)
    assert main(["convert", path, out, "--model", NAME, "--checkpoint_prefix", "teacher"]) == 0
    assert_loaded(visionattn.create_model(out), others)
    over = visionattn.create_model(out, checkpoint_path=path, checkpoint_prefix="student.backbone")
    assert_loaded(over, weights)
    with pytest.raises(VisionattnError, match="w.pth: holds nothing under checkpoint_prefix assistant; it has"):
        visionattn.create_model(NAME, checkpoint_path=path, checkpoint_prefix="assistant")
    with pytest.raises(VisionattnError, match="checkpoint_prefix chooses from what checkpoint_path holds"):
        visionattn.create_model(NAME, checkpoint_prefix="student")


def test_the_one_that_fits_is_taken(weights, tmp_path):
    """A teacher of the same family that is deeper, or wider, has all the student's names, but is not the model."""
    larger = dict(weights) | {k.replace("blocks.0.", "blocks.9."): v for k, v in weights.items()}
    wider = {k: torch.cat([v, v]) if v.ndim else v for k, v in weights.items()}
    for teacher in (larger, wider):
        torch.save({"student": weights, "teacher": teacher}, tmp_path / "w.pth")
        model = visionattn.create_model(NAME, num_classes=CLASSES, checkpoint_path=str(tmp_path / "w.pth"))
        assert_loaded(model, weights)


def test_a_part_of_a_larger_model_is_refused(weights):
    """Only what no model of ours has may be left over."""
    deeper = dict(weights) | {k.replace("blocks.0.", "blocks.9."): v for k, v in weights.items()}
    with pytest.raises(VisionattnError, match=r"does not fit test_van: missing none; left over \d+ keys"):
        convert_state_dict(deeper, visionattn.create_model(NAME, num_classes=CLASSES))


def test_published_layouts_are_unwrapped_too(weights):
    """A published name in a wrapper: layout and prefix are found together."""
    model = visionattn.create_model("test_convit")
    published = {}
    for key, value in model.state_dict().items():
        key = key.replace("stem.", "patch_embed.").replace("mixer.", "attn.").replace("pos_embed.weight", "pos_embed")
        published[f"module.net.{key}"] = value
    converted = convert_state_dict({"state_dict": published, "optimizer": optimizer(published)}, model)
    assert converted.keys() == model.state_dict().keys()


def test_averages_are_chosen_as_published(tmp_path):
    """HorNet's figures are those of the weights themselves, others' of the averages."""
    for name, averaged in (("test_hornet", False), ("test_davit", True)):
        model = visionattn.create_model(name)
        weights = model.state_dict()
        others = noise(weights)
        content = {"model": others, "model_ema": weights} if averaged else {"model": weights, "model_ema": others}
        found = convert_state_dict(content, model)
        assert all(torch.equal(found[key], value) for key, value in weights.items())


def test_silence_means_that_all_was_used(weights, tmp_path, capfd):
    """Without any set-up of logging, as scripts and notebooks have it."""
    logging.getLogger("visionattn").handlers.clear()
    torch.save(weights | {"loss_weight": torch.ones(5)}, tmp_path / "w.pth")
    root, handlers = logging.getLogger(), logging.getLogger().handlers[:]
    root.handlers.clear()
    try:
        visionattn.create_model(NAME, num_classes=CLASSES, checkpoint_path=str(tmp_path / "w.pth"))
        assert capfd.readouterr().err == "w.pth: dropped 1 keys (loss_weight)\n"
        visionattn.create_model(NAME, num_classes=0, checkpoint_path=str(tmp_path / "w.pth"))
        assert capfd.readouterr().err.startswith("w.pth: dropped 3 keys (head.weight, head.bias")
        torch.save(weights, tmp_path / "w.pth")
        visionattn.create_model(NAME, num_classes=CLASSES, checkpoint_path=str(tmp_path / "w.pth"))
        assert capfd.readouterr().err == ""
    finally:
        root.handlers[:] = handlers
