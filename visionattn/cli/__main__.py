"""`python -m visionattn.cli`."""

import sys

from . import main

sys.exit(main())
