"""One experiment: python main.py --config smollm2-135m_w8a8.yaml [overrides] [-m] [--dry-run] [--help]."""

import sys

from ptq.cli.app import run_command

if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:]))
