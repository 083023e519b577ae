"""Calibration statistics only: python gen_act_stat.py --config smollm2-135m_w8a8.yaml [overrides] [--help]."""

import sys

from ptq.cli.app import stats_command

if __name__ == "__main__":
    sys.exit(stats_command(sys.argv[1:]))
