#!/usr/bin/env python
"""Train a vision backbone: `accelerate launch train.py`, or `python train.py --help` for its options."""

import sys

from visionattn.errors import run


def main(argv: list[str]) -> None:
    from visionattn.training.config import parse_train  # here, so that a library that is lacking is told in one line

    config, resume = parse_train(argv)
    from visionattn.training.run import train  # after parsing, so that --help and typos are answered at once

    train(config, resume)


if __name__ == "__main__":
    sys.exit(run(main))
