"""`visionattn train` and `visionattn validate`, which are train.py and validate.py."""

from ..progress import set_quiet
from .parser import Command, Parser


def train(argv: list[str]) -> None:
    """train.py: trains a model.

    Args:
        argv: its command line.
    """
    from ..training.config import parse_train  # here, so that a library that is lacking is told in one line

    config, resume = parse_train(_without_quiet(argv))
    from ..training.run import train as run  # after parsing, so that --help and typos are answered at once

    folder = run(config, resume)
    if folder and config.report:
        from ..training.reporting import report_after

        report_after(folder)


def validate(argv: list[str]) -> None:
    """validate.py: validates models.

    Args:
        argv: its command line.
    """
    from ..training.config import parse_validate

    argv = _without_quiet(argv)
    config = parse_validate(argv, lambda checkpoint: {})
    from ..training.evaluation import validate, validate_all

    one = validate
    if config.probe:
        from ..training.probing import probe as one
    validate_all(config, argv, one)


def _without_quiet(argv: list[str]) -> list[str]:
    set_quiet("--quiet" in argv)
    return [argument for argument in argv if argument != "--quiet"]


SCRIPTS = {"train": train, "validate": validate}
"""Commands that read their own options."""


def _add_script(parser: Parser) -> None:
    parser.add_argument("options", nargs="*", help="as train.py and validate.py take them; --help explains each")


COMMANDS = (
    Command("train", "train a model: the options of train.py", _add_script, lambda args: train(args.options)),
    Command("validate", "validate: the options of validate.py", _add_script, lambda args: validate(args.options)),
)
