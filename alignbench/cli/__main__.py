"""Run the command line as ``python -m alignbench.cli``."""

import sys

from alignbench.cli.main import main

sys.exit(main())
