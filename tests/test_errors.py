"""Errors are one line, whatever names and addresses are in them."""

import importlib
import inspect
import sys

import pytest

import visionattn
from visionattn.errors import LONGEST, UnknownModelError, VisionattnError, printable, shortened
from visionattn.moved import MOVED

ODD = "line\nbreaks\r\n\x1b[31m \u2028\u202e\udc80"


def test_whatever_does_not_print_is_escaped():
    told = printable(ODD)
    assert told == r"line\nbreaks\r\n\x1b[31m \u2028\u202e\udc80" and told.isprintable()
    assert printable("née 100 %") == "née 100 %"
    assert len(shortened("a" * 5000 + "\n")) == LONGEST and shortened("van_b0") == "van_b0"


@pytest.mark.parametrize(
    "ask",
    [
        lambda odd: visionattn.create_model(odd),
        lambda odd: visionattn.create_model(f"{odd}.pth"),
        lambda odd: visionattn.create_model(f"hf-hub:{odd}/x"),
        lambda odd: visionattn.create_model(f"local-dir:{odd}"),
        lambda odd: visionattn.create_model("test_van", **{odd: 1}),
        lambda odd: visionattn.create_model("test_van", checkpoint_path=odd),
        lambda odd: visionattn.model_info(odd),
    ],
)
def test_names_with_line_breaks_stay_one_line(ask):
    with pytest.raises(VisionattnError) as e:
        ask(ODD.replace("\udc80", ""))
    assert str(e.value).isprintable()


def test_one_line_in_the_scripts(capsys):
    from visionattn.cli import main

    assert main(["info", ODD]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert r"unknown model line\nbreaks" in line
    with pytest.raises(UnknownModelError):
        visionattn.create_model(ODD)


@pytest.mark.parametrize("old", MOVED)
def test_modules_are_found_by_the_names_that_they_had(old):
    name, today = f"visionattn.{old}", [f"visionattn.{new}" for new in MOVED[old].split()]
    with pytest.warns(FutureWarning, match=f"^{name} is called {' and '.join(today)} now$"):
        sys.modules.pop(name, None)
        named = vars(importlib.import_module(name))
    modules = [vars(importlib.import_module(new)) for new in today]
    public = {key: value for module in modules for key, value in module.items() if key[0] != "_"}
    assert all(named[key] is value for key, value in public.items() if not inspect.ismodule(value))


def test_old_names_are_attributes_too():
    sys.modules.pop("visionattn.sharing", None)
    vars(visionattn).pop("sharing", None)
    with pytest.warns(FutureWarning, match="visionattn.publish now"):
        assert visionattn.sharing.push is visionattn.publish.push
    assert visionattn.weights.load_pretrained is visionattn.weights.layouts.load_pretrained
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        visionattn.nonsense  # noqa: B018
