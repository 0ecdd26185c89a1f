"""The family that CONTRIBUTING.md shows is one, and the files that it names are there."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import timm
import torch

import visionattn
from visionattn import macs, registry
from visionattn.weights import convert_state_dict

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.fixture(scope="module", autouse=True)
def ripple(tmp_path_factory):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(code.splitlines()) < 60
    path = tmp_path_factory.mktemp("family") / "ripple.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("ripple", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_entries", dict(registry._entries))
        patch.setitem(sys.modules, "ripple", module)
        spec.loader.exec_module(module)
        yield module


@pytest.mark.parametrize("name", ["ripple_tiny.in1k", "test_ripple"])
def test_what_is_known_of_it(name):
    info = visionattn.model_info(name)
    assert (info.family, info.license, bool(info.weights)) == ("ripple", "apache-2.0", name != "test_ripple")
    assert info.gmacs == pytest.approx(macs.count(name, info.input_size) / 1e9, rel=2e-3)


def test_its_models_work():
    x = torch.randn(2, 3, 40, 52)
    model = timm.create_model("test_ripple", num_classes=5, drop_path_rate=0.1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss = model(x).logsumexp(1).mean()
    loss.backward()
    optimizer.step()
    assert all(p.grad is not None for p in model.parameters()) and model(x).logsumexp(1).mean() < loss
    maps = visionattn.create_model("test_ripple", features_only=True)(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 10, 13), (16, 5, 7), (24, 3, 4), (32, 2, 2)]
    detector = visionattn.create_detector("test_ripple", "fcos", 3, fpn_channels=64)
    target = {"boxes": torch.tensor([[4.0, 4.0, 30.0, 30.0]]), "labels": torch.tensor([2])}
    sum(detector(list(x), [target] * 2).values()).backward()
    assert detector.inner.stages[0].blocks[0].mixer.proj.weight.grad.abs().sum() > 0


def test_its_published_names_are_ours():
    model = visionattn.create_model("test_ripple")
    theirs = {k.replace("stem.", "patch_embed.").replace(".mixer.", ".attn."): v for k, v in model.state_dict().items()}
    assert convert_state_dict(theirs, model).keys() == model.state_dict().keys()


def test_the_files_that_it_names_are_there():
    named = set(re.findall(r"`((?:visionattn|tests|docs|configs)/[\w/.]*)`", TEXT))
    assert len(named) > 10 and all((ROOT / each).exists() for each in named)
