#!/usr/bin/env python3
"""Set up LoRA Weave for development, and run its demo, server, tests and benchmarks.

python3 dev.py demo | serve | test [pytest arguments] | bench NAME | setup

Nothing has to be installed before: it makes `.venv` and `.host` (a ComfyUI of its own) beside it.
"""

import sys

# This file must compile on any Python, or an old one could not be told.
if sys.version_info < (3, 10):
    sys.exit("Error: Python 3.10 or newer is needed, this is %d.%d" % sys.version_info[:2])

from devtools.commands import main

if __name__ == "__main__":
    sys.exit(main())
