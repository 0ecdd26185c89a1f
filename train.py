#!/usr/bin/env python
"""Train a vision backbone: `accelerate launch train.py`, or `python train.py --help` for its options."""

import sys

from visionattn.cli.scripts import train as main
from visionattn.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
