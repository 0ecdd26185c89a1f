"""What files and repositories say of their models: checked before anything is made by it, and true of what train.py
writes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import visionattn
from visionattn.cli import main as command
from visionattn.errors import VisionattnError
from visionattn.training.checkpoint import read_saved, save_checkpoint, training_state
from visionattn.training.config import parse_train, parse_validate
from visionattn.training.evaluation import options_of, validate
from visionattn.training.run import train
from visionattn.training.trainer import Trainer
from visionattn.weights.description import describe_file
from visionattn.weights.files import DESCRIPTION, write_checkpoint

GOOD = {"model": "test_van", "model_kwargs": {"num_classes": 10}}
QUICK = ["--epochs", "1", "--data.batch_size", "256", "--data.num_workers", "0", "--augment.mixup", "0"]


def saying(**arguments) -> dict:
    return GOOD | {"model_kwargs": GOOD["model_kwargs"] | arguments}


def dense(**entries) -> dict:
    known = {"task": "detection", "model": "test_van", "model_kwargs": {}, "head": "fcos", "head_kwargs": {}}
    return known | {"classes": ["a"], "data": {}} | entries


def begun(output: Path, *options: str) -> Path:
    """The checkpoint that a run begins with."""
    run = Trainer(*parse_train([*QUICK, "--output", str(output), *options]))
    run._begin()
    return run.folder / "checkpoints" / "last.safetensors"


ILL = {
    # entries, and the one that the error names
    "model": [GOOD | {"model": value} for value in (3, None, ["test_van"], "nope", "van_b0.nope", "hf-hub:a/b")],
    "model_kwargs": [GOOD | {"model_kwargs": value} for value in ([1], "depths", None)],
    "num_classes": [saying(num_classes=value) for value in (10**9, 1e9, 10.0, "ten", -1, True, [10])],
    "head.weight": [saying(num_classes=value) for value in (9, 11, 10000)],
    "depths": [saying(depths=value) for value in ("abc", 3, [10**5] * 4, [-1, 1, 1, 1], [1.5] * 4, [10**9] * 4)],
    "tensors": [saying(depths=[8000] * 4)],
    "stem.proj.weight": [saying(in_chans=1)],
    "model_kwargs ": [saying(embed_dims=[0] * 4), saying(drop_rate=5.0), saying(depths=[1, 1])],
    "drop_rate": [saying(drop_rate=float("nan")), saying(drop_rate="high")],
    "model_kwargs.": [
        saying(**{name: value})
        for name, value in {
            **{"device": "cpu", "dtype": "float16", "pretrained": True, "checkpoint_path": "other.pth"},
            **{"pretrained_cfg": {"url": "http://127.0.0.1"}, "pretrained_cfg_overlay": {}, "cache_dir": "/tmp"},
            **{"features_only": True, "norm": {"class_path": "this.Zen"}, "nope": 1, "img_size": 10**9},
        }.items()
    ],
    "task": [GOOD | {"task": value} for value in ("depth", ["detection"], 3, None)],
    "head": [GOOD | {"task": "detection"}, dense(head="nope"), dense(head=3)],
    "head_kwargs": [
        dense(head_kwargs=value)
        for value in ([], {"norm": {"class_path": "this.Zen"}}, {"fpn_channels": 10**6}, {"num_classes": 3}, {"no": 1})
    ],
    "fpn_channels": [dense(head_kwargs={"fpn_channels": "many"})],
    "classes": [GOOD | {"classes": value} for value in (3, "abc", [1, 2], ["a"])],
    "data.batch_size": [GOOD | {"data": {"batch_size": value}} for value in ("many", 0, None, [1])],
    "data.": [GOOD | {"data": {"of_another_version": 1}}, GOOD | {"data": {"img_size": 10**9}}],
    "data": [GOOD | {"data": 3}],
    "joint.": [dense(joint={"crop": 10**9}), dense(joint={"nope": 1})],
    "annotations.": [dense(annotations={"scene_size": "large"})],
    "precision": [GOOD | {"precision": "fp8"}],
    "of_another_version": [GOOD | {"of_another_version": 1}],
    "preprocessing.": [
        GOOD | {"preprocessing": value}
        for value in ({"mean": "x"}, {"input_size": [3, 0, 0]}, {"file": "/etc/passwd"}, {"std": [0, 0, 0]}, {"no": 1})
    ],
    "describes its model": [
        "[" * 10**5 + "]" * 10**5, '{"a":' * 5000 + "1" + "}" * 5000, '{"metrics":' + "[" * 99 + "]" * 99 + "}", "[]",
        "3", "nope", '{"epoch":' + "1" * 5000 + "}",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def van() -> torch.nn.Module:
    return visionattn.create_model("test_van", num_classes=10)


@pytest.fixture
def nothing_is_made(monkeypatch):
    """Fails where memory would be taken for a model, or more than a few times the work that the file's own model is."""
    from torch.nn.modules import module

    made = SimpleNamespace(parameters=0)

    def refuse(owner, name, parameter):
        made.parameters += 1
        if not (parameter is None or parameter.is_meta) or made.parameters > 5000:
            pytest.fail(f"{name} was made")

    hook = module.register_module_parameter_registration_hook(refuse)
    yield made
    hook.remove()


@pytest.mark.parametrize("entry", ILL)
def test_what_cannot_be_is_refused_in_one_line_before_anything_is_made(tmp_path, van, nothing_is_made, entry):
    path = tmp_path / "w.safetensors"
    for entries in ILL[entry]:
        text = entries if isinstance(entries, str) else json.dumps(entries)
        write_checkpoint(path, van.state_dict(), {"format": "pt", DESCRIPTION: text})
        nothing_is_made.parameters = 0
        with pytest.raises(VisionattnError) as error:
            visionattn.create_model(str(path))
        told = str(error.value)
        assert str(path) in told and entry.strip() in told and "\n" not in told and len(told) < 1000, (entries, told)


def test_every_door_checks_what_a_file_says(tmp_path, van, capsys):
    import this  # noqa: F401 - so that a door that imports it says nothing new

    path = tmp_path / "w.safetensors"
    for entries in (saying(norm={"class_path": "this.Zen"}), GOOD | {"data": {"batch_size": "many"}}):
        write_checkpoint(path, van.state_dict(), {DESCRIPTION: json.dumps(entries)})
        doors = {
            "create_model": lambda: visionattn.create_model(str(path)),
            "features": lambda: visionattn.create_model(str(path), features_only=True),
            "architecture alone": lambda: visionattn.create_model(str(path), pretrained=False),
            "checkpoint_path": lambda: visionattn.create_model("test_van", checkpoint_path=str(path)),
            "backbone": lambda: visionattn.create_detector(str(path), "fcos", 3),
            "backbone's": lambda: visionattn.create_detector(
                "test_van", "fcos", 3, backbone_kwargs={"checkpoint_path": str(path)}
            ),
            "validate --checkpoint": lambda: validate(parse_validate(["--checkpoint", str(path)], options_of)),
            "validate --model": lambda: validate(parse_validate(["--model", str(path)], options_of)),
            "train --checkpoint": lambda: train(
                *parse_train([*QUICK, "--model", "test_van", "--checkpoint", str(path), "--output", str(tmp_path)])
            ),
            "train --model": lambda: train(
                *parse_train([*QUICK, "--model", str(path), "--output", str(tmp_path / "runs")])
            ),
        }
        for door, go in doors.items():
            with pytest.raises(VisionattnError, match="w.safetensors.*(norm|batch_size)") as error:
                go()
            assert "\n" not in str(error.value), door
        for argv in (["push", str(path), f"local-dir:{tmp_path}/r"], ["predict", "--checkpoint", str(path), "x.png"]):
            assert command(argv) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert "w.safetensors" in line and ("norm" in line or "batch_size" in line)
    assert [each.name for each in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"architecture": 3}, "architecture"),
        ({"architecture": "nope"}, "nope"),
        ({"architecture": "test_van", "model_args": [1]}, "model_args"),
        ({"model_args": {"checkpoint_path": "x.pth"}}, "model_args.checkpoint_path"),
        ({"model_args": {"depths": "abc"}}, "model_args.depths"),
        ({"model_args": {"depths": [10**5] * 4}}, "model_args.depths"),
        ({"model_args": {"nope": 1}}, "model_args.nope"),
        ({"num_classes": 10**9}, "num_classes"),
        ({"num_classes": 5000}, "head.weight"),
        ({"num_classes": "ten"}, "num_classes"),
        ({"pretrained_cfg": {"file": "/etc/passwd"}}, "pretrained_cfg.file"),
        ({"pretrained_cfg": {"url": "http://127.0.0.1/x"}}, "pretrained_cfg.url"),
        ({"pretrained_cfg": {"mean": "grey"}}, "pretrained_cfg.mean"),
        ({"pretrained_cfg": {"input_size": "large"}}, "pretrained_cfg.input_size"),
        ({"pretrained_cfg": {"nope": 1}}, "pretrained_cfg.nope"),
        ({"pretrained_cfg": 3}, "pretrained_cfg"),
        ("[" * 10**5, "config.json"),
    ],
)
def test_repositories_are_checked_too(tmp_path, van, nothing_is_made, monkeypatch, config, told):
    known = {"architecture": "test_van", "num_classes": 10, "pretrained_cfg": {"std": [0.5] * 3}}
    text = config if isinstance(config, str) else json.dumps(known | config)
    (tmp_path / "config.json").write_text(text)
    save_file(van.state_dict(), tmp_path / "model.safetensors")
    description = "visionattn.weights.description"
    monkeypatch.setattr(f"{description}.from_hub", lambda *args: tmp_path / "config.json")
    monkeypatch.setattr(f"{description}.fetch", lambda *args, **kwargs: tmp_path / "model.safetensors")
    for place in (f"local-dir:{tmp_path}", "hf-hub:me/model"):
        with pytest.raises(VisionattnError) as error:
            visionattn.create_model(place)
        assert place in str(error.value) and told in str(error.value) and "\n" not in str(error.value)


def test_what_is_written_today_loads(tmp_path, van):
    """Headers as train.py and `convert` write them, with every entry; a repository as `push` leaves it."""
    torch.save(van.state_dict(), tmp_path / "w.pth")
    convert = ["convert", str(tmp_path / "w.pth"), str(tmp_path / "w.safetensors"), "--model", "test_van"]
    assert command(convert) == 0 and command(["push", str(tmp_path / "w.safetensors"), f"local-dir:{tmp_path}/r"]) == 0
    best = str(begun(tmp_path / "runs", "--model", "test_van"))
    entries = describe_file(best).entries
    assert {"model", "model_kwargs", "classes", "data", "preprocessing", "precision", "metrics"} <= entries.keys()
    for place in (str(tmp_path / "w.safetensors"), f"local-dir:{tmp_path}/r", best):
        rng = torch.get_rng_state()
        assert describe_file(best) and torch.equal(rng, torch.get_rng_state())
        assert visionattn.create_model(place).num_classes == 10
        assert visionattn.create_model(place, pretrained=False, num_classes=3).num_classes == 3


def test_damaged_training_states_are_told(tmp_path):
    run = Trainer(*parse_train([*QUICK, "--output", str(tmp_path), "--model", "test_van"]))
    run._begin()
    path = run.folder / "checkpoints" / "last.safetensors"
    good = training_state(read_saved(path))
    weights, description, _ = run._contents()
    for state in ({}, good | {"epoch": "first"}, good | {"optimizer": None}, good | {"ranking": [3]}):
        save_checkpoint(path, weights, description, state)
        with pytest.raises(VisionattnError, match="last.safetensors: its training state"):
            train(*parse_train(["--resume", str(run.folder)]))
    for text in ("[" * 10**5, "nope", '{"dict": [["epoch", {"tensor": "nowhere"}]]}', "3", '{"tuple": 3}'):
        write_checkpoint(path, weights, {DESCRIPTION: json.dumps(description), "training_state": text})
        with pytest.raises(VisionattnError, match="last.safetensors: its training state"):
            train(*parse_train(["--resume", str(run.folder)]))
    save_checkpoint(path, weights, description, good)
    options = (run.folder / "config.yaml").read_text()
    assert "model_kwargs: {}" in options
    for depths, told in (
        ("[5000, 1, 1, 1]", "more than [0-9]+ tensors"),
        ("[100000, 1, 1, 1]", "model_kwargs.depths is 100000"),
        ("[1, 1, 1, 1]", "model_kwargs"),
        ("abc", "model_kwargs.depths"),
    ):
        changed = options.replace("model_kwargs: {}", f"model_kwargs: {{depths: {depths}}}", 1)
        (run.folder / "config.yaml").write_text(changed)
        with pytest.raises(VisionattnError, match=f"cannot resume .*{told}"):
            train(*parse_train(["--resume", str(run.folder)]))


@pytest.fixture
def trained(tmp_path) -> SimpleNamespace:
    """A run's best checkpoint, under a name with a prefix, in a folder of its own, and a repository of it."""
    options = ["--model", "test_illama", "--model_kwargs.drop_path_rate", "0.1"]
    best = begun(tmp_path / "first", *options)
    (tmp_path / "kept").mkdir()
    file = best.rename(tmp_path / "kept" / "va_my.in1k.safetensors")
    assert command(["push", str(file), f"local-dir:{tmp_path}/repository"]) == 0
    return SimpleNamespace(file=str(file), repository=f"local-dir:{tmp_path}/repository")


def test_a_file_or_repository_as_model(tmp_path, trained, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    weights = visionattn.create_model(trained.file).state_dict()
    relative = str(Path(trained.file).relative_to(tmp_path))
    for number, place in enumerate((trained.file, relative, trained.repository), 1):
        run = Trainer(*parse_train([*QUICK, "--model", place, "--output", "out"]))
        assert all(torch.equal(value, weights[key]) for key, value in run.bare_model.state_dict().items())
        run._begin()
        assert run.folder.as_posix() == "out/test_illama-digits" + (f"-{number}" if number > 1 else "")
        last = str(run.folder / "checkpoints" / "last.safetensors")
        described = describe_file(last)
        assert described.name == "test_illama"
        assert {"drop_path_rate": 0.1, "num_classes": 10}.items() <= described.kwargs.items()
        assert visionattn.create_model(last).num_classes == 10
    run = Trainer(*parse_train([*QUICK, "--model", trained.file]))  # the default folder
    run._begin()
    assert run.folder.as_posix() == "runs/test_illama-digits"
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [Path(trained.file).name]
    figures = [
        validate(parse_validate([option, trained.file, "--data.num_workers", "0"], options_of))
        for option in ("--model", "--checkpoint")
    ]
    assert figures[0]["top1"] > 0 and "test_illama (0.28" in capsys.readouterr().out
    with pytest.raises(VisionattnError, match="option name"):
        parse_train(["--name", str(tmp_path / "elsewhere")])


def test_headers_name_the_architecture_and_no_execution(tmp_path):
    last = begun(
        tmp_path, "--model", "van_tiny.in1k", "--model_kwargs", f'{{"cache_dir": "{tmp_path}", "depths": [1, 1, 1, 1]}}'
    )
    described = describe_file(last)
    assert described.name == "van_b0.in1k" and described.kwargs == {"depths": [1, 1, 1, 1], "num_classes": 10}
    assert visionattn.create_model(str(last)).num_classes == 10
