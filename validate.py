#!/usr/bin/env python
"""Validate a checkpoint of train.py or published weights: `python validate.py --help` for its options."""

import sys

from visionattn.training.config import parse_validate, run


def main(argv: list[str]) -> None:
    def options_of(checkpoint: str) -> dict:
        from visionattn.training.evaluation import options_of

        return options_of(checkpoint)

    config = parse_validate(argv, options_of)
    from visionattn.training.evaluation import validate

    validate(config)


if __name__ == "__main__":
    sys.exit(run(main))
