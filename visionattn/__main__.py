"""`python -m visionattn`."""

import sys

from .cli import main

sys.exit(main())
