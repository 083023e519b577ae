"""``python -m ptq <command>``: the same as the console script ``ptq``."""

import sys

from ptq.cli.app import main

sys.exit(main())
