#!/usr/bin/env python
"""Validate checkpoints of train.py or published weights: `python validate.py --help` for the options."""

import sys

from visionattn.errors import run


def main(argv: list[str]) -> None:
    from visionattn.training.config import parse_validate  # here, so that a library that is lacking is told in one line

    config = parse_validate(argv, lambda checkpoint: {})  # answers --help and typos at once
    from visionattn.training.evaluation import validate_all

    validate_all(config, argv)


if __name__ == "__main__":
    sys.exit(run(main))
