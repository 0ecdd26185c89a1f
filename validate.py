#!/usr/bin/env python
"""Validate checkpoints of train.py or published weights: `python validate.py --help` for the options."""

import sys

from visionattn.cli.scripts import validate as main
from visionattn.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
