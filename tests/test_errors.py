"""Errors are one line, whatever names and addresses are in them."""

import pytest

import visionattn
from visionattn.errors import LONGEST, UnknownModelError, VisionattnError, printable, shortened

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
