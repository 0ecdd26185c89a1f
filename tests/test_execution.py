"""Options of training that change how a model is executed, in pairs: none changes what another one does."""

from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

import visionattn
from visionattn.training.config import parse_train
from visionattn.training.trainer import Trainer

COMMON = ["--optim.name", "sgd", "--optim.lr", "0.02", "--schedule.warmup_epochs", "0", "--data.num_workers", "0"]
CLASSES = [*COMMON, "--data.batch_size", "8", "--augment.mixup", "0"]
SCENES = [*COMMON, "--data.batch_size", "2", "--annotations.scene_count", "12", "--annotations.scene_size", "64"]
BOXES = [*SCENES, "--task", "detection", "--head_kwargs.fpn_channels", "64"]
MAPS = [*SCENES, "--task", "segmentation", "--head_kwargs", '{"pyramid_channels": 32, "segmentation_channels": 32}']
EXECUTION = ("compile", "grad_checkpointing", "channels_last", "sync_bn")
FACTORS = {
    **{name: ([], [f"--{name}"]) for name in EXECUTION},
    "precision": ([], ["--precision", "bf16"]),
    "ema": ([], ["--ema.decay", "0.9"]),
    "accumulation": ([], ["--optim.accumulation", "2"]),
    "freeze": ([], ["--freeze", "[stem]"], ["--freeze", "[backbone]"]),
    "distill": ([], ["logits"], ["features"]),
}
"""Options by name and their values; the first ones are without effect on what is learnt."""
KINDS = {
    "batch norm": ["--model", "test_van", "--model_kwargs.depths", "[1, 1, 1, 1]"],
    "layer norm": ["--model", "test_focalnet", "--model_kwargs.depths", "[1, 1, 1, 1]"],
    "isotropic": ["--model", "test_convit", "--model_kwargs.depth", "1", "--model_kwargs.local_up_to_layer", "0"],
    "own mechanics": ["--model", "test_sparsifiner", "--model_kwargs.depth", "1"],
}
ALL = dict.fromkeys((*EXECUTION, "ema", "accumulation"), 1)


def covering(factors: dict[str, tuple]) -> Iterator[dict[str, int]]:
    """Rows of values by factor in which every pair of values of two factors occurs, chosen greedily."""
    wanted = {
        (a, i, b, j)
        for a, b in combinations(factors, 2)
        for i, j in product(range(len(factors[a])), range(len(factors[b])))
    }
    while wanted:
        a, i, b, j = min(wanted)
        row = {a: i, b: j}
        for name in factors:
            if name not in row:
                gains = [
                    sum((x, k, name, v) in wanted or (name, v, x, k) in wanted for x, k in row.items())
                    for v in range(len(factors[name]))
                ]
                row[name] = gains.index(max(gains))
        wanted -= {(a, row[a], b, row[b]) for a, b in combinations(factors, 2)}
        yield row


def state_after_updates(folder: Path, options: list[str], count: int = 2) -> dict[str, torch.Tensor]:
    """Losses, and all that the run has learnt."""
    AcceleratorState._reset_state(True)  # which knows one precision
    run = Trainer(*parse_train([*options, "--output", str(folder), "--trackers", "[]"]))
    updates = run.run_updates()
    found = {f"loss {i}": torch.tensor(next(updates)) for i in range(count)}
    models = {"model": run.student} | ({"average": run.ema.module} if run.ema else {})
    return found | {f"{name} {key}": v for name, model in models.items() for key, v in model.state_dict().items()}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[str], list[str]]]:
    """For each kind of model, options of distillation."""
    found = {}
    for kind, (_, name, *_) in KINDS.items():
        path = tmp_path_factory.mktemp("teacher") / f"{name}.pth"
        name = name if kind == "own mechanics" else "test_van"
        torch.save(visionattn.create_model(name, num_classes=10).state_dict(), path)
        given = ["--distill.model", name, "--distill.checkpoint", str(path)]
        found[kind] = given, given if kind == "own mechanics" else [*given, "--distill.features", "1"]
    return found


@pytest.fixture
def compiled_eagerly(monkeypatch):
    """Graphs are captured and differentiated as ever, but not made into machine code."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_module(module, backend="aot_eager"))
    torch._dynamo.reset()


def check(folder: Path, options: list[str], row: dict[str, int], factors: dict[str, tuple] = FACTORS) -> None:
    """A run learns what it learns without the options that say how it is executed."""
    chosen = {name: factors[name][value] for name, value in row.items()}
    plain = [option for name, given in chosen.items() if name not in EXECUTION for option in given]
    expected = state_after_updates(folder / "plain", [*options, *plain])
    found = state_after_updates(folder / "all", [*options, *(option for given in chosen.values() for option in given)])
    assert found.keys() == expected.keys()
    tolerance = 1e-2 if row.get("precision") else 1e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


SLOW = [
    pytest.param(kind, row, marks=pytest.mark.slow, id=f"{kind}: {' '.join(name for name in row if row[name])}")
    for kind in KINDS
    for row in covering(FACTORS)
]
QUICK = [
    ("batch norm", ALL | {"distill": 1}),
    ("layer norm", ALL | {"distill": 2, "compile": 0}),  # which takes seconds
    ("isotropic", ALL | {"distill": 2, "precision": 1, "freeze": 1}),
    ("own mechanics", ALL | {"distill": 1}),
]


@pytest.mark.parametrize("kind, row", QUICK + SLOW)
def test_options_go_together(tmp_path: Path, teachers, compiled_eagerly, kind: str, row: dict[str, int]):
    """Every pair of those that do something; in the slow tests every pair of values."""
    check(tmp_path, [*CLASSES, *KINDS[kind]], row, FACTORS | {"distill": ([], *teachers[kind])})


@pytest.mark.parametrize("compiled", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", [BOXES, MAPS], ids=["boxes", "maps"])
def test_options_go_together_under_a_head(tmp_path: Path, compiled_eagerly, task: list[str], compiled: int):
    check(tmp_path, [*task, *KINDS["batch norm"]], ALL | {"compile": compiled})
