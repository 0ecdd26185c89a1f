"""2,000 damaged, wrong and hostile files: each loads what it should or is refused in one line, and nothing else."""

import builtins
import collections
import importlib
import io
import os
import random
import subprocess
import time

import pytest
import torch
from safetensors.torch import save_file

import visionattn
from visionattn.errors import VisionattnError
from visionattn.weights import write_checkpoint
from visionattn.weights.layouts import load_pretrained

CASES, PARTS = 2000, 8


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


def cyclic() -> dict:
    wrapped: dict = {}
    wrapped["model"] = wrapped
    return wrapped


def nested() -> dict:
    wrapped: dict = {}
    for _ in range(200):
        wrapped = {"state_dict": wrapped}
    return wrapped


INERT = [  # what they name is neither imported nor called, and they load
    lambda sd: {"model": sd, "args": Call(os.mkdir, "executed")},
    lambda sd: {"model": sd, "args": Call(os.system, "touch executed")},
    lambda sd: {"model": sd, "args": Call(builtins.eval, "open('executed', 'w')")},
    lambda sd: {"model": sd, "args": Call(builtins.exec, "open('executed', 'w')")},
    lambda sd: {"model": sd, "args": Call(builtins.getattr, "text", "upper")},
    lambda sd: {"model": sd, "args": Call(subprocess.check_call, ["touch", "executed"])},
    lambda sd: {"model": sd, "args": Call(torch.load, "other.pth")},
    lambda sd: {"model": sd, "args": Call(io.FileIO, "executed", "w")},
    lambda sd: {"model": sd, "args": Call(bytearray, 1 << 40)},
    lambda sd: {"model": sd, "args": collections.Counter(sd)},
    lambda sd: {"model": sd, "args": Call(importlib.import_module, "antigravity")},
    lambda sd: {"model": sd, Call(os.mkdir, "executed"): 1},
    lambda sd: {"model": sd, "args": [(Call(os.mkdir, "executed"),), {Call(os.mkdir, "executed")}]},
]
REFUSED = [
    lambda sd: Call(os.mkdir, "executed"),
    lambda sd: {"model": Call(collections.OrderedDict, Call(os.mkdir, "executed"))},
    lambda sd: {"model": sd | {"head.weight": torch.zeros(1).expand(1 << 20, 1 << 20)}},
    lambda sd: {"model": sd | {"head.weight": torch.zeros(4, 128).to_sparse()}},
    lambda sd: {"model": sd | {"head.weight": torch.quantize_per_tensor(torch.zeros(4, 128), 0.1, 0, torch.qint8)}},
    lambda sd: {"model": {1: torch.zeros(3), None: torch.zeros(2)}},
    lambda sd: {"model": {"state_dict": [1, 2, {"model": "x"}]}},
    lambda sd: cyclic(),
    lambda sd: nested(),
    lambda sd: [sd],
    lambda sd: {},
]


@pytest.fixture(scope="module")
def original() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    return visionattn.create_model("test_van", num_classes=4).state_dict()


def save(content: dict, kind: str) -> bytes:
    if kind == "safetensors":
        save_file(content, "good.safetensors")
    elif kind == "ours":
        write_checkpoint("good.safetensors", content, {"visionattn": '{"model": "test_van"}'})
    else:
        torch.save({"state_dict": content}, "good.pth", _use_new_zipfile_serialization=kind == "zip")
    name = "good.pth" if kind in ("zip", "legacy") else "good.safetensors"
    with open(name, "rb") as file:
        data = file.read()
    os.remove(name)
    return data


def corrupt(rng: random.Random, original: dict, saved: dict[str, bytes]) -> tuple[bytes, str, dict | None]:
    """A file, what was done to it, and what it must load as, if it loads; None: anything of the right shape."""
    kind = rng.choice(list(saved))
    data = bytearray(saved[kind])
    what = rng.choice(["truncate", "flip", "flip", "blank", "shape", "dtype", "hostile"])
    # What torch.save wrote before its archives, and others' safetensors, carry no checksums.
    expected = original if kind in ("zip", "ours") else None
    if what == "truncate":
        return bytes(data[: rng.randrange(len(data))]), f"{kind} {what}", {}
    if what == "flip":
        end = len(data) if rng.random() < 0.5 else 4096
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(min(end, len(data)))] ^= 1 << rng.randrange(8)
        return bytes(data), f"{kind} {what}", expected
    if what == "blank":
        start = rng.randrange(len(data))
        length = min(rng.randint(1, 2000), len(data) - start)
        data[start : start + length] = bytes(length)
        return bytes(data), f"{kind} {what}", expected
    if what == "hostile":
        inert = rng.random() < 0.5
        content = rng.choice(INERT if inert else REFUSED)(original)
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=rng.random() < 0.5)
        return file.getvalue(), what, original if inert else {}
    key = rng.choice([k for k, v in original.items() if v.is_floating_point() and not k.startswith(("head", "stem"))])
    value = original[key]
    if what == "shape":
        value = rng.choice([value[:0], value[:-1], value[None], value.flatten()[:3].clone(), torch.ones(())])
        return save(original | {key: value}, kind), f"{kind} {what}", {}
    dtype = rng.choice([torch.float64, torch.bfloat16, torch.int32, torch.bool, torch.complex64])
    expected = original | {key: value.to(dtype).float()} if dtype.is_floating_point else {}
    return save(original | {key: value.to(dtype)}, kind), f"{kind} {what} {dtype}", expected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", [n if n < 2 else pytest.param(n, marks=pytest.mark.slow) for n in range(PARTS)])
def test_corrupted_files(part, original, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(part)
    saved = {kind: save(original, kind) for kind in ("zip", "legacy", "safetensors", "ours")}
    model = visionattn.create_model("test_van", num_classes=4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loaded = 0
    for case in range(CASES // PARTS):
        data, what, expected = corrupt(rng, original, saved)
        with open("file.pth", "wb") as file:
            file.write(data)
        model.load_state_dict(before)
        start = time.perf_counter()
        try:
            load_pretrained(model, "file.pth")
        except VisionattnError as e:
            assert "\n" not in str(e) and "file.pth" in str(e), (case, what, e)
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), (case, what)
        else:
            loaded += 1
            found = model.state_dict()
            assert expected is None or all(torch.equal(v, found[k]) for k, v in expected.items()), (case, what)
            assert expected != {}, (case, what)
        assert time.perf_counter() - start < 20, (case, what)
        assert os.listdir() == ["file.pth"], (case, what)
    assert 0 < loaded < CASES // PARTS / 2
